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
// One goroutine reads requests and checks them; each READ is served by a
// goroutine of its own, within the budget, and answered as soon as it is done.
type transmission struct {
	c        *conn
	sess     *session
	in       *bufio.Reader
	out      replyWriter
	inflight *inflight
	stats    stats
}

// stats is what the end of a transmission reports.
type stats struct {
	begin    time.Time
	requests atomic.Int64
	bytes    atomic.Int64 // of data that was read for the peer
	failed   atomic.Int64 // requests that the device failed
}

func newTransmission(c *conn, sess *session) *transmission {
	t := &transmission{
		c: c, sess: sess,
		// Haggling is over, so reading ahead is safe now; a page holds 146
		// requests.
		in:       bufio.NewReaderSize(c.rest(), 4096),
		out:      replyWriter{c: c},
		inflight: newInflight(c.srv),
	}
	t.stats.begin = time.Now()
	c.log.Info("transmission begins", "size", sess.info.Size, "block_size", sess.info.BlockSizes.Min, "tls", c.peer.TLS != nil)
	return t
}

// run serves until the end and returns when nothing of this connection touches
// the device any more. Nil means NBD_CMD_DISC.
func (t *transmission) run() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-t.c.stopped:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := t.serve(ctx)
	t.inflight.drain()
	return err
}

func (t *transmission) serve(ctx context.Context) error {
	for {
		req, err := t.readRequest()
		if err != nil {
			return err
		}
		t.stats.requests.Add(1)
		if req.Command == wire.CmdDisc {
			return nil
		}
		if errno := t.sess.validate(req); errno != wire.Success {
			if err := t.reject(req, errno); err != nil {
				return err
			}
			continue
		}
		if err := t.inflight.begin(ctx, int64(req.Length)); err != nil {
			t.out.sendErrno(req.Cookie, wire.ESHUTDOWN)
			return ErrServerClosed // only stop cancels ctx
		}
		go t.read(req)
	}
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
		b, err := t.in.Peek(wire.RequestLen)
		if err == nil {
			req, err := wire.ParseRequest((*[wire.RequestLen]byte)(b))
			if err != nil {
				return req, hardDisconnect("not a request", err)
			}
			t.in.Discard(wire.RequestLen)
			return req, nil
		}
		switch {
		case t.c.isStopped():
			return wire.Request{}, ErrServerClosed
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

// reject answers a request that will not be served. The payload of a WRITE is
// consumed: it must never be taken for requests.
func (t *transmission) reject(req wire.Request, errno wire.Errno) error {
	t.c.log.Debug("request refused", "cmd", req.Command, "flags", req.Flags, "cookie", req.Cookie,
		"offset", req.Offset, "length", req.Length, "err", errno)
	if req.Command == wire.CmdWrite {
		t.c.setReadDeadline(time.Now().Add(t.c.srv.WriteTimeout))
		if _, err := io.CopyN(io.Discard, t.in, int64(req.Length)); err != nil {
			return hardDisconnect("connection lost inside the payload of a refused NBD_CMD_WRITE", err)
		}
	}
	t.out.sendErrno(req.Cookie, errno)
	return nil
}

// read serves one READ. Only when all bytes are there is it known whether the
// answer is a success; the header is made then, and not before.
func (t *transmission) read(req wire.Request) {
	defer t.inflight.end(int64(req.Length))
	n := int(req.Length)
	b := getBuffer(n)
	defer b.release()
	got, err := t.sess.device.ReadAt(b.payload(n), int64(req.Offset))
	if got < n {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		t.failed(req, err)
		return
	}
	t.stats.bytes.Add(int64(n))
	t.out.sendRead(req.Cookie, b, n)
}

// loggedFailures is how many I/O errors of one connection are logged singly: a
// dying disk must not fill the log.
const loggedFailures = 5

func (t *transmission) failed(req wire.Request, err error) {
	if t.stats.failed.Add(1) <= loggedFailures {
		t.c.log.Error("read failed", "offset", req.Offset, "length", req.Length, "err", err)
	}
	t.out.sendErrno(req.Cookie, errnoOf(err))
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
