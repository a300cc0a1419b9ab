package vdi

import (
	"cmp"
	"slices"
	"time"
)

// Status is what can be told of an attachment while it lives.
type Status struct {
	VDI     string    // uuid
	VDIName string    // the VDI's name-label, "" until the device is open
	VMName  string    // the name-label of the VM that it belongs to, "" until NameVMs has asked for it
	VBD     string    // uuid, "" until xapi has told it
	Size    int64     // the VDI's virtual size in bytes, 0 until the device is open
	Stage   string    // see the package documentation
	Users   int       // connections that read from it, or wait for it
	Since   time.Time // when it was begun
	Blocks  Blocks
}

// Status tells of all attachments, the oldest first.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Status, 0, len(m.attachments))
	for _, a := range m.attachments {
		st := Status{VDI: a.vdi, VBD: a.vbdUUID, Stage: a.stage.String(), Users: a.users, Since: a.since, Blocks: a.blocks.status()}
		if a.isReady() {
			st.VDIName, st.VMName, st.Size = a.nameLabel, a.vm.label, a.virtualSize
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.VDI, b.VDI))
	})
	return all
}

// Journal is what the journal lists, in uuids of VBDs, newest first: those in use
// and those that are left behind.
func (m *Manager) Journal() ([]string, error) { return m.journal.list() }

// Limits are the settings of a Manager that may change while it works. They mean
// what the fields of Config with the same names mean, zero values included.
type Limits struct {
	MaxVBDs       int
	AttachTimeout time.Duration
	Linger        time.Duration
}

func (l Limits) withDefaults() *Limits {
	l.MaxVBDs = cmp.Or(l.MaxVBDs, defaultMaxVBDs)
	l.AttachTimeout = cmp.Or(l.AttachTimeout, defaultAttachTimeout)
	return &l
}

// SetLimits changes the limits. Nothing is detached because of it, and whoever
// waits already waits as long as before.
func (m *Manager) SetLimits(l Limits) {
	m.limits.Store(l.withDefaults())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.makeRoom() // there may be some now
}
