package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	defaultGranule  = 64 << 10
	maxCopySize     = 1 << 20 // bytes
	defaultRequests = 16
	defaultStall    = 2 * time.Second
	defaultMaxHold  = 30 * time.Second
	defaultRetryFor = time.Minute
)

// Mirror is a mirror of two devices, and the [Device] that its clients use. Its methods may be
// called concurrently. See the package documentation.
type Mirror struct {
	cfg   Config
	ends  [2]Device
	block int64 // the larger block size
	// ctx is done when the mirror has ended, so that nothing more is done at the secondary.
	ctx    context.Context
	cancel context.CancelFunc
	wake   chan struct{} // has a value when Run should look for work

	buffers chan []byte // free ones, for Config.copySize bytes

	mu      sync.Mutex // guards the fields below; released by unlock
	t       *tracker
	events  []event
	changed chan struct{} // closed and set to nil by signal; made by those who wait

	running, paused  bool
	state            State // Copying, or how the mirror ended
	cause            error // why it ended with Cancelled, Detached or Failed
	completing, held bool  // Complete is under way; changes by clients wait
	committing       bool  // Complete cannot be undone any more
	ready            bool  // see Status.Ready
	lost             bool  // changes by clients were lost, and no flush by a client has failed since
	onPrimary        int   // reads and flushes by clients that use the primary

	rate     int64     // bytes per second; 0 is no limit
	nextCopy time.Time // not before, because of the rate limit

	data dataRun // of the primary

	lastRequest time.Time // by a client, other than a flush

	copyEnded time.Time // the last one
	lastCopy  time.Duration

	failingSince time.Time // the zero time while copying works
	flushFailed  bool      // the last flush of the secondary
	pause        time.Duration
	retryAt      time.Time // nothing is copied before, because of errors

	flushing  bool      // a flush by Run is under way
	lastFlush time.Time // when the last one began

	status   Status // its counters
	progress progress
}

// New returns a mirror of two devices. It does no input or output, except that it asks for the
// properties of the devices. The error matches [ErrRefused].
//
// The same device under two names, or a secondary that somebody else uses, is for the caller
// to refuse.
func New(cfg Config) (*Mirror, error) {
	if err := refusal(&cfg); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	setDefault(&cfg.granule, defaultGranule)
	setDefault(&cfg.copySize, maxCopySize)
	setDefault(&cfg.Requests, defaultRequests)
	setDefault(&cfg.Stall, defaultStall)
	setDefault(&cfg.MaxHold, defaultMaxHold)
	setDefault(&cfg.RetryFor, defaultRetryFor)
	m := &Mirror{
		cfg:   cfg,
		ends:  [2]Device{cfg.Primary, newAligned(cfg.Secondary)},
		block: max(cfg.Primary.BlockSize(), cfg.Secondary.BlockSize()),
		wake:  make(chan struct{}, 1),

		buffers: make(chan []byte, cfg.Requests),
		t:       newTracker(cfg.Primary.Size(), cfg.granule),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	for s := range m.ends {
		m.t.caches[s].losses = m.losses(side(s))
	}
	if cfg.SecondaryIsZero {
		m.t.untouched.put(0, m.t.granules, true)
	}
	if err := m.setDirty(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	m.setRate(cfg.Rate)
	return m, nil
}

func setDefault[T int | int64 | time.Duration](v *T, otherwise T) {
	if *v <= 0 {
		*v = otherwise
	}
}

// refusal returns why two devices cannot be mirrored.
func refusal(cfg *Config) error {
	p, s := cfg.Primary, cfg.Secondary
	switch {
	case p == nil || s == nil:
		return errors.New("a device is missing")
	case p == s:
		return errors.New("both ends are the same device")
	case p.Size() != s.Size():
		return fmt.Errorf("the sizes differ: the primary has %d bytes, the secondary %d", p.Size(), s.Size())
	case p.Size() <= 0:
		return errors.New("the disk is empty")
	}
	if r, ok := s.(ReadOnlyDevice); ok && r.ReadOnly() {
		return errors.New("the secondary is read-only")
	}
	a, b := p.BlockSize(), s.BlockSize()
	if a <= 0 || b <= 0 || a%b != 0 && b%a != 0 {
		return fmt.Errorf("neither block size divides the other: %d and %d", a, b)
	}
	granule := cfg.granule
	setDefault(&granule, defaultGranule)
	if granule%max(a, b) != 0 {
		return fmt.Errorf("the block size %d is no power of two up to %d", max(a, b), granule)
	}
	return nil
}

// setDirty sets the dirty set that the mirror begins with. Of these granules it is not known
// whether the primary has been flushed since they were written.
func (m *Mirror) setDirty() error {
	ranges := m.cfg.Dirty
	if ranges == nil {
		ranges = func(yield func(off, n int64) bool) { yield(0, m.t.size) }
	}
	for off, n := range ranges {
		if err := m.inside(off, n); err != nil {
			return err
		}
		m.t.put(&m.t.dirty, off, off+n, true)
		m.t.put(&m.t.caches[primary].unflushed, off, off+n, true)
	}
	return nil
}

// inside returns an error for a range that is not inside the disk.
func (m *Mirror) inside(off, n int64) error {
	if size := m.t.size; off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%d bytes at %d of %d: %w", n, off, size, ErrRange)
	}
	return nil
}

// Size implements [Device].
func (m *Mirror) Size() int64 { return m.t.size }

// BlockSize implements [Device]: that of the primary, also after a pivot.
func (m *Mirror) BlockSize() int64 { return m.cfg.Primary.BlockSize() }

// Pause stops copying until Resume is called. Copies in flight end, and clients are served as
// before. While [Mirror.Complete] holds changes the mirror copies all the same.
func (m *Mirror) Pause() { m.setPaused(true) }

// Resume ends Pause.
func (m *Mirror) Resume() { m.setPaused(false) }

func (m *Mirror) setPaused(paused bool) {
	m.mu.Lock()
	defer m.unlock()
	m.paused = paused
	m.signal()
}

// SetRate sets [Config.Rate].
func (m *Mirror) SetRate(bytesPerSecond int64) {
	m.mu.Lock()
	defer m.unlock()
	m.setRate(bytesPerSecond)
	m.signal()
}

func (m *Mirror) setRate(limit int64) {
	m.rate, m.nextCopy = limit, time.Time{}
}

// pace returns how long n bytes take at the limited rate. The caller holds m.mu.
func (m *Mirror) pace(n int64) time.Duration {
	if m.rate <= 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(m.rate) * float64(time.Second))
}

