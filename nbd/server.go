package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Server serves the exports of one [Exporter] on any number of listeners. Its fields must
// not be changed once the first method has been called; only the limits may, with
// [Server.SetLimits]. A Server must not be copied. Its methods may be called concurrently.
type Server struct {
	// Exporter opens the exports. Required.
	Exporter Exporter

	// TLSConfig is used after NBD_OPT_STARTTLS. Required unless TLSPolicy always returns
	// NoTLS.
	TLSConfig *tls.Config

	// TLSPolicy returns the TLS mode of one connection. It is called when the first option
	// arrives. If it returns an error, every option except NBD_OPT_ABORT is refused; a
	// [*Refusal] has the text for the peer. Nil means NoTLS.
	TLSPolicy func(ctx context.Context, peer Peer) (TLSMode, error)

	// ForgiveNUL accepts NBD_OPT_EXPORT_NAME with one NUL behind the name, which section
	// "Values" forbids and tapdisk's client sends. The Exporter gets the name without it.
	// Names in other options, and every other NUL, are refused as always.
	ForgiveNUL bool

	// Limits bounds what peers may use. The zero value means the defaults.
	Limits

	// Logger gets a line for the beginning and end of each transmission, and for
	// refusals and I/O errors. Names of exports as clients send them may be secret and
	// are not logged, see [PublicNamer]. Nil discards all lines.
	Logger *slog.Logger

	start  sync.Once
	log    *slog.Logger // Logger, never nil
	budget *byteBudget  // of MaxInflightBytes
	stalls stallMonitor
	lastID atomic.Uint64
	// accepted is the number of connections that Serve has accepted and that are not closed.
	accepted atomic.Int64
	limits   atomic.Pointer[Limits] // those in force, with defaults
	view     serverView
	bounded  boundedLog

	handshakes *handshakes
	tlsSlots   tlsSlots

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	serving   int                // connections that hold one of MaxConns
	hangingUp map[*conn]struct{} // connections that have ended and are not closed yet, see hangUp
	idle      chan struct{}      // closed when closing and no connection is left
}

// init prepares the Server for its first connection. Later calls do nothing. The exported
// fields belong to the caller and are not written to.
func (s *Server) init() {
	s.start.Do(func() {
		s.log = s.Logger
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		limits := s.withDefaults()
		s.limits.Store(limits)
		s.budget = newByteBudget(limits.MaxInflightBytes)
		s.handshakes = newHandshakes(s.limits.Load)
		s.tlsSlots = newTLSSlots()
		s.listeners = make(map[net.Listener]struct{})
		s.conns = make(map[*conn]struct{})
		s.hangingUp = make(map[*conn]struct{})
		s.idle = make(chan struct{})
	})
}

// Serve accepts connections from l, and serves each in a goroutine of its own, until
// Shutdown is called, ctx is done or l is closed. It closes l. It returns
// [ErrServerClosed] after Shutdown, the cause of ctx, or the error of l. When it returns,
// the connections are still served. Errors of l that may pass, such as too many open
// files, are logged, and Serve tries again.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	defer l.Close()
	if !s.addListener(l) {
		return ErrServerClosed
	}
	defer s.removeListener(l)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var pause time.Duration
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			pause = 0
			s.accepted.Add(1)
			go func() {
				defer s.accepted.Add(-1)
				_ = s.ServeConn(context.WithoutCancel(ctx), nc) // it is in the log
			}()
		case s.isClosing():
			return ErrServerClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return err
		default:
			// Too many open files, or the peer has closed the connection before it was
			// accepted: both pass.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Error("cannot accept a connection", "err", err, "again_in", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}
}

// ServeConn serves one connection and closes it. It returns nil after NBD_OPT_ABORT or
// NBD_CMD_DISC, [ErrServerClosed] after Shutdown, and otherwise the reason why the
// connection ended, often a [*HardDisconnectError]. ctx is passed to the Exporter and to
// TLSPolicy; its end does not end the connection.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	s.init()
	c := newConn(s, nc, strconv.FormatUint(s.lastID.Add(1), 10))
	defer s.waitForHangUp(c)
	if err := s.admit(c); err != nil {
		s.mu.Lock()
		s.hangingUp[c] = struct{}{}
		s.mu.Unlock()
		c.close()
		return err
	}
	defer s.remove(c)
	return c.serve(ctx)
}

