package vdi

import (
	"context"
	"runtime"
)

// CheckDevice lets tests try device texts that the simulated host never gives.
var CheckDevice = checkDevice

// OpenFS is Open on a file system of the test's.
func OpenFS(cfg Config, files *MemFS) (*Manager, error) { return open(cfg, files) }

// Arrows are all steps that an attachment may take, as "from to".
func Arrows() []string {
	var all []string
	for _, a := range arrows {
		all = append(all, a.String())
	}
	return all
}

func (a arrow) String() string { return a.from.String() + " " + a.to.String() }

// OnStep makes the manager tell of every step of its attachments, as "from to".
// f must not call the manager.
func (m *Manager) OnStep(f func(string)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onStep = func(a arrow) { f(a.String()) }
}

// Kill ends the manager as the death of its process would. The caller has cut it
// off from its files and from xapi; Kill closes its devices and waits until none
// of its goroutines is left.
func (m *Manager) Kill() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = m.Close(ctx) // has VBDs to complain of
	m.done.Wait()
}

// Attachment is what the manager knows of one.
type Attachment struct {
	VDI, VBD, Nonce string // VBD is "" until known
	Stage           string
	Users           int
}

// Attachments returns all that there are.
func (m *Manager) Attachments() []Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Attachment
	for _, a := range m.attachments {
		all = append(all, Attachment{a.vdi, a.vbdUUID, a.nonce, a.stage.String(), a.users})
	}
	return all
}

// Gone returns a channel that is closed when the VDI has no attachment, or not
// any more the one that it has now.
func (m *Manager) Gone(vdiUUID string) <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.attachments[vdiUUID]; a != nil {
		return a.gone
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

// Users is how many users the VDI's attachment has.
func (m *Manager) Users(vdiUUID string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.attachments[vdiUUID]; a != nil {
		return a.users
	}
	return 0
}

// WaitStage waits until the VDI's attachment has come to a stage.
func (m *Manager) WaitStage(ctx context.Context, vdiUUID, want string) error {
	for ctx.Err() == nil {
		m.mu.Lock()
		a := m.attachments[vdiUUID]
		reached := a != nil && a.stage.String() == want
		m.mu.Unlock()
		if reached {
			return nil
		}
		runtime.Gosched() // nothing tells of it
	}
	return context.Cause(ctx)
}
