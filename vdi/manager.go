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

	"xapi-nbd/internal/fsys"
	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/xapi"
)

// Originator is the originator, in xapi's terms, of the sessions that the service opens
// for single tasks. See KeptOriginator for the session that it keeps.
const Originator = "xapi-nbd"

// KeptOriginator returns the originator for the session of [Config].Local, which a process
// keeps. If one originator has more than 500 sessions, xapi ends the oldest. The kept
// session has an originator that only this host uses, so that it ends only when xapi
// restarts.
func KeptOriginator() string {
	name, _ := os.Hostname() // hosts without a name share one originator
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

// Config configures a Manager. On a XenServer or XCP-ng host DeviceDir is /dev and
// Inventory is /etc/xensource-inventory.
type Config struct {
	// Client connects to xapi. Required.
	Client *xapi.Client
	// Local is a session for reading records, with [KeptOriginator]. If it is nil the
	// manager makes one, which Close logs out.
	Local *xapi.Local
	// StateDir is the folder of the journal and its lock. It is made if it is missing.
	// Required.
	StateDir string
	// DeviceDir is the folder to which VBD.device is relative. Required.
	DeviceDir string
	// Roots are the folders that describe how NBD devices are bound. The zero value means
	// those of a real host.
	Roots blockdev.Roots
	// Inventory is the path of the inventory file, which identifies this host. Required.
	Inventory string
	// DirectIO makes reads bypass the page cache, on devices that support it.
	DirectIO bool
	// AllowMultipleAttach is the path of the file whose existence lets VDIs be attached
	// for writing beside readers. "" means the path on a real host.
	AllowMultipleAttach string

	// Locks are those that an earlier process has passed to this one, see [Manager.Locks];
	// nil: none. The manager closes them.
	Locks *Locks

	// MaxVBDs is how many VDIs may be attached at one time; 0 means 16.
	MaxVBDs int
	// AttachTimeout is how long Attach waits; 0 means 45 s.
	AttachTimeout time.Duration
	// Linger is how long an attachment stays for a client whose connection was lost; with 0
	// it is detached at once.
	Linger time.Duration
	// Logger gets the log; nil discards it.
	Logger *slog.Logger
}

// Manager owns all attachments of this process. Its methods may be called concurrently.
// Only one Manager can use a state folder, and only one can serve a host; see
// [Manager.Lock]. Make one with Open or New.
type Manager struct {
	cfg Config
	// readMap is allocation.Read and bootTime the function of that name, except in tests.
	readMap  func(context.Context, allocation.Source) (*vhd.BlockSet, error)
	bootTime func() time.Duration

	log     *slog.Logger
	journal *journal
	locked  atomic.Bool                 // Lock has succeeded
	logout  func(context.Context) error // ends the kept session, if the manager has made it

	// ctx ends when Close stops waiting; attachments and leftovers then stop working.
	ctx    context.Context
	giveUp context.CancelFunc
	done   sync.WaitGroup // goroutines of attachments and leftovers

	owner      string    // in the tags of this process, from Lock on
	generation io.Closer // the lock of the owner, from Lock until Close
	locks      hostLocks
	hostMu     sync.Mutex // guards the next four
	hostLock   io.Closer  // nil if not held
	lockedHost string     // INSTALLATION_UUID of the locked host
	inherited  *Locks     // passed by an earlier process and not in use yet
	passed     bool       // ReleaseLocks was called: another process holds the locks

	limits atomic.Pointer[Limits] // from cfg, until SetLimits
	naming sync.Mutex             // held by NameVMs

	mu           sync.Mutex
	closing      bool
	attachments  map[string]*attachment // by VDI uuid
	leftovers    []*leftover
	srs          map[xapi.SRRef]string // uuids of SRs
	blocksCounts map[string]int64      // see BlocksCounts
	notOurs      map[string]bool       // uuids of VBDs that are in the journal but belong to another VM or host
	slotFree     chan struct{}         // closed and replaced when an attachment has ended
	dom0         controlDomain         // see controlDomain; zero if unknown
	onTransition func(transition)      // tests count the transitions; nil otherwise
}

// The defaults of Limits.
const (
	defaultMaxVBDs       = 16
	defaultAttachTimeout = 45 * time.Second
)

// Open calls New and Lock.
func Open(cfg Config) (*Manager, error) { return open(cfg, fsys.OS{}, socketLocks{}) }

func open(cfg Config, files fsys.FS, locks hostLocks) (*Manager, error) {
	m := newManager(cfg, files, locks)
	if err := m.Lock(); err != nil {
		return nil, err
	}
	return m, nil
}

// New returns a manager without attachments. Until Lock has returned nil, Attach, Recover
// and Journal fail with [ErrNotLocked]. After Lock call Recover or KeepRecovering, and Close
// at the end.
func New(cfg Config) *Manager { return newManager(cfg, fsys.OS{}, socketLocks{}) }

func newManager(cfg Config, files fsys.FS, locks hostLocks) *Manager {
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
		cfg:    cfg, readMap: allocation.Read, log: cfg.Logger, journal: newJournal(files, cfg.StateDir, cfg.Logger),
		locks: locks, inherited: cfg.Locks, bootTime: bootTime,
		attachments:  make(map[string]*attachment),
		notOurs:      make(map[string]bool),
		srs:          make(map[xapi.SRRef]string),
		blocksCounts: make(map[string]int64),
		slotFree:     make(chan struct{}),
	}
	if cfg.Locks != nil {
		m.journal.inherited = cfg.Locks.State
	}
	m.limits.Store(Limits{MaxVBDs: cfg.MaxVBDs, AttachTimeout: cfg.AttachTimeout, Linger: cfg.Linger}.withDefaults())
	m.ctx, m.giveUp = context.WithCancel(context.Background())
	return m
}