// Accepted returns the number of connections that Serve has accepted and that are not closed
// yet, in whatever state. After Serve has returned it only falls.
func (s *Server) Accepted() int { return int(s.accepted.Load()) }

// waitForHangUp waits until a connection that has ended is closed. Meanwhile it counts
// only against spareHangingUp.
func (s *Server) waitForHangUp(c *conn) {
	s.mu.Lock()
	full := len(s.hangingUp) > s.limits.Load().MaxConns+spareHangingUp
	s.mu.Unlock()
	if full {
		<-c.hungUp
		c.raw.Close()
	}
	<-c.closed
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.hangingUp, c)
	s.noteIdle()
}

// noteIdle wakes Shutdown when no connection is left; s.mu is held.
func (s *Server) noteIdle() {
	if !s.closing || len(s.conns) > 0 || len(s.hangingUp) > 0 {
		return
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

// Shutdown closes the listeners, answers the requests in flight, refuses options of
// connections in the handshake with NBD_REP_ERR_SHUTDOWN, and returns nil when every
// connection has ended. Clients with simple replies are given up to two seconds to
// disconnect themselves, see [Revocable]. If ctx is done first, Shutdown closes the remaining
// connections, which takes up to a second, and returns the cause of ctx if requests were
// still in flight; calls of devices may still be running then.
func (s *Server) Shutdown(ctx context.Context) error {
	s.init()
	defer s.bounded.flush(s.log)
	s.mu.Lock()
	first := !s.closing
	s.closing = true
	s.handshakes.close()
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.stop()
	}
	if first {
		s.noteIdle()
	}
	s.mu.Unlock()

	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
	}
	if s.killAll(hardDisconnect("not drained in time", ErrServerClosed)) {
		return context.Cause(ctx)
	}
	return nil
}

// killAll closes all connections, and waits for their ends for a short time: the process may
// end next, and then a socket that has unread bytes is reset. It reports whether one of them
// had not ended before.
func (s *Server) killAll(cause error) bool {
	s.mu.Lock()
	rest := slices.Collect(maps.Keys(s.conns))
	all := append(slices.Clone(rest), slices.Collect(maps.Keys(s.hangingUp))...)
	s.mu.Unlock()
	for _, c := range all {
		c.kill(cause)
	}
	late := time.After(hangUpQuiet)
	for _, c := range all {
		select {
		case <-c.closed:
		case <-late:
			return len(rest) > 0
		}
	}
	return len(rest) > 0
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

// admit waits until a connection may begin its handshake, and registers it.
func (s *Server) admit(c *conn) error {
	if err := s.handshakes.admit(c); err != nil {
		if !errors.Is(err, ErrServerClosed) {
			c.logBounded(slog.LevelWarn, EndCrowded, "connection closed: too many handshakes", "limit", s.limits.Load().MaxHandshakes)
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		s.handshakes.finish(c)
		return ErrServerClosed
	}
	s.conns[c] = struct{}{}
	s.view.conns++
	return nil
}

// enter takes one of MaxConns for a connection that is about to finish its handshake, and
// reports whether there was one. leave or remove gives it back.
func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.serving {
		return true
	}
	if s.serving >= s.limits.Load().MaxConns {
		return false
	}
	s.serving++
	c.serving = true
	return true
}

// beginTransmission records that a connection has finished its handshake. If the server is
// closing, the connection ends when it reads the next request.
func (s *Server) beginTransmission(c *conn) {
	s.handshakes.finish(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.transmitting = true
	_ = c.setWriteDeadline(time.Time{}) // clears that of the handshake; if it fails, so does the next write
	if s.closing {
		c.wake()
	}
}

// leave undoes enter.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.serving {
		s.serving--
		c.serving = false
	}
}

// remove forgets a connection that has ended.
func (s *Server) remove(c *conn) {
	s.handshakes.finish(c)
	s.leave(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view.ended.add(c.done())
	delete(s.conns, c)
	s.hangingUp[c] = struct{}{}
}