// losses returns the number of losses of an end.
func (m *Mirror) losses(s side) int64 {
	end := m.cfg.Primary
	if s == secondary {
		end = m.cfg.Secondary
	}
	if c, ok := end.(LossCounter); ok {
		return c.Losses()
	}
	return 0
}

// noteLosses makes dirty what the ends have lost. The caller holds m.mu.
func (m *Mirror) noteLosses() {
	for _, s := range m.used() {
		if m.t.noteLosses(s, m.losses(s)) {
			m.noteLost(s)
		}
	}
}

// used returns the ends that are still used. The caller holds m.mu.
func (m *Mirror) used() []side {
	if m.state.Ended() {
		return []side{m.serving()}
	}
	return []side{primary, secondary}
}

// noteLost counts a loss, and remembers it for clients' flushes if it is of the end that they
// use. The caller holds m.mu.
func (m *Mirror) noteLost(s side) {
	m.status.Losses++
	m.ready = false
	if s == m.serving() {
		m.lost = true
	}
	m.logLater(slog.LevelWarn, "changes that were not flushed may be lost", "end", s.String(), "dirty_bytes", m.t.dirty.n*m.t.granule)
	m.signal()
}

// serving returns the end that clients use. The caller holds m.mu.
func (m *Mirror) serving() side {
	if m.state == Pivoted {
		return secondary
	}
	return primary
}

// signal wakes all who wait for a change of the state, and Run. The caller holds m.mu.
func (m *Mirror) signal() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// nextChange returns a channel that is closed at the next change of the state. The caller
// holds m.mu.
func (m *Mirror) nextChange() <-chan struct{} {
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.changed
}

// await waits until done returns true, which is called with m.mu held, and returns with m.mu
// held. It ends with an error when ctx is done, or done returns one.
func (m *Mirror) await(ctx context.Context, done func() (bool, error)) error {
	m.mu.Lock()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		changed := m.nextChange()
		m.unlock()
		select {
		case <-changed:
			m.mu.Lock()
		case <-ctx.Done():
			m.mu.Lock()
			return context.Cause(ctx)
		}
	}
}

// end ends the mirror. The caller holds m.mu.
func (m *Mirror) end(state State, cause error) {
	if m.state.Ended() || m.committing {
		return
	}
	m.state, m.cause = state, cause
	switch state {
	case Pivoted, Stopped:
		m.logLater(slog.LevelInfo, "mirror completed", "state", state.String())
	case Cancelled:
		m.logLater(slog.LevelWarn, "mirror cancelled: the secondary is of no use", "err", cause)
	default:
		m.logLater(slog.LevelError, "mirror failed: the secondary is of no use", "state", state.String(), "err", cause)
	}
	m.cancel()
	m.signal()
}

// result returns the error that stands for the end of the mirror, nil if it was completed.
// The caller holds m.mu.
func (m *Mirror) result() error {
	switch m.state {
	case Detached:
		return fmt.Errorf("%w: %w", ErrDetached, m.cause)
	case Failed:
		return fmt.Errorf("%w: %w", ErrFailed, m.cause)
	case Cancelled:
		if m.cause == nil {
			return ErrCancelled
		}
		return fmt.Errorf("%w: %w", ErrCancelled, m.cause)
	}
	return nil
}

// buffer returns n bytes, at most Config.copySize, of any content. The caller releases them.
func (m *Mirror) buffer(n int64) []byte {
	select {
	case p := <-m.buffers:
		return p[:n]
	default:
		return make([]byte, n, m.cfg.copySize)
	}
}

func (m *Mirror) release(p []byte) {
	select {
	case m.buffers <- p:
	default:
	}
}
