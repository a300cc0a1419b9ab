package nbd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/wire"
)

// transmission serves the requests of one connection until it ends, section
// "Transmission phase".
//
// One goroutine reads requests and checks them; each is served by a goroutine of
// its own, within the budget, and answered as soon as it is done.
type transmission struct {
	c        *conn
	sess     *session
	in       *bufio.Reader
	out      replyWriter
	inflight *inflight
	lifetime context.Context // of the device
	stats    stats
}

// stats is what the end of a transmission reports.
type stats struct {
	begin    time.Time
	requests atomic.Int64
	bytes    atomic.Int64 // of data that was read or written for the peer
	failed   atomic.Int64 // requests that the device failed
}

func newTransmission(c *conn, sess *session) *transmission {
	t := &transmission{
		c: c, sess: sess,
		// Haggling is over, so reading ahead is safe now; a page holds 146
		// requests.
		in:       bufio.NewReaderSize(c.rest(), 4096),
		out:      replyWriter{c: c, mode: sess.mode},
		inflight: newInflight(c.srv),
		lifetime: context.Background(),
	}
	if sess.can.mortal != nil {
		t.lifetime = sess.can.mortal.Lifetime()
	}
	t.stats.begin = time.Now()
	c.log.Info("transmission begins", "size", sess.info.Size, "block_size", sess.info.BlockSizes.Min, "tls", c.peer.TLS != nil)
	return t
}

// run serves until the end and closes the connection. When it returns, nothing
// of it touches the device any more. Nil means NBD_CMD_DISC.
func (t *transmission) run() error {
	// Made from the lifetime, so that not one request begins after its end.
	ctx, cancel := context.WithCancel(t.lifetime)
	defer cancel()
	over := make(chan struct{})
	defer close(over)
	go t.watch(cancel, over)
	// The client need not wait for what closing the device takes.
	defer t.c.close()
	err := t.serve(ctx)
	t.inflight.drain()
	return err
}

// endPatience is how long the replies that are owed may take once the device
// has ended: whoever ended it wants it closed.
const endPatience = time.Second

// watch brings the end when the server stops or the device ends. A server that
// stops wakes the reader itself and waits for the requests in flight, during
// which the device may end too. The end of run ends it.
func (t *transmission) watch(cancel context.CancelFunc, over <-chan struct{}) {
	select {
	case <-t.c.stopped:
		cancel()
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
	case <-time.After(endPatience):
		t.c.kill(t.ended())
	case <-over:
	}
}

// ended is why no request may begin any more, nil while they may.
func (t *transmission) ended() error {
	switch {
	case t.lifetime.Err() != nil:
		return hardDisconnect("the device has ended", context.Cause(t.lifetime))
	case t.c.isStopped():
		return ErrServerClosed
	}
	return nil
}

func (t *transmission) serve(ctx context.Context) error {
	for {
		req, err := t.readRequest()
		if err != nil {
			return err
		}
		t.stats.requests.Add(1)
		if disconnects(req) {
			return nil
		}
		if errno := t.validate(req); errno != wire.Success {
			if err := t.reject(req, errno); err != nil {
				return err
			}
			continue
		}
		if err := t.begin(ctx, req); err != nil {
			return err
		}
	}
}

// validate checks a request and the payload that it announces.
func (t *transmission) validate(req wire.Request) wire.Errno {
	errno := t.sess.validate(req)
	if errno == wire.Success && !commands[req.Command].moves && t.sess.payloadLength(req) > maxFilter {
		return wire.EINVAL
	}
	return errno
}

// begin starts to serve a valid request, when the budget allows. The payload is
// read here, by the reader; everything else happens in a goroutine.
func (t *transmission) begin(ctx context.Context, req wire.Request) error {
	c := commands[req.Command]
	budget := int64(t.sess.payloadLength(req))
	if c.moves {
		budget = int64(req.Length)
	}
	if err := t.inflight.begin(ctx, budget); err != nil {
		t.out.sendResult(req, wire.ESHUTDOWN)
		return t.ended()
	}
	var b *buffer
	var payload []byte
	if n := int(t.sess.payloadLength(req)); n > 0 {
		b = getBuffer(n)
		payload = b.payload(n)
		err := t.c.readPayload(int64(n), func() error {
			_, err := io.ReadFull(t.in, payload)
			return err
		})
		if err != nil {
			b.release()
			t.inflight.end(budget)
			return hardDisconnect("connection lost inside a payload", err)
		}
	}
	go func() {
		defer t.inflight.end(budget)
		t.handle(c, req, payload)
		if b != nil {
			b.release()
		}
	}()
	return nil
}

