package vdi

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// Originator is how the service's own sessions call themselves in xapi.
const Originator = "xapi-nbd"

// Config is what a Manager works with. The zero values of limits and times mean
// the defaults given.
type Config struct {
	Client    *xapi.Client // required
	StateDir  string       // holds the journal and its lock; made if missing
	DeviceDir string       // what VBD.device is relative to
	Inventory string       // path of the inventory file

	// MayPlug says whether a session's role allows what plugging needs. It is
	// asked before a session joins an attachment that another one made; who
	// makes one is judged by xapi itself. Required.
	MayPlug func(context.Context, *xapi.Session) error

	MaxVBDs       int           // VDIs attached at one time; default 16
	AttachTimeout time.Duration // how long Attach waits; default 55 s
	DetachTimeout time.Duration // how long one detach tries before recovery takes over; default 10 min
	Logger        *slog.Logger  // nil discards
}

// Manager owns every attachment of this process. Its methods may be called
// concurrently. One instance runs per state folder.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	journal *journal

	mu          sync.Mutex
	closing     bool
	attachments map[string]*attachment // by VDI uuid
	done        sync.WaitGroup         // one for each run of an attachment
}

// Open locks the state folder and returns a manager without attachments.
// Somebody must call Recover, and Close in the end.
func Open(cfg Config) (*Manager, error) {
	cfg.MaxVBDs = cmp.Or(cfg.MaxVBDs, 16)
	cfg.AttachTimeout = cmp.Or(cfg.AttachTimeout, 55*time.Second)
	cfg.DetachTimeout = cmp.Or(cfg.DetachTimeout, 10*time.Minute)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	j, err := openJournal(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	return &Manager{cfg: cfg, log: cfg.Logger, journal: j, attachments: make(map[string]*attachment)}, nil
}

// Attach returns the VDI for reading. s is the client's session, already known
// to be valid; its role decides whether xapi lets it plug. The first caller for
// a VDI makes the attachment, further ones join it. The caller closes the Disk.
//
// Attach returns when ctx ends or after AttachTimeout ([ErrStillAttaching]), but
// a plug that is under way goes on: it serves whoever comes meanwhile, or is
// undone when it completes. Errors of xapi come wrapped.
func (m *Manager) Attach(ctx context.Context, s *xapi.Session, vdiUUID string) (*Disk, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.AttachTimeout, ErrStillAttaching)
	defer cancel()
	for {
		a, mine, err := m.join(ctx, s, vdiUUID)
		if err != nil {
			return nil, err
		}
		select {
		case <-a.ready:
		case <-ctx.Done():
			m.release(a)
			return nil, context.Cause(ctx)
		}
		if a.err == nil {
			return &Disk{a: a}, nil
		}
		if mine || !isSessionError(a.err) {
			return nil, a.err
		}
		// It failed for a reason of the session that made it, which says
		// nothing about this one: try again when it is gone.
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
	allowed := false
	for {
		a, next, err := m.tryJoin(s, vdiUUID, allowed)
		if err != nil {
			return nil, false, err
		}
		switch next {
		case joined, made:
			return a, next == made, nil
		case mustCheck:
			if err := m.cfg.MayPlug(ctx, s); err != nil {
				return nil, false, err
			}
			allowed = true
		case mustWait:
			if err := a.waitGone(ctx); err != nil {
				return nil, false, err
			}
		}
	}
}

// step is what one try to join led to.
type step int

const (
	joined    step = iota // the caller is one more user
	made                  // the caller is the first user of a new attachment
	mustCheck             // there is one, and the session's role must be checked first
	mustWait              // there is one that is being detached
)

func (m *Manager) tryJoin(s *xapi.Session, vdiUUID string, allowed bool) (*attachment, step, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing {
		return nil, 0, ErrClosed
	}
	if a, ok := m.attachments[vdiUUID]; ok {
		switch {
		case a.stage == detaching:
			return a, mustWait, nil
		case !allowed:
			return nil, mustCheck, nil
		}
		a.users++
		return a, joined, nil
	}
	if len(m.attachments) >= m.cfg.MaxVBDs {
		return nil, 0, &LimitError{Max: m.cfg.MaxVBDs}
	}
	a := &attachment{
		m: m, vdi: vdiUUID, nonce: rand.Text(), users: 1,
		log:   m.log.With("vdi", vdiUUID),
		ready: make(chan struct{}), unused: make(chan struct{}), gone: make(chan struct{}),
	}
	m.attachments[vdiUUID] = a
	m.done.Go(func() { a.run(s) })
	return a, made, nil
}

// release takes one user away. The last one starts the detach; while the plug
// is still under way that waits for it.
func (m *Manager) release(a *attachment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a.users--
	if a.users == 0 && a.stage == attached {
		a.stage = detaching
		close(a.unused)
	}
}

// remove forgets an attachment that has ended.
func (m *Manager) remove(a *attachment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.attachments, a.vdi)
	close(a.gone)
}

// Close refuses new attachments and waits until every one that exists has been
// detached, for which all Disks must be closed. When ctx ends first, or VBDs
// that could not be removed are left, the error says how many; they stay in the
// journal for the next start.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	m.closing = true
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
	left, err := m.journal.list()
	if err != nil {
		return err
	}
	if err := m.journal.close(); err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%w: %d in %s", ErrLeft, len(left), m.journal.path())
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
