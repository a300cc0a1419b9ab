package vdi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// Originator is how the service's own sessions call themselves in xapi.
const Originator = "xapi-nbd"

// Config is what a Manager works with. The zero values of limits and times mean
// the defaults given.
type Config struct {
	Client    *xapi.Client   // required
	Local     *xapi.Local    // for questions; default one of its own
	StateDir  string         // holds the journal and its lock; made if missing
	DeviceDir string         // what VBD.device is relative to
	Roots     blockdev.Roots // where devices are described; default those of a real host
	Inventory string         // path of the inventory file
	DirectIO  bool           // read devices past the page cache, where that is possible

	MaxVBDs       int           // VDIs attached at one time; default 16
	AttachTimeout time.Duration // how long Attach waits; default 45 s
	DetachTimeout time.Duration // how long one detach tries before recovery takes over; default 10 min
	Linger        time.Duration // how long an attachment waits for a client that was lost; default 0, not at all
	Logger        *slog.Logger  // nil discards
}

// Manager owns every attachment of this process. Its methods may be called
// concurrently. One instance runs per state folder.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	journal *journal
	locked  atomic.Bool // the state folder is ours: see Lock

	// ctx ends when Close gives up: nothing is done for an attachment after it.
	ctx    context.Context
	giveUp context.CancelFunc
	done   sync.WaitGroup // one for each run of an attachment

	wanted     chan struct{} // see RecoveryWanted
	recovering sync.Mutex    // one Recover at a time

	limits atomic.Pointer[Limits] // those of cfg, until SetLimits

	mu          sync.Mutex
	closing     bool
	attachments map[string]*attachment // by VDI uuid
	room        chan struct{}          // closed, and made anew, when an attachment has ended
	dom0        controlDomain          // as last asked for
	onStep      func(arrow)            // tests count the arrows; nil otherwise
}

// The defaults of Config that Limits share.
const (
	defaultMaxVBDs       = 16
	defaultAttachTimeout = 45 * time.Second
)

// Open is New and Lock in one call.
func Open(cfg Config) (*Manager, error) { return open(cfg, osFS{}) }

func open(cfg Config, files fsys) (*Manager, error) {
	m := newManager(cfg, files)
	if err := m.Lock(); err != nil {
		return nil, err
	}
	return m, nil
}

// New returns a manager without attachments. It may not use the state folder
// before Lock has returned nil; until then Attach, Recover and Journal fail with
// ErrNotLocked. The caller calls Recover after Lock, and Close in the end.
func New(cfg Config) *Manager { return newManager(cfg, osFS{}) }

func newManager(cfg Config, files fsys) *Manager {
	cfg.DetachTimeout = cmp.Or(cfg.DetachTimeout, 10*time.Minute)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Local == nil {
		cfg.Local = xapi.NewLocal(cfg.Client, Originator)
	}
	m := &Manager{
		cfg: cfg, log: cfg.Logger, journal: &journal{fs: files, dir: cfg.StateDir},
		wanted:      make(chan struct{}, 1),
		attachments: make(map[string]*attachment),
		room:        make(chan struct{}),
	}
	m.limits.Store(Limits{MaxVBDs: cfg.MaxVBDs, AttachTimeout: cfg.AttachTimeout, Linger: cfg.Linger}.withDefaults())
	m.ctx, m.giveUp = context.WithCancel(context.Background())
	return m
}

// Lock makes the state folder if it is missing and locks it, without waiting:
// ErrLocked means that another process has it. After an error it may be called
// again. Close unlocks it.
func (m *Manager) Lock() error {
	if err := m.journal.open(); err != nil {
		return err
	}
	m.locked.Store(true)
	return nil
}

// Attach returns the VDI for reading. s is the client's session, already known
// to be valid and allowed to plug; xapi judges again when it is the one that
// plugs. The first caller for a VDI makes the attachment, further ones join it.
// The caller closes the Disk.
//
// Attach returns when ctx ends or after AttachTimeout ([ErrStillAttaching]), but
// a plug that is under way goes on: it serves whoever comes meanwhile, or is
// undone when it completes. Errors of xapi come wrapped.
func (m *Manager) Attach(ctx context.Context, s *xapi.Session, vdiUUID string) (*Disk, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.limits.Load().AttachTimeout, ErrStillAttaching)
	defer cancel()
	for {
		a, mine, err := m.join(ctx, s, vdiUUID)
		if err != nil {
			return nil, err
		}
		// The size that is found after we have come is that of now.
		justOpened := !a.isReady()
		select {
		case <-a.ready:
		case <-ctx.Done():
			m.release(a, false)
			return nil, context.Cause(ctx)
		}
		err = a.err
		if err == nil {
			d, err := a.newDisk(ctx, justOpened)
			if err == nil {
				return d, nil
			}
			if !errors.Is(err, blockdev.ErrReplaced) {
				m.release(a, false)
				return nil, err
			}
			// Somebody took the device away while nobody looked. The VDI may be
			// plugged anew.
			a.lose(err)
			m.release(a, false)
		} else if mine || !isSessionError(err) {
			return nil, err
		}
		// Or it failed for a reason of the session that made it, which says
		// nothing about this one. Try again when it is gone.
		if err := a.waitGone(ctx); err != nil {
			return nil, err
		}
	}
}

