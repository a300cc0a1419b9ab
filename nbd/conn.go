package nbd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/internal/sock"
)

// conn is one accepted connection: its bytes, its deadlines, its end.
//
// Only the goroutine that runs serve, and later the holder of the read token, reads from
// it. Every goroutine may call stop and kill.
type conn struct {
	srv  *Server
	host string // IP address of the peer, "" for unix sockets
	peer Peer
	log  *slog.Logger

	serving      bool // holds one of MaxConns; guarded by srv.mu
	transmitting bool // has finished the handshake; guarded by srv.mu

	handshake handshakePhase // guarded by srv.handshakes.mu
	// How long the server has waited for the peer during the handshake: waited is the
	// sum of the waits that have ended, in nanoseconds; waitingSince is when the present
	// wait began, in nanoseconds since 1970, 0 if there is none.
	waited, waitingSince atomic.Int64

	view   connView
	denied denied // of the handshake

	meter     *sock.Meter
	timeLeft  time.Duration // rest of HandshakeTimeout
	bytesLeft int64         // rest of MaxHandshakeBytes
	batch     *sock.Batch   // below TLS; nil in the clear
	peeked    byte          // a byte that arrived while an export was being opened
	hasPeeked bool

	stopped chan struct{} // closed by stop

	killed         atomic.Bool   // see kill
	hangsUp        atomic.Bool   // hangUp was called
	hungUp, closed chan struct{} // see hangUp

	mu     sync.Mutex // guards the fields below, and the order of deadline changes
	nc     net.Conn   // the socket or TLS over it
	raw    net.Conn   // the socket
	latest time.Time  // the latest read deadline that may be set; zero: any
	cause  error      // why the connection was killed
	ending bool       // hangUp has begun; only it sets deadlines
	// inFarewell is true while hangUp refuses the last requests, which kill interrupts.
	inFarewell bool
	// inPayload is true while a payload is being read, which stop and wake do not
	// interrupt.
	inPayload bool
}

func newConn(s *Server, nc net.Conn, id string) *conn {
	limits := s.limits.Load()
	c := &conn{
		srv: s, nc: nc, raw: nc,
		peer:     Peer{ID: id, Remote: nc.RemoteAddr()},
		timeLeft: limits.HandshakeTimeout, bytesLeft: limits.MaxHandshakeBytes,
		stopped: make(chan struct{}), hungUp: make(chan struct{}), closed: make(chan struct{}),
		meter: sock.NewMeter(nc),
	}
	if tcp, ok := c.peer.Remote.(*net.TCPAddr); ok {
		c.host = tcp.IP.String()
	}
	c.view.accepted = time.Now()
	c.log = s.log.With("conn", id, "remote", c.peer.Remote.String())
	return c
}

// serve runs the connection from the greeting to its end, and closes it.
func (c *conn) serve(ctx context.Context) error {
	defer c.close()
	c.log.Debug("connected")
	sess, err := c.negotiate(ctx)
	if sess == nil || err != nil {
		err = c.endReason(err)
		c.logHandshakeEnd(err)
		return err
	}
	c.srv.beginTransmission(c)
	var t *transmission
	if err := guard(func() { t = newTransmission(c, sess) }); err != nil {
		c.log.With(stackOf(err)...).Error("transmission cannot begin", "err", err)
		c.close()
		c.closeAfter(sess, err)
		return err
	}
	c.view.transmission.Store(t)
	err = c.endReason(t.run())
	c.closeAfter(sess, err)
	t.logEnd(err)
	return err
}

// closeAfter closes the device of a transmission that ended with err, which is nil
// after NBD_CMD_DISC.
func (c *conn) closeAfter(sess *session, err error) {
	if closer := sess.can.closer; closer != nil {
		c.logCloseError(errorOf(func() error { return closer.CloseWithError(err) }))
		return
	}
	c.closeDevice(sess.device)
}

// closeDevice closes a device that was not used in a transmission phase, or that is no
// ErrorCloser.
func (c *conn) closeDevice(d Device) { c.logCloseError(errorOf(d.Close)) }

// logCloseError logs that a device failed to close. The peer is not told.
func (c *conn) logCloseError(err error) {
	if err != nil {
		c.log.With(stackOf(err)...).Error("cannot close the device", "err", err)
	}
}

// logHandshakeEnd logs that a connection ended in the handshake, unless a refusal of it has
// been logged. At debug level each connection has a line, without a bound.
func (c *conn) logHandshakeEnd(err error) {
	c.logDenied()
	c.log.Debug("handshake ended", "reason", cmp.Or(err, errAborted))
	if err == nil || c.denied.logged {
		return
	}
	args := []any{"reason", err}
	if refusal := c.view.lastError.Load(); refusal != nil {
		args = append(args, "last_refusal", *refusal)
	}
	c.logBounded(slog.LevelInfo, endKind(err), "handshake ended without an export", args...)
}

