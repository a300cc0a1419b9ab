package mirror

import (
	"bytes"
	"context"
	"log/slog"
	"time"
)

// ReadAt implements [Device].
func (m *Mirror) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := m.inside(off, int64(len(p))); err != nil {
		return err
	}
	s, err := m.use(time.Now())
	if err != nil {
		return err
	}
	defer m.unuse(s)
	return m.ends[s].ReadAt(ctx, p, off)
}

// Flush implements [Device]. It also fails, once, if changes were lost that were not flushed
// before: see [ErrLost].
func (m *Mirror) Flush(ctx context.Context) error {
	s, err := m.use(time.Time{})
	if err != nil {
		return err
	}
	defer m.unuse(s)
	// A flush that is cancelled could have failed: then the next one would succeed,
	// although changes are lost.
	if err := m.flush(context.WithoutCancel(ctx), s); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.unlock()
	if m.lost {
		m.lost = false
		return ErrLost
	}
	return nil
}

// use returns the end that clients use. at is when a request began that copies give way to.
// The caller calls unuse when the request has ended.
func (m *Mirror) use(at time.Time) (side, error) {
	m.mu.Lock()
	defer m.unlock()
	if at.After(m.lastRequest) {
		m.lastRequest = at
	}
	if m.state == Stopped {
		return 0, ErrStopped
	}
	s := m.serving()
	m.countUse(s, 1)
	return s, nil
}

func (m *Mirror) unuse(s side) {
	m.mu.Lock()
	defer m.unlock()
	m.countUse(s, -1)
}

// countUse counts the requests other than changes that use the primary. The caller holds m.mu.
func (m *Mirror) countUse(s side, n int) {
	if s == primary {
		if m.onPrimary += n; m.onPrimary == 0 && m.state.Ended() {
			m.signal()
		}
	}
}

// flush flushes an end. ctx must not be cancelled while the end is used.
func (m *Mirror) flush(ctx context.Context, s side) error {
	m.mu.Lock()
	m.noteLosses()
	counts := m.t.beginFlush(s)
	m.countUse(s, 1)
	m.unlock()
	err := m.ends[s].Flush(ctx)
	m.mu.Lock()
	defer m.unlock()
	m.countUse(s, -1)
	m.noteLosses()
	if m.t.endFlush(s, counts, err) {
		m.noteLost(s)
	}
	m.signal()
	return err
}

// WriteAt implements [Device].
func (m *Mirror) WriteAt(ctx context.Context, p []byte, off int64) error {
	return m.change(ctx, change{write, p, off, int64(len(p))})
}

// WriteZeroes implements [Device].
func (m *Mirror) WriteZeroes(ctx context.Context, off, n int64) error {
	return m.change(ctx, change{zero, nil, off, n})
}

// Trim implements [Device].
func (m *Mirror) Trim(ctx context.Context, off, n int64) error {
	return m.change(ctx, change{trim, nil, off, n})
}

// change is a request of a client to change n bytes at off.
type change struct {
	command command
	p       []byte // of a write
	off, n  int64
}

type command int

const (
	write command = iota
	zero
	trim
)

// apply makes the change at one end.
func (c change) apply(ctx context.Context, d Device) error {
	switch c.command {
	case write:
		return d.WriteAt(ctx, c.p, c.off)
	case zero:
		return d.WriteZeroes(ctx, c.off, c.n)
	default:
		return d.Trim(ctx, c.off, c.n)
	}
}

// mirrored reports whether the change may be made at the secondary as it is. The content after
// a trim is not defined, and may differ.
func (c change) mirrored() bool { return c.command != trim }

// change makes a change of a client. The ends are changed with contexts that are not
// cancelled with ctx, because a cancelled change might still be carried out later.
func (m *Mirror) change(ctx context.Context, c change) error {
	if err := m.inside(c.off, c.n); err != nil || c.n == 0 {
		return err
	}
	o, patience, err := m.admit(ctx, c)
	if err != nil {
		return err
	}
	if o.kind == afterwards {
		err := c.apply(context.WithoutCancel(ctx), m.ends[secondary])
		m.endChange(o, true, nil)
		return err
	}
	log := m.cfg.Intent
	if log != nil {
		if err := log.Mark(ctx, c.off, c.n); err != nil {
			m.endChange(o, true, nil)
			return err
		}
	}
	if o.kind == toBoth {
		c.p = bytes.Clone(c.p) // the secondary may still be written when the client has its answer
	}
	err = c.apply(context.WithoutCancel(ctx), m.ends[primary])
	if log != nil {
		log.Done(c.off, c.n) // no bit is cleared while the change is in the table
	}
	if o.kind == toPrimary || err != nil {
		m.endChange(o, false, nil)
		return err
	}
	m.repeat(o, c, patience)
	return nil
}