// isSessionError reports whether an attach failed because of who asked for it.
func isSessionError(err error) bool {
	return errors.Is(err, xapi.SessionInvalid) || errors.Is(err, xapi.RBACPermissionDenied) || errors.Is(err, xapi.HandleInvalid)
}

// join makes the caller a user of the VDI's attachment, which it makes if there
// is none; mine says so. The caller gives it back with release.
func (m *Manager) join(ctx context.Context, s *xapi.Session, vdiUUID string) (a *attachment, mine bool, err error) {
	for {
		a, next, err := m.tryJoin(s, vdiUUID)
		switch {
		case err != nil:
			return nil, false, err
		case next.wait == nil:
			return a, next.made, nil
		}
		select {
		case <-next.wait:
		case <-ctx.Done():
			err := context.Cause(ctx)
			if next.forRoom && errors.Is(err, ErrStillAttaching) {
				err = &LimitError{Max: m.limits.Load().MaxVBDs}
			}
			return nil, false, err
		}
	}
}

// outcome is what one try to join led to: without wait the caller is a user.
type outcome struct {
	made    bool            // the caller is the first user of a new attachment
	wait    <-chan struct{} // closed when another try makes sense
	forRoom bool            // all places are taken, but some other VDI's is ending
}

func (m *Manager) tryJoin(s *xapi.Session, vdiUUID string) (*attachment, outcome, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closing:
		return nil, outcome{}, ErrClosed
	case !m.locked.Load():
		return nil, outcome{}, ErrNotLocked
	}
	if a, ok := m.attachments[vdiUUID]; ok {
		if a.stage >= lost {
			return nil, outcome{wait: a.gone}, nil
		}
		a.users++
		if a.stage == lingering {
			a.moveTo(attached)
			a.poke()
		}
		return a, outcome{}, nil
	}
	if limit := m.limits.Load().MaxVBDs; len(m.attachments) >= limit {
		if !m.someEnds() {
			return nil, outcome{}, &LimitError{Max: limit}
		}
		// Any place will do: the one that is ending may take long.
		return nil, outcome{wait: m.room, forRoom: true}, nil
	}
	a := newAttachment(m, vdiUUID)
	m.attachments[vdiUUID] = a
	m.done.Go(func() { a.run(s) })
	return a, outcome{made: true}, nil
}

// someEnds reports whether there will be room: some attachment is going already,
// or only lingers, and then goes. m.mu is held.
func (m *Manager) someEnds() bool {
	var idle *attachment
	for _, a := range m.attachments {
		switch {
		case a.stage >= lost:
			return true
		case a.stage == lingering:
			idle = a
		}
	}
	if idle == nil {
		return false
	}
	idle.moveTo(detaching)
	idle.poke()
	return true
}

// release takes one user away. The last one ends the attachment, or lets it
// linger when its connection was lost abruptly; while the plug is still under
// way both wait for it.
func (m *Manager) release(a *attachment, abruptly bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a.users--
	if a.users > 0 {
		return
	}
	switch {
	case a.stage == attached && abruptly && m.limits.Load().Linger > 0 && !m.closing:
		a.moveTo(lingering)
	case a.stage == attached, a.stage == lost:
		a.moveTo(detaching)
	}
	a.poke()
}

// remove forgets an attachment that has ended. Recovery is wanted only now: it
// leaves alone what an attachment still has.
func (m *Manager) remove(a *attachment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.attachments, a.vdi)
	if a.orphaned {
		m.wantRecovery()
	}
	close(a.gone)
	m.makeRoom()
}

// makeRoom has everybody look who waits for room; m.mu is held.
func (m *Manager) makeRoom() {
	close(m.room)
	m.room = make(chan struct{})
}

// lastGrace is how long Close waits for what it has given up: it only has to
// notice.
const lastGrace = 500 * time.Millisecond

// Close refuses new attachments and waits until every one that exists has been
// detached, for which all Disks must be closed. When ctx ends first, or VBDs
// that could not be removed are left, the error says how many; they stay in the
// journal for the next start.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	m.closing = true
	for _, a := range m.attachments {
		if a.stage == lingering {
			a.moveTo(detaching)
			a.poke()
		}
	}
	m.mu.Unlock()
	finished := make(chan struct{})
	go func() {
		m.done.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-ctx.Done():
	}
	m.giveUp()
	select {
	case <-finished:
	case <-time.After(lastGrace):
	}
	if !m.locked.Load() {
		return nil
	}
	uuids, err := m.journal.list()
	if err := errors.Join(err, m.journal.close()); err != nil {
		return err
	}
	if len(uuids) > 0 {
		return fmt.Errorf("%w: %d in %s", ErrLeft, len(uuids), m.journal.path())
	}
	return nil
}

// own reports whether a VBD belongs to an attachment of this process, by its
// uuid or by the nonce in its tag.
func (m *Manager) own(uuid, nonce string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.attachments {
		if a.vbdUUID == uuid || (nonce != "" && a.nonce == nonce) {
			return true
		}
	}
	return false
}