// endReason returns the reason why the connection ended: the cause of kill, because err is
// then only its consequence, otherwise err. Nil stays nil: after NBD_CMD_DISC the end is
// no error, even if the client did not wait for the last replies.
func (c *conn) endReason(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.cause != nil {
		return c.cause
	}
	return err
}

// rest returns a reader of all that the peer sends in the transmission phase. A byte that
// arrived while the export was being opened comes first.
func (c *conn) rest() io.Reader {
	var r io.Reader = requestReader{c, c.nc}
	if c.hasPeeked {
		c.hasPeeked = false
		r = io.MultiReader(bytes.NewReader([]byte{c.peeked}), r)
	}
	return r
}

// shutdownGrace is how long the server waits for an option of a connection in the
// handshake after Shutdown, to answer it with NBD_REP_ERR_SHUTDOWN.
const shutdownGrace = time.Second

// stop ends the connection in an orderly way: in the handshake the next option is refused,
// in the transmission phase the requests in flight are answered. srv.mu is held.
func (c *conn) stop() {
	if c.isStopped() {
		return
	}
	if c.transmitting {
		close(c.stopped)
		c.wake()
		return
	}
	// Before c.stopped is closed, because a goroutine that waits for that may set an
	// earlier deadline.
	c.readUntil(time.Now().Add(shutdownGrace))
	close(c.stopped)
}

func (c *conn) isStopped() bool {
	select {
	case <-c.stopped:
		return true
	default:
		return false
	}
}

// kill ends the connection at once: all its reads and writes fail from now on. The peer
// sees the end of the connection after the bytes that have been sent. Only the cause of
// the first call is kept.
func (c *conn) kill(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.killed.Store(true)
	if !c.ending || c.inFarewell {
		c.latest = aLongTimeAgo
		c.raw.SetDeadline(aLongTimeAgo)
	}
	c.mu.Unlock()
	if _, ok := c.raw.(halfCloser); !ok {
		c.raw.Close()
	}
	c.hangUp(nil)
}

// close ends the connection after all replies have been sent. It may be called again.
func (c *conn) close() { c.closeAfterFarewell(nil) }

// closeAfterFarewell is close with a farewell, see hangUp. The connection stops counting
// against MaxConns before the peer can notice its end, so a client that connects again at
// once finds a free slot.
func (c *conn) closeAfterFarewell(farewell func()) {
	c.srv.leave(c)
	c.hangUp(farewell)
}

// startTLS starts TLS on the connection. Nothing has been read beyond NBD_OPT_STARTTLS, so
// TLS gets the first byte after it.
func (c *conn) startTLS(ctx context.Context) error {
	if c.hasPeeked {
		return hardDisconnect("the peer sent data before STARTTLS was answered", nil)
	}
	hs := &tlsHandshake{Conn: c.raw, c: c, slots: c.srv.tlsSlots}
	c.batch = sock.NewBatch(hs)
	t := tls.Server(c.batch, c.srv.TLSConfig)
	c.mu.Lock()
	c.nc = t
	c.mu.Unlock()
	if err := hs.run(ctx, t); err != nil {
		return hardDisconnect("TLS handshake failed", err)
	}
	hs.over.Store(true)
	state := t.ConnectionState()
	c.peer.TLS = &state
	c.view.tls.Store(uint32(state.Version))
	return nil
}

// watchPeer returns a context that is done when the peer closes the connection or the
// server stops. It is for the time in which an export is being opened and nothing else
// reads. The caller must call the returned function before the next read.
func (c *conn) watchPeer(ctx context.Context) (context.Context, func()) {
	c.srv.handshakes.beginOpening(c)
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		select {
		case <-c.stopped:
			cancel(ErrServerClosed)
		case <-ctx.Done():
		}
	}()
	c.setReadDeadline(time.Time{})
	go func() {
		defer close(done)
		// A byte that arrives now is the first one of the next option. The client
		// must not send that yet, but keeping it does no harm.
		var b [1]byte
		if c.hasPeeked {
			return
		}
		n, err := c.nc.Read(b[:])
		switch {
		case n == 1:
			c.peeked, c.hasPeeked = b[0], true
		case err != nil && !neterr.IsTimeout(err):
			cancel(errPeerGone)
		}
	}()
	return ctx, func() {
		c.endRead()
		<-done
		cancel(context.Canceled)
		c.srv.handshakes.endOpening(c)
	}
}

// errAborted ends the handshake after NBD_OPT_ABORT.
var errAborted = errors.New("NBD_OPT_ABORT")
