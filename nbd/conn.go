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
	"xapi-nbd/nbd/internal/zerocopy"
)

// conn is one accepted connection: its bytes, its deadlines, its end.
//
// One goroutine, the one that runs serve, reads from it. Others may only call
// stop and kill.
type conn struct {
	srv  *Server
	host string // of the peer, "" where that means nothing (unix sockets)
	peer Peer
	log  *slog.Logger

	serving      bool // holds one of MaxConns; guarded by srv.mu
	transmitting bool // has finished negotiation; guarded by srv.mu

	handshake handshakePhase // guarded by srv.handshakes.mu
	// How long the peer has kept the server waiting during the handshake: the
	// waits that have ended, in nanoseconds, and when the present one began, in
	// nanoseconds of the epoch, 0 while there is none.
	waited, waitingSince atomic.Int64

	view   connView
	denied denied // of the handshake

	meter     *sock.Meter
	patience  time.Duration // what is left of HandshakeTimeout
	allowance int64         // what is left of MaxHandshakeBytes
	batch     *sock.Batch   // below TLS; nil in the clear
	peeked    byte          // a byte that arrived while an export was being opened
	hasPeeked bool

	stopped chan struct{} // closed by stop

	killed         atomic.Bool   // see kill
	hangsUp        atomic.Bool   // hangUp was called
	hungUp, closed chan struct{} // see hangUp

	mu     sync.Mutex // guards what follows, and the order of deadline changes
	nc     net.Conn   // what is read and written: the socket or TLS over it
	raw    net.Conn   // the socket
	latest time.Time  // no read deadline may lie behind it; zero: no such limit
	inside bool       // a payload is being read, which stop lets finish
	cause  error      // why the connection was killed
	ending bool       // hangUp has begun, and sets the deadlines
}

func newConn(s *Server, nc net.Conn, id string) *conn {
	limits := s.limits.Load()
	c := &conn{
		srv: s, nc: nc, raw: nc,
		peer:     Peer{ID: id, Remote: nc.RemoteAddr()},
		patience: limits.HandshakeTimeout, allowance: limits.MaxHandshakeBytes,
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

// serve runs the connection from greeting to end, and closes it.
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

// logHandshakeEnd writes the line about a connection that chose no export, unless
// there is one about it already: that of a refusal. At debug level every connection
// has a line, which nothing bounds.
func (c *conn) logHandshakeEnd(err error) {
	c.logDenied()
	c.log.Debug("handshake ended", "reason", cmp.Or(err, errAborted))
	if err == nil || c.denied.logged {
		return
	}
	args := []any{"reason", err}
	if refusal := c.view.trouble.Load(); refusal != nil {
		args = append(args, "last_refusal", *refusal)
	}
	c.logBounded(slog.LevelInfo, endKind(err), "negotiation ended without an export", args...)
}

// endReason prefers why we ended the connection to what that looked like from
// inside. Nil stays nil: a client that has sent NBD_CMD_DISC has left in peace,
// whether it waited for the last replies or not.
func (c *conn) endReason(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.cause != nil {
		return c.cause
	}
	return err
}

// readHandshake fills p with bytes of the handshake. It reads not one byte
// more: what follows may belong to TLS.
func (c *conn) readHandshake(p []byte) error {
	if c.allowance -= int64(len(p)); c.allowance < 0 {
		return hardDisconnect("too many bytes in one handshake", nil)
	}
	if c.hasPeeked && len(p) > 0 {
		p[0], c.hasPeeked = c.peeked, false
		p = p[1:]
	}
	return c.wait(func(deadline time.Time) error {
		c.setReadDeadline(deadline)
		_, err := io.ReadFull(c.nc, p)
		return err
	})
}

// writeHandshake sends b whole. A peer that takes no answers keeps the server
// waiting just like one that says nothing.
func (c *conn) writeHandshake(b []byte) error {
	return c.wait(func(deadline time.Time) error {
		if err := c.setWriteDeadline(deadline); err != nil {
			return err
		}
		_, err := c.nc.Write(b)
		return err
	})
}

// wait does something that waits for the peer during the handshake, and charges
// the time to the handshake timeout.
func (c *conn) wait(do func(deadline time.Time) error) error {
	begin := time.Now()
	c.waitingSince.Store(begin.UnixNano())
	err := do(begin.Add(c.patience))
	c.waitingSince.Store(0)
	took := time.Since(begin)
	c.waited.Add(int64(took))
	c.patience -= took
	switch {
	case !neterr.IsTimeout(err):
		return err
	case c.isStopped():
		return ErrServerClosed
	}
	return hardDisconnect("handshake timeout: the peer kept the server waiting", err)
}

// waitedFor is how long the peer has kept the server waiting during the handshake,
// 0 if the server does not wait for it now. It may be called by any goroutine.
func (c *conn) waitedFor(now time.Time) time.Duration {
	since := c.waitingSince.Load()
	if since == 0 {
		return 0
	}
	return time.Duration(c.waited.Load() + now.UnixNano() - since)
}

// rest is what the peer sends from here on, for the transmission phase. A byte
// that came while the export was being opened is the first of it.
func (c *conn) rest() io.Reader {
	var r io.Reader = requestReader{c, c.nc}
	if c.hasPeeked {
		c.hasPeeked = false
		r = io.MultiReader(bytes.NewReader([]byte{c.peeked}), r)
	}
	return r
}

// transferTime is how long a peer may take for n bytes: WriteTimeout, and more
// for more bytes.
func (c *conn) transferTime(n int64) time.Duration {
	const slowestRate = 256 << 10 // bytes per second
	return c.srv.limits.Load().WriteTimeout + time.Duration(n/slowestRate)*time.Second
}

// tlsRecord is the most data that one record of TLS holds, in bytes.
const tlsRecord = 16 << 10

// write sends b whole.
func (c *conn) write(b []byte) error {
	return c.sending(int64(len(b)), func() error {
		if c.batch == nil || len(b) <= tlsRecord {
			_, err := c.nc.Write(b)
			return err
		}
		c.batch.Begin()
		_, err := c.nc.Write(b)
		return errors.Join(err, c.batch.End())
	})
}

// writePieces sends several pieces of one message, whole. It empties pieces.
func (c *conn) writePieces(pieces *net.Buffers) error {
	n := 0
	for _, p := range *pieces {
		n += len(p)
	}
	return c.sending(int64(n), func() error {
		if c.batch == nil {
			_, err := pieces.WriteTo(c.nc) // writev(2)
			return err
		}
		c.batch.Begin()
		_, err := pieces.WriteTo(c.nc)
		return errors.Join(err, c.batch.End())
	})
}

// writeSpliced sends a header and the data in pipes.
func (c *conn) writeSpliced(s *zerocopy.Sender, header []byte, data *zerocopy.Pipes) error {
	return c.sending(int64(data.Len()), func() error { return s.Send(header, data) })
}

// sending runs send, which sends n bytes, with a time limit.
func (c *conn) sending(n int64, send func() error) error {
	if err := c.setWriteDeadline(time.Now().Add(c.transferTime(n))); err != nil {
		return err
	}
	if err := send(); err != nil {
		if neterr.IsTimeout(err) {
			return hardDisconnect("the peer does not take its replies", err)
		}
		return err
	}
	// TLS may write while it reads, long after this. That it fails when the peer
	// has just left does not mean that nothing was sent.
	_ = c.setWriteDeadline(time.Time{})
	return nil
}

// setWriteDeadline sets when writes give up. Zero means never.
func (c *conn) setWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.killed.Load():
		return net.ErrClosed
	case c.ending:
		return nil
	}
	return c.nc.SetWriteDeadline(t)
}

