package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/vdi"
)

// Predecessor is the process that this one is to replace, see [Options]. A nil Predecessor
// is none; Fail may be called on it.
type Predecessor struct {
	handover *handover
	messages *os.File
	orders   *os.File
	notify   string // NOTIFY_SOCKET: systemd takes notifications of the process in charge only

	mu      sync.Mutex // guards serving
	serving bool       // this process serves, or is about to: Fail has no effect any more

	stopping atomic.Bool // it stops, and has ordered this process to stop, too
}

// NewPredecessor returns the process that has started this one for an upgrade, or nil.
func NewPredecessor() (*Predecessor, error) {
	h, err := readHandover()
	if h == nil || err != nil {
		return nil, err
	}
	notify := os.Getenv("NOTIFY_SOCKET")
	if err := errors.Join(os.Unsetenv(handoverEnv), os.Unsetenv("NOTIFY_SOCKET")); err != nil {
		return nil, err
	}
	for fd := firstPassed; fd < firstPassed+h.count(); fd++ {
		syscall.CloseOnExec(fd)
	}
	// Nonblocking, so that reads end with the file.
	if err := syscall.SetNonblock(h.Orders, true); err != nil {
		return nil, err
	}
	return &Predecessor{
		handover: h, notify: notify,
		messages: os.NewFile(uintptr(h.Messages), "messages"), orders: os.NewFile(uintptr(h.Orders), "orders"),
	}, nil
}

// Fail reports the error that ends this process to the predecessor, unless this process has
// begun to serve.
func (p *Predecessor) Fail(err error) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.serving {
		_ = send(p.messages, message{Error: err.Error()})
	}
}

// isFollowed reports whether this process has begun to serve.
func (p *Predecessor) isFollowed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.serving
}

// hasCertificate reports whether the predecessor has a usable certificate.
func (p *Predecessor) hasCertificate() bool { return p != nil && p.handover.Certificate }

// takeLocks returns the locks that the predecessor has passed.
func (p *Predecessor) takeLocks() *vdi.Locks {
	if p == nil {
		return nil
	}
	l := &vdi.Locks{State: os.NewFile(uintptr(p.handover.State), "lock"), Installation: p.handover.Installation}
	if p.handover.Host > 0 {
		l.Host = os.NewFile(uintptr(p.handover.Host), "lock of the host")
	}
	return l
}

// takeListeners returns the listeners that the predecessor has passed. bySystemd is true if
// systemd has made them.
func (p *Predecessor) takeListeners() (ls []*listener, bySystemd bool, err error) {
	if p == nil {
		return nil, false, nil
	}
	for _, passed := range p.handover.Listeners {
		f := os.NewFile(uintptr(passed.FD), "listener")
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			closeAll(ls)
			return nil, false, fmt.Errorf("listener %s: %w", passed.Addr, err)
		}
		ls = append(ls, &listener{Listener: l, addr: passed.Addr})
	}
	return ls, p.handover.Systemd, nil
}

// readOrder waits for the next order. It fails if the predecessor has ended, or ctx ends.
func (p *Predecessor) readOrder(ctx context.Context) (order byte, err error) {
	defer context.AfterFunc(ctx, func() { _ = p.orders.SetReadDeadline(time.Now()) })()
	var b [1]byte
	switch n, err := p.orders.Read(b[:]); {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case n == 0:
		return 0, errors.Join(errPredecessorEnded, err)
	}
	return b[0], nil
}

// waitOrder waits for an order, which must be the next one. It fails as readOrder does.
func (p *Predecessor) waitOrder(ctx context.Context, want byte) error {
	order, err := p.readOrder(ctx)
	if err == nil && order != want {
		err = fmt.Errorf("order of the old process: got %q, want %q", order, want)
	}
	return err
}

// errPredecessorEnded is the error of a new process whose predecessor ends too early.
var errPredecessorEnded = errors.New("the old process has ended")