// Lock makes the state folder if it is missing, and locks the folder and this host. It does
// not wait: it returns a *[LockedError] if another process has locked one of them. After an
// error it may be called again. Close unlocks both. An unreadable inventory is no error:
// then the first call that needs the host locks it.
func (m *Manager) Lock() error {
	if err := m.journal.open(); err != nil {
		return err
	}
	owner, lock, err := m.generations().begin()
	if err != nil {
		return errors.Join(err, m.journal.release())
	}
	m.owner, m.generation = owner, lock
	if h, err := parseInventory(m.cfg.Inventory); err == nil {
		if err := m.holdHost(m.ctx, h); err != nil {
			return errors.Join(err, m.generations().end(owner, lock), m.journal.release())
		}
	}
	m.locked.Store(true)
	return nil
}

// Attach returns the VDI with the given uuid for reading. The caller closes the Disk. The
// first call for a VDI makes the attachment with session s, and later calls join it. The
// caller must have checked that s is valid and may plug: xapi checks it again only for the
// call that makes the attachment.
//
// Attach returns when ctx ends, or with [ErrStillAttaching] after AttachTimeout. A plug in
// progress goes on: it serves the clients that come meanwhile, or is undone. Other errors
// are those of this package and those of xapi, wrapped.
//
// bases are the uuids of VDIs for [Disk.Changes]. xapi lists changed blocks only while the
// VDI is not attached, so a call that joins an attachment gets only the bases with which the
// attachment was made. An attachment that lingers without one of the bases is detached
// first and made again. While a client writes the VDI, Attach returns an *ExclusiveError.
func (m *Manager) Attach(ctx context.Context, s *xapi.Session, vdiUUID string, bases ...string) (*Disk, error) {
	return m.attachDisk(ctx, s, request{vdi: vdiUUID, bases: bases})
}

// attachDisk is Attach and AttachWritable.
func (m *Manager) attachDisk(ctx context.Context, s *xapi.Session, r request) (*Disk, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.limits.Load().AttachTimeout, ErrStillAttaching)
	defer cancel()
	for {
		a, made, err := m.join(ctx, s, r)
		if err != nil {
			return nil, err
		}
		// If attach is still in progress, the size that it finds is the current one.
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
			// The device was taken away since the last check. Plug the VDI again.
			a.lose(err)
			m.release(a, false)
		} else if made || !isSessionError(err) {
			return nil, err
		}
		// Otherwise the attach failed because of the session of another client. Try
		// again with s when that attachment is gone.
	}
}