// admit waits until a change may begin and enters it into the table. patience is how long it
// may wait for the secondary then.
func (m *Mirror) admit(ctx context.Context, c change) (o *operation, patience time.Duration, err error) {
	begin, end := alignedRange(c.off, c.n, m.block, m.t.size)
	patience = m.cfg.Stall
	m.mu.Lock()
	defer m.unlock()
	for {
		k, reason, err := m.admission(c, begin, end)
		if err != nil {
			return nil, 0, err
		}
		if reason == overlap && patience <= 0 {
			m.stallOverlapping(begin, end)
			k, reason = toPrimary, none
		}
		if reason == none {
			m.lastRequest = time.Now()
			return m.t.begin(k, begin, end), patience, nil
		}
		waited, err := m.waitToBegin(ctx, reason, patience)
		if err != nil {
			return nil, 0, err
		}
		if reason == overlap {
			patience -= waited
		}
	}
}

// obstacle is why a change may not begin yet.
type obstacle int

const (
	none    obstacle = iota
	hold             // changes are held by Complete
	overlap          // an operation that overlaps is in flight
)

// admission returns how a change may be made, or why not yet, or never. The caller holds m.mu.
func (m *Mirror) admission(c change, begin, end int64) (kind, obstacle, error) {
	switch {
	case m.state == Stopped:
		return 0, none, ErrStopped
	case m.state == Failed:
		return 0, none, ErrFailed
	case m.held:
		return 0, hold, nil
	case m.state == Pivoted:
		return afterwards, none, nil
	case m.state.Ended() || !c.mirrored() || !m.t.blocking():
		return toPrimary, none, nil
	case m.t.overlaps(begin, end):
		return 0, overlap, nil
	}
	return toBoth, none, nil
}

// waitToBegin waits for the next change of the state, or for patience if the obstacle is an
// operation. The caller holds m.mu, which is released meanwhile.
func (m *Mirror) waitToBegin(ctx context.Context, reason obstacle, patience time.Duration) (waited time.Duration, err error) {
	changed, began := m.nextChange(), time.Now()
	m.unlock()
	defer m.mu.Lock()
	var timeout <-chan time.Time
	if reason == overlap {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-changed:
	case <-timeout:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	return time.Since(began), nil
}

// repeat makes a change at the secondary that has been made at the primary. After patience it
// returns before that has ended.
func (m *Mirror) repeat(o *operation, c change, patience time.Duration) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		m.endChange(o, true, c.apply(m.ctx, m.ends[secondary]))
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		m.mu.Lock()
		defer m.unlock()
		m.stall(o)
	}
}

// stall lets clients go on although an operation has not ended. The caller holds m.mu.
func (m *Mirror) stall(o *operation) {
	if _, inFlight := m.t.ops[o]; !inFlight || o.stalled {
		return
	}
	m.t.stall(o)
	m.status.Stalls++
	m.ready = false
	m.logLater(slog.LevelWarn, "the secondary takes too long, changes are made at the primary only until it answers", "offset", o.begin, "bytes", o.end-o.begin)
	m.signal()
}

// stallOverlapping stalls the operations for which a change has waited for too long. The
// caller holds m.mu.
func (m *Mirror) stallOverlapping(begin, end int64) {
	for o := range m.t.ops {
		if o.begin < end && begin < o.end {
			m.stall(o)
		}
	}
}

// endChange ends a change. synced is whether it was made at the secondary, and err the error
// of that.
func (m *Mirror) endChange(o *operation, synced bool, err error) {
	m.mu.Lock()
	defer m.unlock()
	m.noteLosses()
	if m.t.lost(o, m.serving()) {
		m.lost = true
	}
	m.t.endChange(o, synced && err == nil)
	switch {
	case err != nil:
		m.t.put(&m.t.failed, o.begin, o.end, true)
		m.fail(err)
	case synced && o.kind == toBoth:
		m.status.Sent += o.end - o.begin
	}
	m.signal()
}
