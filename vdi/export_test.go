package vdi

import (
	"context"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
)

// CheckDevice lets tests use values of VBD.device that the simulated host never returns.
var CheckDevice = checkDevice

// OpenFS is Open with a file system of the test. It may be called in a bubble of fake time.
func OpenFS(cfg Config, files *MemFS) (*Manager, error) {
	m, err := open(cfg, files, noLocks{})
	if err == nil {
		m.bootTime = fakeBootTime()
	}
	return m, err
}

// fakeBootTime returns a clock that starts now and follows the fake time of a bubble.
func fakeBootTime() func() time.Duration {
	begin := time.Now()
	return func() time.Duration { return time.Since(begin) }
}

// noLocks locks nothing: in tests with a file system of their own one process ends
// before the next begins.
type noLocks struct{}

func (noLocks) lock(context.Context, string, lockHolder) (io.Closer, error) {
	return io.NopCloser(nil), nil
}

func (noLocks) adopt(*os.File, lockHolder) (io.Closer, error) { return io.NopCloser(nil), nil }

// ReadMap replaces how the blocks with data are read, before the first attachment.
func (m *Manager) ReadMap(read func(context.Context, allocation.Source) (*vhd.BlockSet, error)) {
	m.readMap = read
}

// ForgetVMNameFailures lets NameVMs ask again at once after a failure.
func (m *Manager) ForgetVMNameFailures() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.attachments {
		a.vm.askAgain = time.Time{}
	}
}

// Transitions returns all transitions between stages, as "from to".
func Transitions() []string {
	var all []string
	for _, a := range transitions {
		all = append(all, a.String())
	}
	return all
}

func (a transition) String() string { return a.from.String() + " " + a.to.String() }

// OnTransition makes the manager call f with each transition of its attachments, as
// "from to". f must not call the manager.
func (m *Manager) OnTransition(f func(string)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onTransition = func(a transition) { f(a.String()) }
}

// Kill simulates that the process of the manager is killed. The caller has disconnected it
// from its files and from xapi; Kill closes its devices and waits for all its goroutines.
func (m *Manager) Kill() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m.mu.Lock()
	all := slices.Collect(maps.Values(m.attachments))
	m.mu.Unlock()
	_ = m.Close(ctx) // fails because VBDs are left
	m.done.Wait()
	for _, a := range all {
		m.mu.Lock()
		leftOpen := a.leftOpen
		a.leftOpen = false
		m.mu.Unlock()
		if leftOpen { // its Disks are not closed any more, or later
			a.closeDevice()
		}
	}
}

// WaitDetached waits until the goroutines of all attachments and leftovers have ended.
func (m *Manager) WaitDetached() { m.done.Wait() }

// LeftNonces returns the nonces of the leftovers, where they are known.
func (m *Manager) LeftNonces() (nonces []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.leftovers {
		nonces = append(nonces, l.nonce)
	}
	return nonces
}

// Attachment is the state of an attachment.
type Attachment struct {
	VDI, VBD, Nonce string // VBD is "" until known
	Stage           string
	Users           int
}

// Attachments returns all attachments.
func (m *Manager) Attachments() []Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Attachment
	for _, a := range m.attachments {
		all = append(all, Attachment{a.vdi, a.vbdUUID, a.nonce, a.stage.String(), a.users})
	}
	return all
}

// Gone returns a channel that is closed when the current attachment of the VDI is gone, or
// at once if there is none.
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

// Users returns the number of users of the VDI's attachment.
func (m *Manager) Users(vdiUUID string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.attachments[vdiUUID]; a != nil {
		return a.users
	}
	return 0
}

// WaitStage waits until the VDI's attachment has a stage.
func (m *Manager) WaitStage(ctx context.Context, vdiUUID, want string) error {
	for ctx.Err() == nil {
		m.mu.Lock()
		a := m.attachments[vdiUUID]
		reached := a != nil && a.stage.String() == want
		m.mu.Unlock()
		if reached {
			return nil
		}
		runtime.Gosched() // there is no event to wait for
	}
	return context.Cause(ctx)
}

// AddGoneLeftover adds a leftover whose VBD does not exist any more and whose entry is
// still in the journal.
func (m *Manager) AddGoneLeftover(uuid string) {
	if err := m.journal.add(uuid); err != nil {
		panic(err)
	}
	m.journal.unlocked = time.Time{} // the first attempt need not wait for journalPause
	m.mu.Lock()
	defer m.mu.Unlock()
	m.adopt(newLeftover(&removal{m: m, log: m.log, uuid: uuid, gone: true}, time.Now()))
}

// SetGuardEvery changes the interval of the checks that a VDI may be written, for one test.
func SetGuardEvery(t *testing.T, d time.Duration) {
	before := guardEvery
	guardEvery = d
	t.Cleanup(func() { guardEvery = before })
}

// SetChangedTimeout shortens the time that is spent on changed blocks, for one test.
func SetChangedTimeout(t *testing.T, d time.Duration) {
	before := changedTimeout
	changedTimeout = d
	t.Cleanup(func() { changedTimeout = before })
}

// GenerationOf and OwnerOfNonce read what a tag names.
var (
	GenerationOf = generationOf
	OwnerOfNonce = ownerOfNonce
)

// AddToJournal and ForgetInJournal change the list of VBDs.
func (m *Manager) AddToJournal(uuid string) error    { return m.journal.add(uuid) }
func (m *Manager) ForgetInJournal(uuid string) error { return m.journal.forget(uuid) }
