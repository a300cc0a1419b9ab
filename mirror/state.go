package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"
)

// Mode is how changes by clients are made; see the package documentation.
type Mode int

// The modes.
const (
	Background Mode = iota // at the primary only
	Blocking               // at both ends, before the client is answered
)

func (m Mode) String() string {
	if m == Blocking {
		return "blocking"
	}
	return "background"
}

// State is what a mirror is doing.
type State int

// The states.
const (
	Copying    State = iota // the secondary differs, and is being copied
	Mirroring               // mode Blocking: little or nothing differs
	InSync                  // both ends are equal, and the secondary has put it on stable storage
	Completing              // changes are held, or will soon be, until [Mirror.Complete] returns
	Pivoted                 // ended: clients use the secondary
	Stopped                 // ended: both ends are equal, and clients get [ErrStopped]
	Cancelled               // ended: clients use the primary, the secondary is of no use
	Detached                // ended by an error: clients use the primary, the secondary is of no use
	Failed                  // ended by an error: changes by clients get [ErrFailed]
)

var stateNames = [...]string{"copying", "mirroring", "in sync", "completing", "pivoted", "stopped", "cancelled", "detached", "failed"}

func (s State) String() string { return stateNames[s] }

// Ended reports whether the mirror has ended: nothing is copied any more.
func (s State) Ended() bool { return s >= Pivoted }

// Errors of a mirror.
var (
	// ErrRefused is matched by all errors of [New].
	ErrRefused = errors.New("cannot be mirrored")
	// ErrCancelled is returned when [Mirror.Cancel] has ended the mirror.
	ErrCancelled = errors.New("the mirror was cancelled")
	// ErrDetached is returned when the mirror has given the secondary up.
	ErrDetached = errors.New("the secondary was given up")
	// ErrFailed is returned after copying has failed with [Stop], also by clients'
	// changes. It matches [syscall.EIO].
	ErrFailed = fmt.Errorf("the mirror has failed: %w", syscall.EIO)
	// ErrStopped is returned by all requests after [StopClients]. It matches
	// [syscall.ESHUTDOWN].
	ErrStopped = fmt.Errorf("the mirror was completed and stopped: %w", syscall.ESHUTDOWN)
	// ErrLost is returned by a flush if changes were lost that were not flushed before.
	// It matches [syscall.EIO].
	ErrLost = fmt.Errorf("the device has lost changes that were not flushed: %w", syscall.EIO)
	// ErrRange is returned for a request that is not inside the disk. It matches
	// [syscall.EINVAL].
	ErrRange = fmt.Errorf("the range is not inside the disk: %w", syscall.EINVAL)

	// ErrPaused is returned by [Mirror.Complete] while the mirror is paused.
	ErrPaused = errors.New("the mirror is paused")
	// ErrBusy is returned while another call of [Mirror.Complete] is under way, and by a
	// second call of [Mirror.Run].
	ErrBusy = errors.New("the mirror is being completed, or runs already")
	// ErrHold is returned by [Mirror.Complete] after [Config.MaxHold].
	ErrHold = errors.New("changes were held for too long")
)

// DifferenceError is returned by [Mirror.Complete] if its comparison finds a byte that
// differs. Everything is copied again after it.
type DifferenceError struct {
	Offset int64 // in bytes
}

func (e *DifferenceError) Error() string {
	return fmt.Sprintf("the secondary differs from the primary at offset %d, so everything is copied again", e.Offset)
}

// Status describes a mirror at one moment. Sizes are in bytes.
type Status struct {
	State  State
	Mode   Mode
	Paused bool
	// Ready says that Complete needs to hold changes for a moment only: the mode is
	// Blocking, and everything that was dirty has been copied and flushed.
	Ready bool
	// OnSecondary says that clients use the secondary.
	OnSecondary bool

	Size     int64
	Dirty    int64 // to be copied still, without those being copied now
	InFlight int   // copies and changes
	Copied   int64 // copied since the beginning, including zeroes that were not written
	Sent     int64 // written to the secondary, including changes by clients

	Rate       float64       // bytes copied per second lately
	TimeLeft   time.Duration // until nothing is dirty; negative if not known
	Converging bool          // the dirty set shrinks, or the mode is Blocking

	Stalls    int64 // changes that waited for the secondary for too long
	Losses    int64 // times that an end lost changes that were not flushed
	LastError error // of either end, or nil
}

// Status returns the status. It is cheap enough to be called many times per second.
func (m *Mirror) Status() Status {
	m.mu.Lock()
	defer m.unlock()
	m.noteLosses()
	s := m.status
	s.Mode, s.Paused, s.OnSecondary = m.t.mode, m.paused, m.state == Pivoted
	s.Size, s.Dirty, s.InFlight = m.t.size, min(m.t.dirty.n*m.t.granule, m.t.size), len(m.t.ops)
	switch s.State = m.state; {
	case m.state.Ended():
	case m.completing:
		s.State = Completing
	case m.t.inSync():
		s.State = InSync
	case m.t.mode == Blocking:
		s.State = Mirroring
	}
	s.Ready = m.ready && !m.state.Ended()
	m.progress.estimate(&s)
	return s
}

// progress estimates how fast a mirror copies and converges, from samples of the last ten
// seconds.
type progress struct {
	samples []sample
}

type sample struct {
	at            time.Time
	copied, dirty int64
}

// add adds a sample, if the last one is at least a second old.
func (p *progress) add(s sample) {
	if n := len(p.samples); n > 0 && s.at.Sub(p.samples[n-1].at) < time.Second {
		return
	}
	if len(p.samples) == 11 {
		p.samples = append(p.samples[:0], p.samples[1:]...)
	}
	p.samples = append(p.samples, s)
}

// estimate sets Rate, TimeLeft and Converging.
func (p *progress) estimate(s *Status) {
	s.TimeLeft, s.Converging = -1, s.Mode == Blocking
	if s.Dirty == 0 {
		s.TimeLeft, s.Converging = 0, true
	}
	if len(p.samples) == 0 {
		return
	}
	first := p.samples[0]
	seconds := time.Since(first.at).Seconds()
	if seconds <= 0 {
		return
	}
	s.Rate = float64(s.Copied-first.copied) / seconds
	if shrunk := float64(first.dirty - s.Dirty); shrunk > 0 && s.Dirty > 0 {
		s.TimeLeft = time.Duration(float64(s.Dirty) / shrunk * seconds * float64(time.Second))
		s.Converging = true
	}
}

// event is a message for the log. They are collected under the lock and logged without it.
type event struct {
	level slog.Level
	text  string
	args  []any
}

// logLater logs an event when the lock is released. The caller holds m.mu.
func (m *Mirror) logLater(level slog.Level, text string, args ...any) {
	if m.cfg.Log != nil {
		m.events = append(m.events, event{level, text, args})
	}
}

// unlock releases the lock, and logs.
func (m *Mirror) unlock() {
	events := m.events
	m.events = nil
	m.mu.Unlock()
	for _, e := range events {
		m.cfg.Log.Log(context.Background(), e.level, e.text, e.args...)
	}
}