// xapiGrace is how long a new process waits for the first response of xapi before it takes
// over: with one, no client is refused. Without, the old process could not attach either.
const xapiGrace = 10 * time.Second

// takeOver makes this process serve in place of its predecessor. When it returns nil,
// the predecessor still accepts, too.
func (s *Service) takeOver(ctx context.Context) error {
	p := s.predecessor
	wait, cancel := context.WithTimeout(ctx, xapiGrace)
	defer cancel()
	select {
	case <-s.ready:
	case <-wait.Done():
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.log.Warn("xapi has not answered yet; taking over all the same")
	}
	if err := send(p.messages, message{Ready: true, Version: buildinfo.Version()}); err != nil {
		return errors.Join(errPredecessorEnded, err)
	}
	if err := p.waitOrder(ctx, orderServe); err != nil {
		return err
	}
	if err := s.control.Load().Move(s.controlPath(control.SocketName)); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	p.mu.Lock()
	p.serving = true
	p.mu.Unlock()
	if err := s.listening.own(); err != nil {
		s.log.Warn("the unix sockets name the old process", "err", err)
	}
	s.listening.start(ctx)
	if err := send(p.messages, message{Serving: true}); err != nil {
		s.log.Warn("the old process has ended during the upgrade", "err", err)
	}
	return nil
}

// followPredecessor waits until this process is in charge, and then for the end of the
// predecessor, after which what it has left behind is removed.
func (s *Service) followPredecessor(ctx context.Context) {
	p := s.predecessor
	defer p.orders.Close()
	err := p.waitOrder(ctx, orderCharge)
	p.messages.Close()
	switch {
	case ctx.Err() != nil:
		return
	case err != nil && p.notify != "":
		// systemd starts another main process, which is to find everything free.
		s.log.Error("the old process has ended before this one was in charge", "err", err)
		if s.beginChange(ctx) {
			s.retireEarly()
			s.endChange()
		}
		return
	case err != nil:
		s.log.Warn("the old process has ended during the upgrade", "err", err)
	}
	if p.notify != "" {
		if err := os.Setenv("NOTIFY_SOCKET", p.notify); err != nil {
			s.log.Error("systemd is not notified", "err", err)
		}
	}
	s.inCharge.open()
	s.always.Info("upgraded: new clients are served by this process", "version", buildinfo.Version())
	s.followOrders(ctx)
	if ctx.Err() != nil {
		return
	}
	s.waitGeneration(ctx, p.handover.Generation)
	s.log.Info("the old process has ended")
	if result, err := s.disks.Recover(ctx); err != nil {
		s.log.Warn("VBDs of the old process are left", "left", len(result.Left), "err", err)
	}
}

// errPredecessorStops is the reason of a stop that was meant for both processes.
var errPredecessorStops = errors.New("the process that this one has replaced was asked to stop before it had handed over")

// followOrders carries out the orders of a predecessor that has handed over, until it or ctx
// ends.
func (s *Service) followOrders(ctx context.Context) {
	for {
		order, err := s.predecessor.readOrder(ctx)
		switch {
		case err != nil:
			return
		case order == orderReload:
			s.askReload()
		case order == orderStop:
			s.predecessor.stopping.Store(true)
			s.stop(errPredecessorStops)
		}
	}
}

// waitGeneration waits until the process with that generation has ended, which is so already,
// or is about to be: the kernel closes the files of a process one after the other.
func (s *Service) waitGeneration(ctx context.Context, generation int) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	tick := time.NewTicker(deathNotice)
	defer tick.Stop()
	for {
		if living, err := s.disks.OtherGenerations(); err != nil || !slices.Contains(living, generation) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// retireEarly is retire for a process that serves and is not in charge yet: its control
// socket gives up the name.
func (s *Service) retireEarly() {
	if _, err := s.control.Load().Link(s.controlPath(control.ReplacedName(s.disks.Generation()))); err != nil {
		s.log.Warn("no control socket any more", "err", err)
	}
	s.retire()
}
