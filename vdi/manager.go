package vdi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// Originator is how the service's own sessions call themselves in xapi, but for the
// one that a process keeps: see KeptOriginator.
const Originator = "xapi-nbd"

// KeptOriginator returns the originator of the session that a process keeps, that of
// Config.Local. xapi evicts the oldest of more than 500 sessions of one originator.
// The kept session has an originator of its own, which only this host uses, so that its
// end means that xapi has restarted.
func KeptOriginator() string {
	name, _ := os.Hostname() // without a name all hosts that have none share one
	isPlain := func(r rune) bool {
		return r == '.' || r == '-' || '0' <= r && r <= '9' || 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z'
	}
	return Originator + "-kept " + strings.Map(func(r rune) rune {
		if isPlain(r) {
			return r
		}
		return -1
	}, name)
}

// Config is what a Manager works with. The zero values of limits and times mean
// the defaults given.
type Config struct {
	Client    *xapi.Client   // required
	Local     *xapi.Local    // for questions, with KeptOriginator; default one of its own, which Close logs out
	StateDir  string         // holds the journal and its lock; made if missing
	DeviceDir string         // what VBD.device is relative to
	Roots     blockdev.Roots // where devices are described; default those of a real host
	Inventory string         // path of the inventory file
	DirectIO  bool           // read devices past the page cache, where that is possible

	// AllowMultipleAttach is the file that lets VDIs be attached for writing beside
	// readers; default that of a real host.
	AllowMultipleAttach string

	MaxVBDs       int           // VDIs attached at one time; default 16
	AttachTimeout time.Duration // how long Attach waits; default 45 s
	Linger        time.Duration // how long an attachment waits for a client that was lost; default 0, not at all
	Logger        *slog.Logger  // nil discards
}

// Manager owns every attachment of this process. Its methods may be called
// concurrently. One instance runs per state folder.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	journal *journal
	locked  atomic.Bool                 // the state folder is ours: see Lock
	logout  func(context.Context) error // ends the kept session, if that is the manager's own

	// ctx ends when Close gives up: nothing is done for an attachment after it.
	ctx    context.Context
	giveUp context.CancelFunc
	done   sync.WaitGroup // one for each run of an attachment

	owner      string // in the tags of this process
	locks      hostLocks
	hostMu     sync.Mutex // guards the next two
	hostLock   io.Closer  // nil: not held
	lockedHost string     // its INSTALLATION_UUID

	limits atomic.Pointer[Limits] // those of cfg, until SetLimits
	naming sync.Mutex             // held by NameVMs

	mu           sync.Mutex
	closing      bool
	attachments  map[string]*attachment // by VDI uuid
	leftovers    []*leftover
	srs          map[xapi.SRRef]string // their uuids
	blocksCounts map[string]int64      // see BlocksCounts
	notOurs      map[string]bool       // uuids of VBDs that the journal names and that are not this host's
	room         chan struct{}         // closed, and made anew, when an attachment has ended
	dom0         controlDomain         // as last asked for
	onStep       func(arrow)           // tests count the arrows; nil otherwise
}

// The defaults of Config that Limits share.
const (
	defaultMaxVBDs       = 16
	defaultAttachTimeout = 45 * time.Second
)

// Open is New and Lock in one call.
func Open(cfg Config) (*Manager, error) { return open(cfg, osFS{}, socketLocks{}) }

func open(cfg Config, files fsys, locks hostLocks) (*Manager, error) {
	m := newManager(cfg, files, locks)
	if err := m.Lock(); err != nil {
		return nil, err
	}
	return m, nil
}

// New returns a manager without attachments. It may not use the state folder
// before Lock has returned nil; until then Attach, Recover and Journal fail with
// ErrNotLocked. The caller calls Recover or KeepRecovering after Lock, and Close in
// the end.
func New(cfg Config) *Manager { return newManager(cfg, osFS{}, socketLocks{}) }

func newManager(cfg Config, files fsys, locks hostLocks) *Manager {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.AllowMultipleAttach = cmp.Or(cfg.AllowMultipleAttach, allowMultipleAttach)
	logout := func(context.Context) error { return nil }
	if cfg.Local == nil {
		cfg.Local = xapi.NewLocal(cfg.Client, KeptOriginator())
		logout = cfg.Local.Close
	}
	m := &Manager{
		logout: logout,
		cfg:    cfg, log: cfg.Logger, journal: &journal{fs: files, dir: cfg.StateDir},
		owner: newOwner(), locks: locks,
		attachments:  make(map[string]*attachment),
		notOurs:      make(map[string]bool),
		srs:          make(map[xapi.SRRef]string),
		blocksCounts: make(map[string]int64),
		room:         make(chan struct{}),
	}
	m.limits.Store(Limits{MaxVBDs: cfg.MaxVBDs, AttachTimeout: cfg.AttachTimeout, Linger: cfg.Linger}.withDefaults())
	m.ctx, m.giveUp = context.WithCancel(context.Background())
	return m
}

