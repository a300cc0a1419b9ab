package mirror

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"
)

const (
	tick       = time.Second     // how often losses and progress are looked at, at least
	firstPause = time.Second / 8 // after an error
	maxPause   = 10 * time.Second
	flushEvery = 5 * time.Second // while something is copied
	flushQuiet = time.Second     // between two flushes while nothing is dirty

	// While clients have made a request within activeFor, only every giveWay-th of
	// Config.Requests is used. A copy that takes less than slowCopy mostly takes processor time
	// that their requests need. So in the first pass over the disk, which is the longest, one
	// such copy is made at a time, and after it none for as long as it took: most requests meet
	// no copy. Later passes must be faster than the clients' changes.
	activeFor = 50 * time.Millisecond
	giveWay   = 8
	slowCopy  = 20 * time.Millisecond
)

// Run copies until the mirror ends. It returns nil after [Mirror.Complete], and otherwise an
// error that matches [ErrCancelled], [ErrDetached] or [ErrFailed]. If ctx is done before that, it
// cancels the mirror. It is called once. When it returns nothing is done at the secondary
// any more, except for clients after a pivot.
func (m *Mirror) Run(ctx context.Context) error {
	m.mu.Lock()
	if m.running {
		m.unlock()
		return ErrBusy
	}
	m.running, m.flushing = true, true
	m.lastFlush = time.Now().Add(-flushQuiet)
	m.unlock()
	go m.flushFirst()
	defer m.cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		m.mu.Lock()
		cancelled := ctx.Err() != nil
		if cancelled {
			m.end(Cancelled, context.Cause(ctx))
		}
		if m.state.Ended() {
			m.unlock()
			return m.drain()
		}
		timer.Reset(m.schedule(time.Now()))
		m.unlock()
		done := ctx.Done()
		if cancelled {
			done = nil // the end waits for Complete
		}
		select {
		case <-m.wake:
		case <-timer.C:
		case <-done:
		}
	}
}

// drain waits until the mirror does nothing any more, and returns the result.
func (m *Mirror) drain() error {
	_ = m.await(context.Background(), func() (bool, error) {
		return m.t.count[copying]+m.t.count[toBoth] == 0 && !m.flushing && !m.completing, nil
	})
	defer m.unlock()
	return m.result()
}

// schedule begins what is due, and returns how long nothing else is. The caller holds m.mu.
func (m *Mirror) schedule(now time.Time) time.Duration {
	m.noteLosses()
	m.progress.add(sample{now, m.status.Copied, m.t.dirty.n * m.t.granule})
	if m.t.converge() {
		m.logLater(slog.LevelInfo, "changes are made at both ends from now on", "dirty_bytes", m.t.dirty.n*m.t.granule)
	}
	if now.Before(m.retryAt) {
		return m.retryAt.Sub(now)
	}
	if m.flushDue(now) {
		m.flushing, m.lastFlush = true, now
		go m.maintain(now)
	}
	for m.t.count[copying] < m.copies(now) && (!m.paused || m.held) {
		if wait := m.waitToCopy(now); wait > 0 {
			return min(wait, tick)
		}
		o := m.t.take(m.cfg.copySize)
		if o == nil {
			break
		}
		if m.nextCopy.Before(now) {
			m.nextCopy = now
		}
		m.nextCopy = m.nextCopy.Add(m.pace(o.end - o.begin))
		go m.copy(o)
	}
	return tick
}

// givesWay reports whether copies give way to clients. The caller holds m.mu.
func (m *Mirror) givesWay(now time.Time) bool {
	return !m.held && now.Sub(m.lastRequest) < activeFor
}

// copies returns how many copies may be in flight. The caller holds m.mu.
func (m *Mirror) copies(now time.Time) int {
	switch {
	case !m.givesWay(now):
		return m.cfg.Requests
	case m.rests():
		return 1
	}
	return max(m.cfg.Requests/giveWay, 1)
}

// waitToCopy returns how long no copy may begin, because of the rate limit or because copies
// give way to clients. The caller holds m.mu.
func (m *Mirror) waitToCopy(now time.Time) time.Duration {
	if m.held {
		return 0
	}
	wait := m.nextCopy.Sub(now)
	if m.givesWay(now) && m.rests() {
		wait = max(wait, m.copyEnded.Add(m.lastCopy).Sub(now))
	}
	return wait
}

// rests reports whether there is a pause after each copy while copies give way to clients.
// The caller holds m.mu.
func (m *Mirror) rests() bool { return m.t.passes == 0 && m.lastCopy < slowCopy }

