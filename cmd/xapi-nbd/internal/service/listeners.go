package service

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/passfd"
	"xapi-nbd/nbd"
)

// listeners are the addresses that clients may connect to. Its methods may be
// called concurrently.
type listeners struct {
	serve   func(net.Listener) error // serves a listener until it is closed
	opened  func(net.Addr)           // called for each address before it is served
	failed  chan error               // receives the first error of a socket that systemd passed
	retries *retries

	inherited bool // systemd passed the listeners to this process

	serving sync.WaitGroup
	mu      sync.Mutex // guards the fields below
	open    []*listener
	waiting []*waiting
	stopped bool // see stop
}

// listener is one open address.
type listener struct {
	net.Listener
	addr string // as it is configured
	gone atomic.Bool
}

// waiting is one address that could not be opened yet.
type waiting struct {
	addr   string
	err    error              // of the first attempt
	cancel context.CancelFunc // ends the attempts; nil before start
}

// newListeners tries to open every address of the configuration once, or takes the sockets
// that systemd passed to this process instead. It fails if an address can never be opened.
// No connection is served before start. Listeners of the process that this one replaces are
// used for the same addresses, and closed for others.
func newListeners(ctx context.Context, cfg config.Config, from *Predecessor, r *retries, serve func(net.Listener) error, opened func(net.Addr)) (*listeners, error) {
	ls, bySystemd, err := from.takeListeners()
	if err == nil && from == nil {
		ls, err = inheritedListeners()
		bySystemd = len(ls) > 0
	}
	if err != nil {
		return nil, &kindError{ErrListen, err}
	}
	l := &listeners{serve: serve, opened: opened, failed: make(chan error, 1), retries: r, inherited: bySystemd}
	if l.inherited {
		l.open = ls
		return l, nil
	}
	for _, addr := range cfg.ListenAddrs() {
		if i := slices.IndexFunc(ls, func(ln *listener) bool { return ln.addr == addr }); i >= 0 {
			l.open = append(l.open, ls[i])
			ls = slices.Delete(ls, i, i+1)
			continue
		}
		var ln net.Listener
		err := attempt(ctx, func(ctx context.Context) (err error) {
			ln, err = listenOn(ctx, addr)
			return err
		})
		switch {
		case errors.Is(err, ErrListen):
			closeAll(l.open)
			return nil, err
		case err != nil:
			l.waiting = append(l.waiting, &waiting{addr: addr, err: err})
		default:
			l.open = append(l.open, &listener{Listener: ln, addr: addr})
		}
	}
	closeAll(ls)
	return l, nil
}

// openAll opens every address, or none.
func openAll(ctx context.Context, addrs []string) ([]*listener, error) {
	var ls []*listener
	for _, addr := range addrs {
		l, err := listenOn(ctx, addr)
		if err != nil {
			closeAll(ls)
			return nil, err
		}
		ls = append(ls, &listener{Listener: l, addr: addr})
	}
	return ls, nil
}

func closeAll(ls []*listener) {
	for _, l := range ls {
		l.gone.Store(true)
		l.Close()
	}
}

// pass adds copies of the listeners to a handover.
func (l *listeners) pass(h *handover) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.Systemd = l.inherited
	for _, ln := range l.open {
		f, err := passfd.Dup(ln.Listener.(syscall.Conn)) // TCP or unix
		if err != nil {
			return err
		}
		h.Listeners = append(h.Listeners, passedListener{h.pass(f), ln.addr})
	}
	return nil
}

// own makes the unix sockets that this process was passed its own, unless they are systemd's:
// it removes them when it closes them, and the system names it as their process.
func (l *listeners) own() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ln := range l.open {
		socket, ok := ln.Listener.(*net.UnixListener)
		if !ok || l.inherited {
			continue
		}
		socket.SetUnlinkOnClose(true)
		raw, err := socket.SyscallConn()
		if err != nil {
			return err
		}
		var lerr error
		err = raw.Control(func(fd uintptr) { lerr = unix.Listen(int(fd), backlog) })
		if err := errors.Join(err, os.NewSyscallError("listen", lerr)); err != nil {
			return err
		}
	}
	return nil
}

// backlog is more than the system allows, which then takes its own limit, as package net does.
const backlog = 1<<16 - 1

// stop closes this process's copies of the listeners, on which another process accepts, and
// ends the attempts to open more. Connections go on.
func (l *listeners) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ln := range l.open {
		if socket, ok := ln.Listener.(*net.UnixListener); ok {
			socket.SetUnlinkOnClose(false)
		}
	}
	closeAll(l.open)
	for _, w := range l.waiting {
		w.cancel()
	}
	l.open, l.stopped = nil, true
}