// Lock makes the state folder if it is missing and locks it, and then this host,
// without waiting: a *LockedError, which matches ErrLocked, means that another
// process has one of them. After an error it may be called again. Close unlocks
// both. An inventory that cannot be read is no error: then the host is locked as
// soon as something is to be done there.
func (m *Manager) Lock() error {
	if err := m.journal.open(); err != nil {
		return err
	}
	if h, err := parseInventory(m.cfg.Inventory); err == nil {
		if err := m.holdHost(m.ctx, h); err != nil {
			return errors.Join(err, m.journal.release())
		}
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
//
// bases are uuids of VDIs since which the caller wants to know the changed blocks, see
// [Disk.Changes]. xapi tells them only while the VDI is not attached, so a caller
// who joins an attachment knows those that it was made with. One that only waits for a
// client to come back, without those that are wanted now, is detached first.
func (m *Manager) Attach(ctx context.Context, s *xapi.Session, vdiUUID string, bases ...string) (*Disk, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.limits.Load().AttachTimeout, ErrStillAttaching)
	defer cancel()
	for {
		a, mine, err := m.join(ctx, s, vdiUUID, bases)
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
		// nothing about this one. Try again, when it is gone.
	}
}

// isSessionError reports whether an attach failed because of who asked for it.
func isSessionError(err error) bool {
	return errors.Is(err, xapi.SessionInvalid) || errors.Is(err, xapi.RBACPermissionDenied) || errors.Is(err, xapi.HandleInvalid)
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

// remove forgets an attachment that has ended. What it has left, if anything, is
// worked on from now on: at no time does nobody know of it.
func (m *Manager) remove(a *attachment, l *leftover) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.attachments, a.vdi)
	if l != nil {
		m.adopt(l)
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

// hopelessAfter is the age from which Close does not wait for a leftover.
const hopelessAfter = time.Minute

// Close refuses new attachments and waits until every one that exists has been
// detached, for which all Disks must be closed, and until every leftover has been
// removed that is younger than a minute. When ctx ends first, or something is
// left, the error matches [ErrLeft]; that stays in the state folder for the next
// start. Then the locks are given back.
func (m *Manager) Close(ctx context.Context) error {
	m.beginClosing()
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
	defer m.releaseHost()
	m.endKeptSession()
	if !m.locked.Load() {
		return nil
	}
	n, err := m.countLeft()
	if err := errors.Join(err, m.journal.close()); err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("%w: %d, see %s", ErrLeft, n, m.journal.dir)
	}
	return nil
}

// endKeptSession logs the kept session out if it is the manager's own. If xapi does
// not answer, it expires by itself.
func (m *Manager) endKeptSession() {
	ctx, cancel := context.WithTimeout(context.Background(), lastGrace)
	defer cancel()
	if err := m.logout(ctx); err != nil {
		m.log.Debug("cannot log out", "err", err)
	}
}

func (m *Manager) beginClosing() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closing = true
	for _, a := range m.attachments {
		if a.stage == lingering {
			a.moveTo(detaching)
			a.poke()
		}
	}
	for _, l := range m.leftovers {
		if time.Since(l.since) > hopelessAfter {
			l.stop()
		}
		l.poke()
	}
}

// countLeft counts what is left to be removed: what the state folder lists, and
// what only its tag will tell of.
func (m *Manager) countLeft() (int, error) {
	uuids, err := m.journal.list()
	creates, err2 := m.journal.creates()
	if err := errors.Join(err, err2); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	uuids = slices.DeleteFunc(uuids, func(uuid string) bool { return m.notOurs[uuid] })
	n := len(uuids) + len(creates)
	for _, l := range m.leftovers {
		listed := slices.Contains(uuids, l.uuid) ||
			slices.ContainsFunc(creates, func(c pendingCreate) bool { return c.nonce == l.nonce })
		if !listed {
			n++
		}
	}
	return n, nil
}

// inUse reports whether a VBD belongs to an attachment of this process, by its
// uuid or by the nonce in its tag; "" is not known. m.mu is held.
func (m *Manager) inUse(uuid, nonce string) bool {
	for _, a := range m.attachments {
		if uuid != "" && a.vbdUUID == uuid || nonce != "" && a.nonce == nonce {
			return true
		}
	}
	return false
}