// endRead ends a read that is under way, and leaves those to come alone.
func (c *conn) endRead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending {
		c.nc.SetReadDeadline(aLongTimeAgo)
	}
}

// setReadDeadline sets when reads give up, but never behind what stop allows.
// Zero means never.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.latest.IsZero() && (t.IsZero() || t.After(c.latest)) {
		t = c.latest
	}
	if !c.ending {
		c.nc.SetReadDeadline(t)
	}
}

// aLongTimeAgo ends a read that is under way.
var aLongTimeAgo = time.Unix(1, 0)

// shutdownPatience is how long a peer that is still haggling at shutdown may
// take to send an option and be told so.
const shutdownPatience = time.Second

// stop asks the connection to end at the next sensible point: a haggling peer
// is refused, a served one gets the replies that it is owed. srv.mu is held.
func (c *conn) stop() {
	if c.isStopped() {
		return
	}
	if c.transmitting {
		close(c.stopped)
		c.wake()
		return
	}
	// Before the end is known: who hears of it may end the reading at once.
	c.readUntil(time.Now().Add(shutdownPatience))
	close(c.stopped)
}

// wake ends the wait for a request that is under way and those to come.
func (c *conn) wake() { c.readUntil(aLongTimeAgo) }

// readUntil lets no read but that of a payload wait longer than until t.
func (c *conn) readUntil(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.latest = t
	if !c.inside && !c.ending {
		c.nc.SetReadDeadline(t)
	}
}

// readPayload runs read, which reads n bytes that belong to a request. Stopping
// and wake wait for them: the request is owed an answer.
func (c *conn) readPayload(n int64, read func() error) error {
	c.setInside(true, time.Now().Add(c.transferTime(n)))
	err := read()
	c.setInside(false, time.Time{})
	return err
}

// setInside notes whether a payload is being read; the deadline is for that.
func (c *conn) setInside(inside bool, deadline time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inside = inside
	if c.killed.Load() {
		deadline = aLongTimeAgo
	}
	if !c.ending {
		c.nc.SetReadDeadline(deadline)
	}
}

func (c *conn) isStopped() bool {
	select {
	case <-c.stopped:
		return true
	default:
		return false
	}
}

// kill cuts the connection: every read and write of it fails from now on, the peer
// sees the end of the connection behind what has been sent.
func (c *conn) kill(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.killed.Store(true)
	if !c.ending {
		c.latest = aLongTimeAgo
		c.raw.SetDeadline(aLongTimeAgo) // wakes those who wait
	}
	c.mu.Unlock()
	if _, ok := c.raw.(halfCloser); !ok {
		c.raw.Close()
	}
	c.hangUp()
}

// close ends the connection when all replies have been sent. It may be called again.
// The connection no longer counts against MaxConns when the peer sees the end: a
// client that connects again at once finds a free slot.
func (c *conn) close() {
	c.srv.leave(c)
	c.hangUp()
}

// startTLS puts TLS over the socket. Everything before it was read to the
// byte, so the first byte that TLS sees is the first one behind STARTTLS.
func (c *conn) startTLS(ctx context.Context) error {
	if c.hasPeeked {
		return hardDisconnect("the peer sent data before STARTTLS was answered", nil)
	}
	hs := &tlsHandshake{Conn: c.raw, c: c, turns: c.srv.tlsTurns}
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

// watchPeer returns a context that ends when the peer hangs up or the server
// stops, for the time in which nothing is read because an export is being
// opened. The stop function must be called before the next read.
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
		// A byte that comes now is the next option's first: a client may not
		// send it yet, but it does no harm to keep it.
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

// errAborted ends the haggling after NBD_OPT_ABORT.
var errAborted = errors.New("NBD_OPT_ABORT")