// isSessionError reports whether an attach may have failed because of its session.
func isSessionError(err error) bool {
	return errors.Is(err, xapi.SessionInvalid) || errors.Is(err, xapi.RBACPermissionDenied) || errors.Is(err, xapi.HandleInvalid)
}

// release removes one user. After the last one the attachment is detached, or lingers if the
// connection was lost abruptly. During a plug that happens after the plug. The last user of an
// attachment that Close has given up waiting for closes its device.
func (m *Manager) release(a *attachment, abruptly bool) {
	if m.leave(a, abruptly) {
		a.closeDevice()
	}
}

// leave removes one user, and reports whether the caller has to close the device.
func (m *Manager) leave(a *attachment, abruptly bool) (closes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a.users--
	if a.users > 0 {
		return false
	}
	switch {
	case a.stage == attached && abruptly && m.limits.Load().Linger > 0 && !m.closing && !a.isWritable():
		a.moveTo(lingering)
	case a.stage == attached, a.stage == lost:
		a.moveTo(detaching)
	}
	a.poke()
	closes, a.leftOpen = a.leftOpen, false
	return closes
}

// remove removes an attachment that has ended from the list, and adopts its leftover, if
// any, under the same lock: inUse or leftovers have the VBD at any time.
func (m *Manager) remove(a *attachment, l *leftover) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.attachments, a.vdi)
	if l != nil {
		m.adopt(l)
	}
	close(a.gone)
	m.signalSlotFree()
}

// signalSlotFree wakes all callers of Attach that wait for a slot. m.mu is held.
func (m *Manager) signalSlotFree() {
	close(m.slotFree)
	m.slotFree = make(chan struct{})
}

// stopTimeout is how long Close waits for goroutines to end after it has canceled their
// context.
const stopTimeout = 500 * time.Millisecond

// oldLeftover is the age from which Close does not wait for a leftover.
const oldLeftover = time.Minute

// Close refuses new attachments and waits until all are detached, for which all Disks must
// be closed, and until all leftovers younger than a minute are removed. Then it unlocks the
// state folder and the host. If VBDs are left, also because ctx ended first or another
// process has ended without removing its own, the error matches [ErrLeft]; the state folder
// keeps them for the next process.
func (m *Manager) Close(ctx context.Context) error {
	m.BeginClose()
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
	case <-time.After(stopTimeout):
	}
	defer m.releaseHost()
	m.endKeptSession()
	if !m.locked.Load() {
		return m.journal.closeInherited()
	}
	n, err := m.countLeft()
	// The generation ends last: from then on other processes remove what is left.
	if err := errors.Join(err, m.journal.close(), m.generations().end(m.owner, m.generation)); err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("%w: %d, see %s", ErrLeft, n, m.journal.dir)
	}
	return nil
}

// endKeptSession logs the kept session out if the manager has made it. If xapi does not
// respond, the session expires.
func (m *Manager) endKeptSession() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := m.logout(ctx); err != nil {
		m.log.Debug("cannot log out", "err", err)
	}
}

// BeginClose does the first step of Close: it refuses new attachments, ends the lingering of
// those whose clients were lost, and gives up leftovers older than a minute. Close may
// be called later, for example when other processes have ended whose VBDs it is to count.
func (m *Manager) BeginClose() {
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
		if time.Since(l.since) > oldLeftover {
			l.stop()
		}
		l.poke()
		l.signalChanged()
	}
	m.signalSlotFree() // those who wait for a slot or a leftover are refused at once
}

// countLeft counts the VBDs that are left to be removed: the entries of the state folder,
// and the leftovers that are in none of its lists.
func (m *Manager) countLeft() (int, error) {
	uuids, err := m.Journal()
	creates, err2 := m.ownCreates()
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

// inUse reports whether a VBD belongs to an attachment of this process, by its uuid or by
// the nonce in its tag; each may be "" if unknown. m.mu is held.
func (m *Manager) inUse(uuid, nonce string) bool {
	for _, a := range m.attachments {
		if uuid != "" && a.vbdUUID == uuid || nonce != "" && a.nonce == nonce {
			return true
		}
	}
	return false
}
