package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

const (
	// readyTimeout is how long a new process may take to be ready.
	readyTimeout = 30 * time.Second
	// servingTimeout is how long it may take from then until it serves.
	servingTimeout = 10 * time.Second
)

// maxReplaced is how many processes that were replaced may serve connections. Each has memory
// of its own: MemoryMax of the unit is for one more than these.
const maxReplaced = 3

var (
	errNotReady   = errors.New("the new process was not ready in time")
	errNotServing = errors.New("the new process did not serve in time")
	// errReplaced is the reason of the end of a process that an upgrade has replaced.
	errReplaced = errors.New("replaced by an upgrade: the last connection has ended")
	// errEndReplaced is the same, as an administrator has asked for it.
	errEndReplaced = errors.New("replaced by an upgrade, and asked to end")
	// errDrainTimeout is errReplaced with connections that are left.
	errDrainTimeout = errors.New("replaced by an upgrade, and drain_timeout is over")
)

// keepUpgrading upgrades whenever it is asked to, until ctx ends.
func (s *Service) keepUpgrading(ctx context.Context) {
	for {
		select {
		case <-s.upgrades:
			s.Upgrade(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// Upgrade implements [control.Service]. It goes on when ctx ends: the upgrade belongs to the
// service, not to the request.
func (s *Service) Upgrade(context.Context) control.UpgradeReport {
	if !s.beginChange(s.lifetime) {
		return control.UpgradeReport{Error: errEnding.Error()}
	}
	defer s.endChange()
	report, err := s.upgrade()
	if err != nil {
		s.log.Error("not upgraded: this process goes on", "err", err)
		return control.UpgradeReport{Error: err.Error()}
	}
	return report
}

// beginChange waits until no reload, no upgrade and no start of draining goes on. It returns false if ctx ends
// first; else endChange must be called.
func (s *Service) beginChange(ctx context.Context) bool {
	select {
	case s.changing <- struct{}{}:
		if ctx.Err() == nil {
			return true
		}
		s.endChange()
	case <-ctx.Done():
	}
	return false
}

func (s *Service) endChange() { <-s.changing }

// upgrade starts the installed program and hands over to it. With an error this process goes
// on as before. The caller has called beginChange.
func (s *Service) upgrade() (report control.UpgradeReport, err error) {
	ctx := s.lifetime
	switch {
	case s.replaced.Load():
		return report, errors.New("an upgrade has replaced this process already")
	case ctx.Err() != nil:
		return report, errEnding
	case s.control.Load() == nil:
		return report, errNotLocked
	case s.draining.isOn():
		return report, errors.New("the service is draining")
	}
	if err := s.waitInCharge(ctx); err != nil {
		return report, err
	}
	if n := s.replacedOnes().busy(ctx); n >= maxReplaced {
		return report, fmt.Errorf("%d processes that earlier upgrades have replaced still serve connections, "+
			"and more would need too much memory: try again when one of them has ended, or end them: xapi-nbd status --end-replaced", n)
	}
	s.log.Info("upgrading", "program", program)
	p, err := s.startNew()
	if err != nil {
		return report, fmt.Errorf("cannot start the new process: %w", err)
	}
	undo := func() {}
	defer func() {
		if err != nil {
			p.kill()
			undo()
			p.close()
		}
	}()
	ready, cancel := context.WithTimeoutCause(ctx, readyTimeout, errNotReady)
	defer cancel()
	if report.Version, err = p.waitReady(ready); err != nil {
		return report, err
	}
	// A stop that comes later than this waits for the end of the upgrade, see Run.
	if err = context.Cause(ctx); err != nil {
		return report, err
	}
	old := s.controlPath(control.ReplacedName(s.disks.Generation()))
	if undo, err = s.control.Load().Link(old); err != nil {
		return report, fmt.Errorf("control socket: %w", err)
	}
	if err = p.order(orderServe); err != nil {
		return report, errors.Join(errEnded, err)
	}
	serving, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), servingTimeout, errNotServing)
	defer cancel()
	if err = p.waitServing(serving); err != nil {
		return report, err
	}
	// The new process finds the address of the metrics free.
	s.endCharge()
	s.charge.Wait()
	// From the main process itself, as systemd takes it from no other one. The order comes
	// directly after it: see followPredecessor.
	if err := sendToSystemd("MAINPID="+strconv.Itoa(p.pid), nil); err != nil {
		s.log.Error("systemd is not notified", "err", err)
	}
	if err := p.order(orderCharge); err != nil {
		s.log.Error("the new process has ended during the upgrade", "err", err)
	}
	// If systemd has sent SIGTERM to this process because it had not followed yet, the signal
	// has come by now: see passOn.
	waitNotified()
	p.pipe.Close()
	s.successor, s.handedOver = p, time.Now() // p.orders stays open until this process ends
	s.log.Info("upgraded: new clients are served by the new process", "pid", p.pid, "version", report.Version)
	s.passReload() // here, as this process may end directly afterwards
	s.retire()
	report.PID, report.Waiting = p.pid, s.server.Serving()
	return report, nil
}

// stopGrace is how long after an upgrade a stop of this process is taken for one of the
// service: the signal was on its way to what was the main process when it was sent.
const stopGrace = time.Second

// passOn orders the process that has replaced this one to reload, if this one was asked to,
// and to stop, too, if stop has ended while this one handed over. The caller knows that no
// upgrade is under way.
func (s *Service) passOn(stop context.Context) {
	if s.successor == nil {
		return
	}
	s.passReload()
	if stop.Err() == nil || time.Since(s.handedOver) > stopGrace {
		return
	}
	if err := s.successor.order(orderStop); err != nil {
		s.log.Debug("the new process has ended before this one", "err", err)
	}
}

// waitInCharge waits until this process is in charge: directly after an upgrade its
// predecessor may still be handing over.
func (s *Service) waitInCharge(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, servingTimeout, errors.New("this process is not in charge yet"))
	defer cancel()
	select {
	case <-s.inCharge:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startNew starts the new process with copies of the listeners and locks.
func (s *Service) startNew() (*newProcess, error) {
	h := &handover{Generation: s.disks.Generation()}
	if cert := s.policy.settings.Load().cert; cert != nil {
		h.Certificate = cert.Available() == nil
	}
	defer h.close()
	locks, err := s.disks.Locks()
	if err != nil {
		return nil, err
	}
	h.State = h.pass(locks.State)
	if locks.Host != nil {
		h.Host, h.Installation = h.pass(locks.Host), locks.Installation
	}
	if err := s.listening.pass(h); err != nil {
		return nil, err
	}
	return startNew(h)
}

// retire makes this process serve the connections that it has, until they end or
// drain_timeout is over: another one serves new clients. The caller has called beginChange.
func (s *Service) retire() {
	s.replaced.Store(true)
	os.Unsetenv("NOTIFY_SOCKET") // systemd follows the new main process
	s.listening.stop()
	s.endCharge()
	s.charge.Wait()
	if err := s.disks.ReleaseLocks(); err != nil {
		s.log.Warn("cannot release the locks", "err", err)
	}
	close(s.retired)
}

// waitReplaced cancels when an upgrade has replaced this process and it has no connection
// left, or drain_timeout is over. It returns when ctx ends, too.
func (s *Service) waitReplaced(ctx context.Context, cancel context.CancelCauseFunc) {
	select {
	case <-s.retired:
	case <-ctx.Done():
		return
	}
	s.listening.serving.Wait() // from here on no connection is added
	limit := time.NewTimer(time.Duration(s.settings.Load().DrainTimeout))
	defer limit.Stop()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for s.server.Accepted() > 0 {
		select {
		case <-tick.C:
		case <-limit.C:
			s.log.Warn("drain_timeout is over: the connections that are left end", "connections", s.server.Serving())
			cancel(errDrainTimeout)
			return
		case <-ctx.Done():
			return
		}
	}
	cancel(errReplaced)
}

// End implements [control.Service].
func (s *Service) End() error {
	if !s.replaced.Load() {
		return errors.New("no upgrade has replaced this process")
	}
	s.end(errEndReplaced)
	return nil
}

// controlPath returns the path of a socket in the state folder.
func (s *Service) controlPath(name string) string {
	return filepath.Join(s.settings.Load().StateDir, name)
}
