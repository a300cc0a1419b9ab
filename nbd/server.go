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

// Server serves the exports of one Exporter on any number of listeners. The
// fields are read when the first connection is served and must not change
// afterwards, but see [Server.SetLimits]; their zero values mean the defaults
// given. A Server must not be copied. Its methods may be called concurrently.
type Server struct {
	// Exporter opens the exports. Required.
	Exporter Exporter

	// TLSConfig is used after STARTTLS. Required unless every connection is
	// NoTLS.
	TLSConfig *tls.Config

	// TLSPolicy decides the mode of one connection when its first option
	// arrives. With an error every option but ABORT is refused; a [*Refusal]
	// carries the text for the peer. Nil means NoTLS.
	TLSPolicy func(ctx context.Context, peer Peer) (TLSMode, error)

	// Limits bounds what peers may use. See [Server.SetLimits] for changing it while the
	// Server serves.
	Limits

	// Logger hears of connections, refusals and I/O errors; never of export
	// names, which may be secrets. Nil discards.
	Logger *slog.Logger

	start   sync.Once
	log     *slog.Logger // Logger, never nil
	budget  *byteBudget  // of MaxInflightBytes
	stalls  stallMonitor
	lastID  atomic.Uint64
	limits  atomic.Pointer[Limits] // those in force, with defaults
	view    serverView
	bounded boundedLog

	handshakes *handshakes
	tlsTurns   tlsTurns

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	serving   int           // connections beyond negotiation
	hangingUp int           // connections that have been served and are not closed yet
	idle      chan struct{} // closed when closing and no connection is left
}

// init prepares the Server for its first connection. Later calls do nothing. The exported
// fields belong to the caller and are not written to.
func (s *Server) init() {
	s.start.Do(func() {
		s.log = s.Logger
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		s.limits.Store(s.Limits.withDefaults())
		s.budget = newByteBudget(s.limits.Load().MaxInflightBytes)
		s.handshakes = newHandshakes(s.limits.Load)
		s.tlsTurns = newTLSTurns()
		s.listeners = make(map[net.Listener]struct{})
		s.conns = make(map[*conn]struct{})
		s.idle = make(chan struct{})
	})
}

// Serve accepts connections from l until Shutdown, the end of ctx, or an error
// of l that does not pass; it closes l. After Shutdown it returns
// [ErrServerClosed]. The connections go on when it returns.
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
			go s.ServeConn(context.WithoutCancel(ctx), nc)
		case s.isClosing():
			return ErrServerClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return err
		default:
			// Out of descriptors, or a peer that was gone before it was
			// accepted: neither ends the service.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Error("cannot accept a connection", "err", err, "again_in", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}
}

// ServeConn serves one connection, closes it, and returns how it ended: nil
// after NBD_OPT_ABORT or NBD_CMD_DISC.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	s.init()
	c := newConn(s, nc, strconv.FormatUint(s.lastID.Add(1), 10))
	defer s.waitForHangUp(c)
	if err := s.admit(c); err != nil {
		s.mu.Lock()
		s.hangingUp++
		s.mu.Unlock()
		c.close()
		return err
	}
	defer s.remove(c)
	return c.serve(ctx)
}

// waitForHangUp waits until a connection that has ended is closed. It counts against
// no limit but that of such connections meanwhile.
func (s *Server) waitForHangUp(c *conn) {
	s.mu.Lock()
	full := s.hangingUp > maxHangingUp
	s.mu.Unlock()
	if full {
		<-c.hungUp
		c.raw.Close()
	}
	<-c.closed
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangingUp--
	s.noteIdle()
}

// noteIdle tells Shutdown when nothing is left; s.mu is held.
func (s *Server) noteIdle() {
	if !s.closing || len(s.conns) > 0 || s.hangingUp > 0 {
		return
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

// Shutdown stops accepting, lets requests in flight finish, refuses what is
// still haggling, and returns when every connection has ended. When ctx ends
// first it disconnects the rest hard and returns the cause, without waiting
// for reads that are stuck in a device.
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
	s.mu.Lock()
	rest := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	if len(rest) == 0 {
		return nil
	}
	for _, c := range rest {
		c.kill(hardDisconnect("not drained in time", ErrServerClosed))
	}
	// The process may end when this returns: no peer is left without a FIN.
	told := time.After(hangUpQuiet)
	for _, c := range rest {
		select {
		case <-c.hungUp:
		case <-told:
			return context.Cause(ctx)
		}
	}
	return context.Cause(ctx)
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

// admit waits until a connection may negotiate, and registers it.
func (s *Server) admit(c *conn) error {
	if err := s.handshakes.admit(c); err != nil {
		if !errors.Is(err, ErrServerClosed) {
			c.logBounded(slog.LevelWarn, EndCrowded, "connection closed: too many are negotiating", "limit", s.limits.Load().MaxHandshakes)
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

// enter takes one of MaxConns for a connection that is about to finish
// negotiation. It is kept until the connection ends, or left with leave.
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

// beginTransmission notes that a connection has finished negotiation. One that
// was asked to stop meanwhile ends as soon as it looks for requests.
func (s *Server) beginTransmission(c *conn) {
	s.handshakes.finish(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.transmitting = true
	_ = c.setWriteDeadline(time.Time{}) // that of the handshake; what is sent next tells of the end
	if s.closing {
		c.wake()
	}
}

// leave gives back what enter took.
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
	s.hangingUp++
}