// flushDue reports whether the secondary should be flushed. The caller holds m.mu.
func (m *Mirror) flushDue(now time.Time) bool {
	if m.flushing || m.held {
		return false // Complete flushes itself
	}
	since, flushed := now.Sub(m.lastFlush), m.t.flushed(secondary)
	quiet := m.t.dirty.n == 0 && m.t.count[copying] == 0 && (!flushed || !m.ready)
	return quiet && since >= flushQuiet || since >= flushEvery && (!flushed || m.cfg.Intent != nil)
}

// maintain flushes the secondary, so that little needs to be copied again after a loss. With a
// log it flushes both ends and clears bits of the log.
func (m *Mirror) maintain(began time.Time) {
	m.mu.Lock()
	converged, losses := m.converged(), m.status.Losses
	m.unlock()
	err := m.flush(m.ctx, secondary)
	if err == nil && m.cfg.Intent != nil {
		err = m.clearIntent(began)
	}
	m.mu.Lock()
	defer m.unlock()
	m.flushing, m.flushFailed = false, err != nil
	if err != nil {
		m.fail(fmt.Errorf("flushing: %w", err))
	} else {
		m.recovered()
		if converged && m.converged() && losses == m.status.Losses && !m.ready {
			m.ready = true
			m.logLater(slog.LevelInfo, "the mirror is ready to be completed")
		}
	}
	m.signal()
}

// converged reports whether nothing is left to be copied. The caller holds m.mu.
func (m *Mirror) converged() bool {
	return m.t.blocking() && m.t.dirty.n == 0 && m.t.count[copying] == 0 && m.failingSince.IsZero()
}

// flushFirst flushes the primary at the beginning. Changes that were made before the mirror
// began, and were not flushed then, would all have to be copied again after a loss.
func (m *Mirror) flushFirst() {
	err := m.flush(m.ctx, primary)
	m.mu.Lock()
	defer m.unlock()
	m.flushing = false
	if err != nil {
		m.fail(fmt.Errorf("flushing the primary: %w", err))
	}
	m.signal()
}

// clearIntent flushes the primary and clears bits of the log. After a crash of the machine the
// primary, too, may have lost what was not flushed.
func (m *Mirror) clearIntent(began time.Time) error {
	if err := m.flush(m.ctx, primary); err != nil {
		return err
	}
	return m.cfg.Intent.Clear(m.ctx, began, func(off, n int64) bool {
		m.mu.Lock()
		defer m.unlock()
		return m.t.clean(off, off+n)
	})
}

// fail records an error of an end. The caller holds m.mu.
func (m *Mirror) fail(err error) {
	if m.state.Ended() {
		return
	}
	now := time.Now()
	m.status.LastError, m.ready = err, false
	if m.t.fallBack() {
		m.logLater(slog.LevelInfo, "changes are made at the primary only from now on")
	}
	switch {
	case m.failingSince.IsZero():
		m.failingSince, m.pause = now, firstPause
	case now.Before(m.retryAt):
		return // one of several at the same time
	case now.Sub(m.failingSince) >= m.cfg.RetryFor:
		state := Detached
		if m.cfg.OnError == Stop {
			state = Failed
		}
		m.end(state, err)
		return
	default:
		m.pause = min(2*m.pause, maxPause)
	}
	m.retryAt = now.Add(m.pause)
	m.logLater(slog.LevelWarn, "copying has failed, and will be repeated", "err", err, "pause", m.pause)
	m.signal()
}

// recovered ends the time of errors, if nothing is left that has failed. The caller holds m.mu.
func (m *Mirror) recovered() {
	if m.t.failed.n == 0 && !m.flushFailed {
		m.failingSince, m.retryAt = time.Time{}, time.Time{}
	}
}

// copy makes a copy that take has begun.
func (m *Mirror) copy(o *operation) {
	c, began := copier{m: m, o: o}, time.Now()
	err := c.copy()
	m.mu.Lock()
	defer m.unlock()
	m.copyEnded = time.Now()
	m.lastCopy = m.copyEnded.Sub(began)
	m.noteLosses()
	m.t.endCopy(o, c.sent > 0 || c.zeroed, err)
	m.status.Sent += c.sent
	m.nextCopy = m.nextCopy.Add(-m.pace(o.end - o.begin - c.sent)) // zeroes do not count
	if err != nil {
		m.fail(err)
	} else {
		m.status.Copied += o.end - o.begin
		m.recovered()
	}
	m.signal()
}

// content is what is to be done about a granule.
type content byte

const (
	data    content = iota
	zeroes          // the secondary has to be zeroed
	nothing         // the secondary is known to be zero
)

// copier copies a range of at most Config.copySize bytes.
type copier struct {
	m      *Mirror
	o      *operation
	plan   []content // for each granule
	buf    []byte
	sent   int64 // bytes of data
	zeroed bool  // zeroes were written
}

