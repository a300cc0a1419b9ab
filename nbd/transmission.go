package nbd

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/internal/sock"
	"xapi-nbd/nbd/internal/zerocopy"
	"xapi-nbd/nbd/wire"
)

// transmission serves the requests of one connection until it ends, section
// "Transmission phase".
//
// The goroutine that holds the read token reads requests and checks them. It also serves
// reads that are expected to be fast (see readToken). Every other request is served in a
// goroutine of its own, within the budget, and answered when it is done.
type transmission struct {
	c        *conn
	sess     *session
	in       *bufio.Reader // owned by the holder of token
	token    readToken
	unread   *sock.Unread // nil if the connection is no socket; owned by the holder of token
	deadline time.Time    // the read deadline that is set; owned by the holder of token
	zeroes   zeroSampler
	out      replyWriter
	inflight *inflight
	lifetime context.Context         // done when the device is revoked
	revoke   context.CancelCauseFunc // ends lifetime, with a cause
	ctx      context.Context         // done when no further request may begin
	cancel   func()                  // ends ctx
	over     chan ending             // gets how the reading of requests ended
	stats    stats
	// readTimer measures how long the device takes for reads.
	readTimer readTimer
	// readRequestsFunc is t.readRequests. It is made once, because each go statement
	// with a method would allocate.
	readRequestsFunc func()
	export           string // canonical name, see ConnStatus
}

// stuckReason is the reason when byteBudget.stuck ends a connection.
var stuckReason = "the peer neither acknowledged nor sent a byte for " + stuckAfter.String() + " while others lacked the memory that its requests hold"

// stats are the counters of a transmission, which are logged at its end.
type stats struct {
	begin    time.Time
	requests atomic.Int64
	bytes    atomic.Int64 // bytes of data read or written for the peer
	written  atomic.Int64 // those of bytes that were written
	position position
	failed   atomic.Int64 // requests that failed because the device failed
	refused  atomic.Int64 // requests that were refused without calling the device
}

func newTransmission(c *conn, sess *session) *transmission {
	t := &transmission{
		c: c, sess: sess,
		// After the handshake it is safe to read ahead. 4096 bytes hold 146 requests.
		in:     bufio.NewReaderSize(c.rest(), 4096),
		out:    replyWriter{c: c, mode: sess.mode, sender: newSender(c, sess.can), sending: newSendLock()},
		unread: sock.NewUnread(c.raw),
		over:   make(chan ending, 1),
		export: canonicalName(sess.device),
	}
	lifetime := context.Background()
	if sess.can.revocable != nil {
		if ctx := sess.can.revocable.Lifetime(); ctx != nil {
			lifetime = ctx
		}
	}
	t.lifetime, t.revoke = context.WithCancelCause(lifetime)
	t.ctx, t.cancel = context.WithCancel(t.lifetime)
	t.inflight = newInflight(c.srv.budget, c.srv.limits.Load().MaxInflight, cmp.Or(t.export, sess.exportName), c.meter, func() { c.kill(hardDisconnect(stuckReason, nil)) })
	t.readRequestsFunc = t.readRequests
	t.stats.begin = time.Now()
	t.readTimer.base = t.stats.begin
	c.log.Info("transmission begins", "export", t.export, "size", sess.info.Size, "block_size", sess.info.BlockSizes.Min, "tls", c.peer.TLS != nil)
	return t
}

// run serves requests until the transmission ends, and starts to close the connection.
// When it returns, no call of the device is running, except for its Close. It returns nil
// after NBD_CMD_DISC.
func (t *transmission) run() error {
	defer t.revoke(nil)
	over := make(chan struct{})
	defer close(over)
	go t.watch(over)
	t.c.srv.stalls.add(t)
	t.readRequests()
	e := <-t.over
	last := t.c.srv.stalls.remove(t)
	t.inflight.drain()
	if last {
		zerocopy.CloseIdle() // a server without connections needs no pipes
	}
	// Before the device is closed, which may take long: the client need not wait for it.
	t.c.closeAfterFarewell(t.farewell(e))
	return e.err
}

