package main

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/nbd"
)

// listeners are the addresses that clients may come to. Its methods may be called
// concurrently.
type listeners struct {
	serve  func(net.Listener) error // until it is closed
	failed func(error)              // is told of a listener that failed by itself
	opened func(net.Addr)           // is told of each that is served from now on

	inherited bool // systemd has them, and passed them to us

	serving sync.WaitGroup
	mu      sync.Mutex // guards open; held while it is changed
	open    []*listener
}

// listener is one address.
type listener struct {
	net.Listener
	addr string // as it is configured
	gone atomic.Bool
}

// newListeners opens every address of the configuration, or takes those that
// systemd passed to this process in their place. Nobody is served before start.
func newListeners(ctx context.Context, cfg config) (*listeners, error) {
	ls, err := inheritedListeners()
	if err != nil || len(ls) > 0 {
		return &listeners{inherited: true, open: ls}, err
	}
	if ls, err = openAll(ctx, listenAddrs(cfg)); err != nil {
		return nil, err
	}
	return &listeners{open: ls}, nil
}

// openAll opens every address, or none.
func openAll(ctx context.Context, addrs []string) ([]*listener, error) {
	var ls []*listener
	for _, addr := range addrs {
		l, err := listenaddr.Listen(ctx, addr)
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

// start begins to serve. The three functions are set by then.
func (l *listeners) start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin(l.open)
}

// begin serves some more; l.mu is held.
func (l *listeners) begin(ls []*listener) {
	for _, ln := range ls {
		l.opened(ln.Addr())
		l.serving.Go(func() {
			if err := l.serve(ln.Listener); !errors.Is(err, nbd.ErrServerClosed) && !ln.gone.Load() {
				l.failed(err)
			}
		})
	}
}

// change listens on these addresses from now on: it opens what is new, closes what
// is gone and leaves alone what stays. Connections go on. With an error everything
// is as it was.
func (l *listeners) change(ctx context.Context, addrs []string) error {
	if l.inherited {
		return nil // systemd decides
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var kept, gone []*listener
	for _, ln := range l.open {
		if slices.Contains(addrs, ln.addr) {
			kept = append(kept, ln)
		} else {
			gone = append(gone, ln)
		}
	}
	missing := slices.DeleteFunc(slices.Clone(addrs), func(addr string) bool {
		return slices.ContainsFunc(kept, func(ln *listener) bool { return ln.addr == addr })
	})
	fresh, err := openAll(ctx, missing)
	if errors.Is(err, syscall.EADDRINUSE) && len(gone) > 0 {
		// What goes may cover what comes: all addresses of a port, one of them.
		closeAll(gone)
		if fresh, err = openAll(ctx, missing); err != nil {
			back, berr := openAll(ctx, configured(gone))
			l.open = append(kept, back...)
			l.begin(back)
			return errors.Join(err, berr)
		}
	}
	if err != nil {
		return err
	}
	closeAll(gone)
	l.open = append(kept, fresh...)
	l.begin(fresh)
	return nil
}

func configured(ls []*listener) (addrs []string) {
	for _, ln := range ls {
		addrs = append(addrs, ln.addr)
	}
	return addrs
}

// addrs are the addresses that are bound.
func (l *listeners) addrs() (addrs []net.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ln := range l.open {
		addrs = append(addrs, ln.Addr())
	}
	return addrs
}
