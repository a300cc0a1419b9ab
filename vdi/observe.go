package vdi

import (
	"cmp"
	"slices"
	"time"
)

// Status is the state of one attachment.
type Status struct {
	VDI     string    // uuid
	VDIName string    // the VDI's name-label; "" until the device is open
	VMName  string    // the name-label of its VM; "" until NameVMs has asked for it
	VBD     string    // uuid; "" until known
	Size    int64     // the VDI's virtual size in bytes; 0 until the device is open
	Stage   string    // one of Stages; see the package documentation
	Write   bool      // it is attached for writing
	Users   int       // connections that read from it or wait for it
	Since   time.Time // when the attach began
	Blocks  Blocks
}

// Status returns the state of all attachments, oldest first.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Status, 0, len(m.attachments))
	for _, a := range m.attachments {
		st := Status{VDI: a.vdi, VBD: a.vbdUUID, Stage: a.stage.String(), Write: a.isWritable(), Users: a.users, Since: a.since, Blocks: a.blocks.status()}
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

// Journal returns the uuids of the VBDs in the journal, newest first: those in use and those
// left behind. Those of other living processes are left out, see [Manager.OtherGenerations].
// It fails with [ErrNotLocked] before Lock and with [ErrClosed] after Close.
func (m *Manager) Journal() ([]string, error) {
	uuids, err := m.journal.list()
	if err != nil {
		return nil, err
	}
	others, err := m.OtherGenerations()
	if err != nil || len(others) == 0 {
		return uuids, err
	}
	left := make(map[string]bool)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.leftovers {
		left[l.uuid] = true
	}
	return slices.DeleteFunc(uuids, func(uuid string) bool { return !left[uuid] && !m.journal.isAdded(uuid) }), nil
}

// Limits are the settings that [Manager.SetLimits] can change. They have the meaning and
// the defaults of the fields of [Config] with the same names.
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

// SetLimits changes the limits. It detaches nothing, and calls of Attach in progress keep
// their timeout.
func (m *Manager) SetLimits(l Limits) {
	m.limits.Store(l.withDefaults())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.signalSlotFree() // MaxVBDs may have grown
}