// revokeGrace is how long the server waits for the replies to the requests in flight after
// the device was revoked.
const revokeGrace = time.Second

// watch ends the transmission when the server stops or the device is revoked. conn.stop
// interrupts the reader of requests itself; while the requests in flight are being
// answered the device may be revoked too. watch returns when over is closed.
func (t *transmission) watch(over <-chan struct{}) {
	select {
	case <-t.c.stopped:
		t.cancel()
		select {
		case <-t.lifetime.Done():
		case <-over:
			return
		}
	case <-t.lifetime.Done():
	case <-over:
		return
	}
	t.c.wake()
	select {
	case <-time.After(revokeGrace):
		t.c.kill(t.ended())
	case <-over:
	}
}

// ended returns the reason why no further request may begin, nil if requests may begin.
func (t *transmission) ended() error {
	switch {
	case t.lifetime.Err() != nil:
		cause := context.Cause(t.lifetime)
		if errors.Is(cause, errByAdministrator) {
			return cause
		}
		return hardDisconnect("the device has ended", cause)
	case t.c.isStopped():
		return ErrServerClosed
	}
	return nil
}

// readRequests reads requests, and serves them or starts goroutines that do, until the
// transmission ends or the stall monitor has given the read token to another goroutine.
func (t *transmission) readRequests() {
	for {
		mine, err := t.next()
		if err != nil {
			t.cancel() // the remaining replies need not be paced
			t.over <- endingOf(err)
			return
		}
		if !mine {
			return
		}
	}
}

// errDisconnected ends the reading of requests after NBD_CMD_DISC.
var errDisconnected = errors.New("NBD_CMD_DISC")

// next reads one request, and serves it or starts a goroutine that does. mine is false if
// another goroutine has the read token now; the caller must then not use t any more.
func (t *transmission) next() (mine bool, err error) {
	req, err := t.readRequest()
	if err != nil {
		return false, err
	}
	t.stats.requests.Add(1)
	if disconnects(req) {
		return false, errDisconnected
	}
	if errno := t.validate(req); errno != wire.Success {
		return true, t.reject(req, errno)
	}
	return t.begin(req)
}

// beginBlocking marks the beginning of a call that may block the holder of the read
// token; token.end ends it. The stall monitor is woken after the mark is set: if it
// looked before, it would see no request, and might stop.
func (t *transmission) beginBlocking(in blockedIn) uint64 {
	n := t.token.begin(in)
	t.c.srv.stalls.wake()
	return n
}

// hasRequest reports whether a whole request, without its payload, has arrived.
// Only the holder of the read token may call it.
func (t *transmission) hasRequest() bool { return t.in.Buffered() >= t.requestLen() }

// validate checks a request and the payload that it announces.
func (t *transmission) validate(req wire.Request) wire.Errno {
	errno := t.sess.validate(req)
	if errno == wire.Success && !commands[req.Command].moves && t.sess.payloadLength(req) > maxFilter {
		return wire.EINVAL
	}
	return errno
}

// begin waits until the budget allows a valid request, reads its payload, and serves it or
// starts a goroutine that does.
func (t *transmission) begin(req wire.Request) (mine bool, err error) {
	c := commands[req.Command]
	bytes, waitsFor := t.memoryFor(c, req)
	g, granted := t.inflight.tryBegin(bytes, waitsFor)
	if !granted {
		var err error
		if g, err = t.inflight.begin(t.ctx, bytes, waitsFor); err != nil {
			return false, t.endBefore(req)
		}
	} else if t.ctx.Err() != nil {
		t.inflight.end(g)
		return false, t.endBefore(req)
	}
	switch {
	case c == cmdRead && g.memory == inPieces:
		go t.readInPieces(req, g)
		return true, nil
	case c == cmdRead:
		return t.beginRead(req, g), nil
	case g.memory == inPieces: // a WRITE: all other payloads fit into the reserve
		return true, t.writeInPieces(req, g)
	}
	b, payload, err := t.readRequestPayload(req)
	if err != nil {
		t.inflight.end(g)
		return false, err
	}
	go t.serve(c, req, g, b, payload)
	return true, nil
}