// copy copies the range.
func (c *copier) copy() error {
	granule := c.m.t.granule
	c.plan = make([]content, (c.o.end-c.o.begin+granule-1)/granule)
	c.holes()
	c.buf = c.m.buffer(c.o.end - c.o.begin)
	defer c.m.release(c.buf)
	if err := c.runs(data, c.read); err != nil {
		return fmt.Errorf("reading the primary: %w", err)
	}
	c.skipUntouched()
	if err := c.runs(data, c.write); err != nil {
		return fmt.Errorf("writing the secondary: %w", err)
	}
	if err := c.runs(zeroes, c.zero); err != nil {
		return fmt.Errorf("zeroing the secondary: %w", err)
	}
	return nil
}

// runs calls f for each run of granules with one content: their first and the one behind.
func (c *copier) runs(of content, f func(off, n int64) error) error {
	granule := c.m.t.granule
	for i := 0; i < len(c.plan); i++ {
		first := i
		for i < len(c.plan) && c.plan[i] == of {
			i++
		}
		if i == first {
			continue
		}
		off := c.o.begin + int64(first)*granule
		if err := f(off, min(c.o.begin+int64(i)*granule, c.o.end)-off); err != nil {
			return err
		}
	}
	return nil
}

// holes plans zeroes for the granules of which the primary says that they read as zeroes.
func (c *copier) holes() {
	e, ok := c.m.cfg.Primary.(Extenter)
	if !ok {
		return
	}
	length := c.o.end - c.o.begin
	n := c.m.toAsk(c.o)
	if n == 0 {
		return
	}
	extents, err := e.Extents(c.m.ctx, c.o.begin, n)
	if err != nil {
		return // all of it is read
	}
	granule, reached, hole := c.m.t.granule, int64(0), false
	for _, x := range extents {
		begin := reached
		reached += x.Length
		hole = hole || x.Zero
		if !x.Zero || begin >= length {
			continue
		}
		behind := min(reached, length) / granule
		if reached >= length {
			behind = int64(len(c.plan))
		}
		for i := (begin + granule - 1) / granule; i < behind; i++ {
			c.plan[i] = zeroes
		}
	}
	c.m.learn(c.o.begin, reached, hole)
}

// dataRun is a range of the primary that had no holes when it was last asked about: asking takes
// some servers long. That a range is read although it has become a hole does no harm.
type dataRun struct {
	begin, end int64
	ask        int64 // how many bytes to ask about next; it grows while there are no holes
}

const maxAsk = 64 << 20

// toAsk returns how many bytes from the begin of a copy on to ask about, 0 if it is known to be
// data.
func (m *Mirror) toAsk(o *operation) int64 {
	m.mu.Lock()
	defer m.unlock()
	if m.data.begin <= o.begin && o.end <= m.data.end {
		return 0
	}
	return max(o.end-o.begin, min(m.data.ask, m.t.size-o.begin))
}

// learn remembers the answer about n bytes at off.
func (m *Mirror) learn(off, n int64, hole bool) {
	m.mu.Lock()
	defer m.unlock()
	if hole {
		m.data.ask = 0
		return
	}
	m.data = dataRun{off, off + n, min(2*max(m.data.ask, m.cfg.copySize), maxAsk)}
}

// read reads granules, and plans zeroes for those that have no other bytes.
func (c *copier) read(off, n int64) error {
	p := c.buf[off-c.o.begin:][:n]
	if err := c.m.ends[primary].ReadAt(c.m.ctx, p, off); err != nil {
		return err
	}
	granule := int(c.m.t.granule)
	for i := (off - c.o.begin) / int64(granule); len(p) > 0; i++ {
		part := p[:min(granule, len(p))]
		if isZero(part) {
			c.plan[i] = zeroes
		}
		p = p[len(part):]
	}
	return nil
}

var zeroPage [64 << 10]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroPage))
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// skipUntouched plans nothing for zeroes that the secondary has. The others may have other
// bytes from now on.
func (c *copier) skipUntouched() {
	t := c.m.t
	c.m.mu.Lock()
	defer c.m.unlock()
	first, _ := t.outwards(c.o.begin, c.o.end)
	for i, what := range c.plan {
		g := first + int64(i)
		if what == zeroes && t.untouched.has(g) {
			c.plan[i] = nothing
		} else {
			t.untouched.put(g, g+1, false)
		}
	}
}

func (c *copier) write(off, n int64) error {
	c.sent += n
	return c.m.ends[secondary].WriteAt(c.m.ctx, c.buf[off-c.o.begin:][:n], off)
}

func (c *copier) zero(off, n int64) error {
	c.zeroed = true
	return c.m.ends[secondary].WriteZeroes(c.m.ctx, off, n)
}