// start serves the addresses that could be opened and keeps trying the others, until ctx
// ends.
func (l *listeners) start(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin(ctx, l.open)
	for _, w := range l.waiting {
		l.keepTrying(ctx, w)
	}
}

// begin serves further listeners; l.mu is held.
func (l *listeners) begin(ctx context.Context, ls []*listener) {
	for _, ln := range ls {
		l.opened(ln.Addr())
		l.serving.Go(func() {
			if err := l.serve(ln.Listener); !errors.Is(err, nbd.ErrServerClosed) && !ln.gone.Load() {
				l.lost(ctx, ln, err)
			}
		})
	}
}

// lost is called when a listener has failed by itself.
func (l *listeners) lost(ctx context.Context, ln *listener, err error) {
	if l.inherited {
		select {
		case l.failed <- err: // systemd passes the socket to the next process
		default: // another one has failed
		}
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if ln.gone.Load() {
		return
	}
	l.open = slices.DeleteFunc(l.open, func(other *listener) bool { return other == ln })
	l.retry(ctx, ln.addr, err)
}

// retry opens an address as soon as that is possible; l.mu is held.
func (l *listeners) retry(ctx context.Context, addr string, err error) {
	w := &waiting{addr: addr, err: err}
	l.waiting = append(l.waiting, w)
	l.keepTrying(ctx, w)
}

// keepTrying tries to open an address until it succeeds or w.cancel is called, also after a
// permanent error, because the service may be serving other addresses. l.mu is held.
func (l *listeners) keepTrying(parent context.Context, w *waiting) {
	ctx, cancel := context.WithCancel(parent)
	w.cancel = cancel
	l.serving.Go(func() {
		defer cancel()
		var ln net.Listener
		err := l.retries.again(ctx, "listen "+w.addr, w.err, func(ctx context.Context) error {
			var err error
			if ln, err = listenOn(ctx, w.addr); err != nil {
				return withoutKind(err)
			}
			return nil
		})
		l.mu.Lock()
		defer l.mu.Unlock()
		l.waiting = slices.DeleteFunc(l.waiting, func(other *waiting) bool { return other == w })
		if err != nil {
			return // ctx has ended
		}
		opened := &listener{Listener: ln, addr: w.addr}
		if ctx.Err() != nil {
			closeAll([]*listener{opened})
			return
		}
		l.open = append(l.open, opened)
		l.begin(parent, []*listener{opened})
	})
}

// change replaces the addresses: it opens the new ones, closes those that are not in addrs
// and leaves the others alone. Connections are not affected. After an error the addresses
// are those of before. ctx is that of start.
func (l *listeners) change(ctx context.Context, addrs []string) error {
	if l.inherited {
		return nil // the socket unit has the addresses
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return nil
	}
	var kept, gone []*listener
	for _, ln := range l.open {
		if slices.Contains(addrs, ln.addr) {
			kept = append(kept, ln)
		} else {
			gone = append(gone, ln)
		}
	}
	missing := slices.DeleteFunc(slices.Clone(addrs), func(addr string) bool {
		return slices.ContainsFunc(kept, func(ln *listener) bool { return ln.addr == addr }) ||
			slices.ContainsFunc(l.waiting, func(w *waiting) bool { return w.addr == addr })
	})
	fresh, err := openAll(ctx, missing)
	if errors.Is(err, syscall.EADDRINUSE) && len(gone) > 0 {
		// An old address may cover a new one: all addresses of a port, and one of them.
		closeAll(gone)
		if fresh, err = openAll(ctx, missing); err != nil {
			l.open = kept
			l.reopen(ctx, gone)
			return err
		}
	}
	if err != nil {
		return err
	}
	closeAll(gone)
	// At once, so that the next change can open the address again.
	l.waiting = slices.DeleteFunc(l.waiting, func(w *waiting) bool {
		if slices.Contains(addrs, w.addr) {
			return false
		}
		w.cancel()
		return true
	})
	l.open = append(kept, fresh...)
	l.begin(ctx, fresh)
	return nil
}

// reopen listens again on addresses that were closed; l.mu is held.
func (l *listeners) reopen(ctx context.Context, closed []*listener) {
	for _, old := range closed {
		ls, err := openAll(ctx, []string{old.addr})
		if err != nil {
			l.retry(ctx, old.addr, withoutKind(err))
			continue
		}
		l.open = append(l.open, ls...)
		l.begin(ctx, ls)
	}
}

// addrs returns the addresses that are open.
func (l *listeners) addrs() (addrs []net.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ln := range l.open {
		addrs = append(addrs, ln.Addr())
	}
	return addrs
}