// endBefore ends the reading of requests after one that may not begin any more. It is
// answered only if later ones would be, see the rule for ends. ctx is done, so the server
// has decided the end.
func (t *transmission) endBefore(req wire.Request) error {
	if t.sess.mode != simpleReplies {
		return t.ended()
	}
	if err := t.reject(req, wire.ESHUTDOWN); err != nil {
		return err
	}
	return serverEnd{t.ended()}
}

// memoryFor returns how much memory a request needs, in bytes, and what it waits for first.
func (t *transmission) memoryFor(c *command, req wire.Request) (bytes int64, waitsFor phase) {
	switch {
	case c == cmdRead:
		return int64(req.Length), atDevice
	case c == cmdBlockStatus && (t.sess.can.extenter != nil || t.sess.can.contexter != nil):
		return extentsMemory, atDevice
	}
	return int64(t.sess.payloadLength(req)), withPeer
}

// serve serves a request whose payload has been read into b. b is nil if there is no
// payload.
func (t *transmission) serve(c *command, req wire.Request, g grant, b *buffer, payload []byte) {
	t.inflight.move(&g, atDevice)
	if c.answer != nil {
		if err := guard(func() { c.answer(t, req, payload) }); err != nil {
			t.failed(req, err)
		}
	} else {
		err := errorOf(func() error { return c.do(t, req, payload) })
		t.inflight.move(&g, withPeer)
		t.answer(req, err)
	}
	if b != nil {
		b.release()
	}
	t.inflight.end(g)
}

// readRequestPayload reads the payload of a request. The caller must release the buffer,
// which is nil if there is no payload.
func (t *transmission) readRequestPayload(req wire.Request) (*buffer, []byte, error) {
	n := int(t.sess.payloadLength(req))
	if n == 0 {
		return nil, nil, nil
	}
	b := getBuffer(n)
	payload := b.payload(n)
	if err := t.receive(payload); err != nil {
		b.release()
		return nil, nil, err
	}
	t.c.meter.Add(int64(n))
	return b, payload, nil
}

// answer sends the reply to a request whose reply has no data.
func (t *transmission) answer(req wire.Request, err error) {
	if err != nil {
		t.failed(req, err)
		return
	}
	t.out.sendResult(req, wire.Success)
}

// loggedFailures is how many I/O errors of one connection are logged: a failing disk must
// not fill the log.
const loggedFailures = 5

// failed answers a request that the device failed.
func (t *transmission) failed(req wire.Request, err error) {
	t.noteFailure(req, err)
	t.out.sendResult(req, errnoFor(req, err))
}

// noteFailure counts and logs that the device failed a request.
func (t *transmission) noteFailure(req wire.Request, err error) {
	t.c.setLastError(req.Command.String() + ": " + err.Error())
	if t.stats.failed.Add(1) <= loggedFailures {
		t.c.log.With(stackOf(err)...).Error("request failed", "cmd", req.Command, "offset", req.Offset, "length", req.Length, "err", err)
	}
}

// logEnd logs the end of the transmission and its counters.
func (t *transmission) logEnd(err error) {
	reason := "NBD_CMD_DISC"
	if err != nil {
		reason = err.Error()
	}
	t.c.srv.view.ends.add(endKind(err))
	duration := time.Since(t.stats.begin)
	t.c.log.Info("transmission ended", "reason", reason, "export", t.export,
		"requests", t.stats.requests.Load(), "bytes", t.stats.bytes.Load(), "failed", t.stats.failed.Load(), "refused", t.stats.refused.Load(),
		"duration", duration.Round(time.Millisecond).String(), "rate", rateText(t.stats.bytes.Load(), duration))
}

// rateText returns the average rate of a transfer of n bytes, for people.
func rateText(n int64, took time.Duration) string {
	return fmt.Sprintf("%.1f MiB/s", float64(n)/(1<<20)/max(took.Seconds(), 1e-9))
}
