package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/nbd"
)

const (
	// drainTimeout is how long the server waits at its end for the requests in flight and
	// their replies.
	drainTimeout = 10 * time.Second
	// noTimeout is longer than any connection lasts.
	noTimeout = 100 * 365 * 24 * time.Hour
)

// fileServer serves files. Its methods are called by one goroutine.
type fileServer struct {
	source settingsSource
	out    io.Writer
	log    *slog.Logger

	server    nbd.Server
	exports   exportSet
	security  currentTLS
	serving   sync.WaitGroup // the goroutines that accept connections
	failed    chan error     // receives the first error after which the server must end
	inherited bool           // systemd has passed the listeners
	listeners []*addrListener
}

// addrListener listens on an address of the settings.
type addrListener struct {
	net.Listener
	addr    string // "" if systemd has passed it
	removed atomic.Bool
}

// newFileServer returns a server that writes its addresses to out and its log to errOut.
func newFileServer(source settingsSource, out, errOut io.Writer) *fileServer {
	s := &fileServer{source: source, out: out, log: logTo(errOut, slog.LevelInfo), failed: make(chan error, 1)}
	s.security.current.Store(new(requirements))
	s.exports.security = &s.security
	s.server.Exporter = &s.exports
	s.server.Logger = logTo(errOut, slog.LevelWarn) // without the lines for each client
	s.server.TLSConfig, s.server.TLSPolicy = s.security.config(), s.security.policy
	return s
}

func logTo(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// forgiveNUL makes the server serve tapdisk's client, which ends a mirror for good when it
// loses its connection, and which has nothing to send while its guest does not write.
func (s *fileServer) forgiveNUL() {
	s.server.ForgiveNUL = true
	s.server.FirstRequestTimeout, s.server.IdleTimeout = noTimeout, noTimeout
}

// run serves until ctx ends, and then returns nil, or until a listener fails.
func (s *fileServer) run(ctx context.Context) error {
	reloads := make(chan os.Signal, 1) // one reload that is to come reads what came before it
	if s.source.fixed == nil {
		signal.Notify(reloads, syscall.SIGHUP)
		defer signal.Stop(reloads)
	}
	settings, err := s.source.read()
	if err != nil {
		return err
	}
	passed, err := listenaddr.Inherited()
	if err != nil {
		return err
	}
	s.inherited = len(passed) > 0
	accept, stop := context.WithCancel(ctx)
	defer stop()
	if _, err := s.apply(accept, settings); err != nil {
		return err
	}
	for _, l := range passed {
		s.begin(accept, &addrListener{Listener: l})
	}
	if err := s.announce(s.listeners); err != nil {
		s.fail(err)
	}
	err = s.wait(accept, reloads)
	stop()
	drain, done := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer done()
	_ = s.server.Shutdown(drain) // closes the connections that are left after that
	s.serving.Wait()
	return err
}

// wait reloads when it is asked to. It returns nil when ctx ends, and the error after which
// the server must end.
func (s *fileServer) wait(ctx context.Context, reloads <-chan os.Signal) error {
	for {
		select {
		case <-reloads:
			s.reload(ctx)
		case err := <-s.failed:
			return err
		case <-ctx.Done():
			return nil
		}
	}
}

// reload reads the settings again and applies them. No connection ends because of it.
func (s *fileServer) reload(ctx context.Context) {
	before := *s.exports.exports.Load()
	settings, err := s.source.read()
	var fresh []*addrListener
	if err == nil {
		fresh, err = s.apply(ctx, settings)
	}
	if err != nil {
		s.log.Error("SIGHUP: configuration not reloaded, the exports are as before", "err", err)
		return
	}
	if len(fresh) > 0 {
		go s.announceLater(fresh) // returns after one write
	}
	added, removed, changed := difference(before, settings.exports)
	s.log.Info("SIGHUP: configuration reloaded", "exports", len(settings.exports),
		"added", added, "removed", removed, "changed", changed)
}

// apply uses these settings from now on, and returns the listeners that are new; or it fails
// and changes nothing.
func (s *fileServer) apply(ctx context.Context, settings *serveSettings) (fresh []*addrListener, err error) {
	security, err := readRequirements(settings.certfile, settings.cafile, s.log)
	if err != nil {
		return nil, err
	}
	if fresh, err = s.listen(ctx, settings.listen); err != nil {
		return nil, err
	}
	// Nothing fails from here on.
	s.security.current.Store(security) // first: see exportSet.exportsFor
	s.exports.replace(settings.exports)
	s.listeners = slices.DeleteFunc(s.listeners, func(l *addrListener) bool {
		if s.inherited || slices.Contains(settings.listen, l.addr) {
			return false
		}
		l.removed.Store(true)
		l.Close()
		return true
	})
	for _, l := range fresh {
		s.begin(ctx, l)
	}
	return fresh, nil
}

// listen listens on those addresses on which the server does not listen yet. If systemd has
// passed sockets there are none.
func (s *fileServer) listen(ctx context.Context, addrs []string) (fresh []*addrListener, err error) {
	if s.inherited {
		return nil, nil
	}
	for _, addr := range addrs {
		if slices.ContainsFunc(s.listeners, func(l *addrListener) bool { return l.addr == addr }) {
			continue
		}
		l, err := listenaddr.Listen(ctx, addr)
		if err != nil {
			for _, l := range fresh {
				l.Close()
			}
			return nil, err
		}
		fresh = append(fresh, &addrListener{Listener: l, addr: addr})
	}
	return fresh, nil
}

// begin accepts connections from l until ctx ends or l is removed.
func (s *fileServer) begin(ctx context.Context, l *addrListener) {
	s.listeners = append(s.listeners, l)
	s.serving.Go(func() {
		err := s.server.Serve(ctx, l)
		if ctx.Err() == nil && !l.removed.Load() {
			s.fail(err)
		}
	})
}

// announce prints the addresses of listeners.
func (s *fileServer) announce(listeners []*addrListener) error {
	var text strings.Builder
	for _, addr := range addresses(listeners) {
		fmt.Fprintf(&text, "listening on %s\n", addr)
	}
	_, err := io.WriteString(s.out, text.String())
	return err
}

// fail ends the server.
func (s *fileServer) fail(err error) {
	select {
	case s.failed <- err:
	default: // it ends already
	}
}

// announceLater is announce while clients are served: standard output may have been closed, or
// be a full pipe that nobody reads, for ever.
func (s *fileServer) announceLater(listeners []*addrListener) {
	if err := s.announce(listeners); err != nil {
		s.log.Warn("the new addresses could not be printed", "listening", addresses(listeners), "err", err)
	}
}

// addresses returns the addresses of listeners as text.
func addresses(listeners []*addrListener) (list []string) {
	for _, l := range listeners {
		list = append(list, shown(l.Addr()))
	}
	return list
}

// shown returns an address in the syntax of --listen.
func shown(a net.Addr) string {
	if a.Network() == "unix" {
		return "unix:" + a.String()
	}
	return a.String()
}