func (t *transmission) handle(c *command, req wire.Request, payload []byte) {
	if c.answer != nil {
		c.answer(t, req, payload)
		return
	}
	if err := c.do(t, req, payload); err != nil {
		t.failed(req, err)
		return
	}
	t.out.sendResult(req, wire.Success)
}

// readRequest reads the next request, however long the peer takes within the
// idle limits.
func (t *transmission) readRequest() (wire.Request, error) {
	limit, what := t.c.srv.IdleTimeout, "idle: no request"
	if t.stats.requests.Load() == 0 {
		limit, what = t.c.srv.FirstRequestTimeout, "negotiated, but not a single request"
	}
	begin := time.Now()
	for {
		idleSince := t.inflight.idleSince(begin)
		t.c.setReadDeadline(idleSince.Add(limit))
		b, err := t.in.Peek(t.requestLen())
		if err == nil {
			req, err := t.parseRequest(b)
			if err != nil {
				return req, hardDisconnect("not a request", err)
			}
			t.in.Discard(len(b))
			return req, nil
		}
		ended := t.ended()
		switch {
		case ended != nil:
			return wire.Request{}, ended
		case !isTimeout(err):
			if errors.Is(err, io.EOF) && len(b) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return wire.Request{}, hardDisconnect("connection lost without NBD_CMD_DISC", err)
		case !time.Now().Before(t.inflight.idleSince(begin).Add(limit)):
			return wire.Request{}, hardDisconnect(what+" within "+limit.String(), err)
		}
		// Something is under way, or has ended since: not idle for that long.
	}
}

// requestLen is the length of a request without its payload in bytes.
func (t *transmission) requestLen() int {
	if t.sess.mode == extendedHeaders {
		return wire.ExtendedRequestLen
	}
	return wire.RequestLen
}

func (t *transmission) parseRequest(b []byte) (wire.Request, error) {
	if t.sess.mode == extendedHeaders {
		return wire.ParseExtendedRequest((*[wire.ExtendedRequestLen]byte)(b))
	}
	return wire.ParseRequest((*[wire.RequestLen]byte)(b))
}

// maxDrained is the longest payload of a refused request that is consumed to
// stay in step. More cannot be announced without extended headers, and nobody
// sends it in earnest.
const maxDrained = 1 << 32

// reject answers a request that will not be served. Its payload is consumed: it
// must never be taken for requests.
func (t *transmission) reject(req wire.Request, errno wire.Errno) error {
	t.c.log.Debug("request refused", "cmd", req.Command, "flags", req.Flags, "cookie", req.Cookie,
		"offset", req.Offset, "length", req.Length, "err", errno)
	n := t.sess.payloadLength(req)
	if n > maxDrained {
		return hardDisconnect("a payload of absurd length", nil)
	}
	if n > 0 {
		err := t.c.readPayload(int64(n), func() error {
			_, err := io.CopyN(io.Discard, t.in, int64(n))
			return err
		})
		if err != nil {
			return hardDisconnect("connection lost inside the payload of a refused request", err)
		}
	}
	t.out.sendResult(req, errno)
	return nil
}

// loggedFailures is how many I/O errors of one connection are logged singly: a
// dying disk must not fill the log.
const loggedFailures = 5

func (t *transmission) failed(req wire.Request, err error) {
	if t.stats.failed.Add(1) <= loggedFailures {
		t.c.log.Error("request failed", "cmd", req.Command, "offset", req.Offset, "length", req.Length, "err", err)
	}
	t.out.sendResult(req, errnoFor(req, err))
}

// logEnd writes the one line that tells how a transmission went.
func (t *transmission) logEnd(err error) {
	reason := "NBD_CMD_DISC"
	if err != nil {
		reason = err.Error()
	}
	t.c.log.Info("transmission ended", "reason", reason,
		"requests", t.stats.requests.Load(), "bytes", t.stats.bytes.Load(), "failed", t.stats.failed.Load(),
		"duration", time.Since(t.stats.begin).Round(time.Millisecond).String())
}
