package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
)

// Ending is how a mirror is completed.
type Ending int

const (
	// Pivot lets the clients go on on the secondary.
	Pivot Ending = iota
	// StopClients makes all further requests by clients fail with [ErrStopped].
	StopClients
)

// Complete ends the mirror with success: both ends are equal and flushed, and the primary is
// not used any more when it returns. With verify it compares the ends.
//
// First it waits until [Mirror.Run] was called, little is dirty, and writes go to both ends. Then it holds changes by
// clients, copies the rest, flushes and compares. If any of this fails, or ctx is done, the
// mirror and the changes that were held go on as before. If the comparison finds a difference,
// nothing that was copied can be trusted, and everything is copied again. It returns an error
// that matches [ErrPaused], [ErrBusy], [ErrHold] or, if the mirror has ended
// without success, [ErrCancelled] and so on, a [*DifferenceError], or an error of an end.
func (m *Mirror) Complete(ctx context.Context, how Ending, verify bool) error {
	m.mu.Lock()
	err := m.mayComplete()
	if err == nil && m.completing {
		err = ErrBusy
	}
	if err != nil {
		m.unlock()
		return err
	}
	m.completing = true
	m.unlock()
	err = m.complete(ctx, how, verify)
	m.mu.Lock()
	m.completing, m.held = false, false
	m.signal()
	m.unlock()
	return err
}

// mayComplete returns an error if the mirror has ended or is paused. The caller holds m.mu.
func (m *Mirror) mayComplete() error {
	switch {
	case m.state.Ended():
		if err := m.result(); err != nil {
			return err
		}
		return m.errEnded()
	case m.paused && !m.held:
		return ErrPaused
	}
	return nil
}

// errEnded returns the error of a call that comes after the end. The caller holds m.mu.
func (m *Mirror) errEnded() error { return fmt.Errorf("the mirror has ended already: %v", m.state) }

// almostDone reports whether what is dirty can be copied while changes are held. One percent of
// a large disk would take longer than [Config.MaxHold]. In mode Blocking the dirty set shrinks
// without holding changes, except that trims make it larger: so once all was copied, less than
// one percent is enough. The caller holds m.mu.
func (m *Mirror) almostDone() bool {
	return m.t.blocking() && m.t.small() && (m.ready || m.t.dirty.n*m.t.granule <= m.cfg.copySize && m.t.count[copying] <= 1)
}

func (m *Mirror) complete(ctx context.Context, how Ending, verify bool) error {
	err := m.await(ctx, func() (bool, error) { return m.almostDone(), m.mayComplete() })
	m.unlock()
	if err != nil {
		return err
	}
	if err := m.flushWithin(ctx, secondary); err != nil { // so that the flush below takes less time
		return err
	}
	m.mu.Lock()
	m.held = true
	m.signal()
	m.unlock()
	if err := m.settle(ctx); err != nil {
		return err
	}
	if verify {
		if err := m.verify(ctx); err != nil {
			return err
		}
	}
	return m.commit(ctx, how)
}

// settle copies and flushes until the ends are equal, while changes are held.
func (m *Mirror) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.MaxHold, ErrHold)
	defer cancel()
	for {
		err := m.await(ctx, func() (bool, error) {
			err := m.mayComplete()
			if err == nil && !m.failingSince.IsZero() {
				err = m.status.LastError
			}
			return m.t.dirty.n == 0 && len(m.t.ops) == 0 && !m.flushing, err
		})
		m.unlock()
		if err != nil {
			return err
		}
		for _, s := range []side{secondary, primary} {
			if err := m.flushWithin(ctx, s); err != nil {
				return fmt.Errorf("flushing the %v: %w", s, err)
			}
		}
		m.mu.Lock()
		m.noteLosses()
		equal := m.settled()
		m.unlock()
		if equal {
			return nil
		}
	}
}

// settled reports whether the ends are equal and flushed. The caller holds m.mu.
func (m *Mirror) settled() bool { return m.t.inSync() && m.t.flushed(primary) }

// flushWithin flushes an end. If ctx is done first it returns, and the flush goes on.
func (m *Mirror) flushWithin(ctx context.Context, s side) error {
	result := make(chan error, 1)
	go func() { result <- m.flush(m.ctx, s) }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// verify compares the ends while changes are held. If they differ, everything becomes dirty: the
// cause is not known, and the rest has perhaps not been compared.
func (m *Mirror) verify(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(m.cfg.Requests)
	for off := int64(0); off < m.t.size && ctx.Err() == nil; off += m.cfg.copySize {
		g.Go(func() error { return m.compare(ctx, off, min(m.cfg.copySize, m.t.size-off)) })
	}
	return g.Wait()
}

// compare compares n bytes at off.
func (m *Mirror) compare(ctx context.Context, off, n int64) error {
	want, got := m.buffer(n), m.buffer(n)
	defer m.release(want)
	defer m.release(got)
	if err := m.ends[primary].ReadAt(ctx, want, off); err != nil {
		return fmt.Errorf("reading the primary: %w", err)
	}
	if err := m.ends[secondary].ReadAt(ctx, got, off); err != nil {
		return fmt.Errorf("reading the secondary: %w", err)
	}
	if bytes.Equal(want, got) {
		return nil
	}
	var at int64
	for want[at] == got[at] {
		at++
	}
	return errors.Join(&DifferenceError{off + at}, m.distrust())
}

// distrust makes everything dirty, also for a mirror that is resumed later.
func (m *Mirror) distrust() error {
	m.mu.Lock()
	m.t.put(&m.t.dirty, 0, m.t.size, true)
	m.t.put(&m.t.untouched, 0, m.t.size, false)
	m.t.fallBack()
	m.ready = false
	m.signal()
	m.unlock()
	log := m.cfg.Intent
	if log == nil {
		return nil
	}
	err := log.Mark(m.ctx, 0, m.t.size)
	if err == nil {
		log.Done(0, m.t.size) // the bits stay as long as it is dirty
	}
	return err
}

// commit ends the mirror, if the ends are still equal.
func (m *Mirror) commit(ctx context.Context, how Ending) error {
	m.mu.Lock()
	m.noteLosses()
	err := m.mayComplete()
	if err == nil && !m.settled() {
		err = ErrLost
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	m.committing = err == nil
	m.unlock()
	if err == nil && m.cfg.Intent != nil {
		err = m.cfg.Intent.Complete(context.WithoutCancel(ctx), how == Pivot)
	}
	m.mu.Lock()
	m.committing = false
	m.signal()
	if err != nil {
		m.unlock()
		return err
	}
	state := Pivoted
	if how == StopClients {
		state = Stopped
	}
	m.end(state, nil)
	m.held = false
	m.unlock()
	_ = m.await(context.Background(), func() (bool, error) { return m.onPrimary == 0, nil })
	m.unlock()
	return nil
}

// Cancel ends the mirror without success: clients go on on the primary, and the secondary is
// of no use. It returns an error if the mirror has ended already, or if [Mirror.Complete] is about
// to return.
func (m *Mirror) Cancel() error {
	m.mu.Lock()
	defer m.unlock()
	switch {
	case m.state.Ended():
		return m.errEnded()
	case m.committing:
		return ErrBusy
	}
	m.end(Cancelled, nil)
	return nil
}

// Wait waits until the mirror is ready to be completed, or has been completed: see
// [Status.Ready]. If it has ended otherwise it returns an error as [Mirror.Run] does.
func (m *Mirror) Wait(ctx context.Context) error {
	err := m.await(ctx, func() (bool, error) { return m.ready || m.state.Ended(), m.result() })
	m.unlock()
	return err
}
