package nbd

import (
	"errors"
	"io"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// readRequest reads the next request, and waits for it within the idle limits.
func (t *transmission) readRequest() (wire.Request, error) {
	limits := t.c.srv.limits.Load()
	limit, what := limits.IdleTimeout, "idle: no request"
	if t.stats.requests.Load() == 0 {
		limit, what = limits.FirstRequestTimeout, "negotiated, but not a single request"
	}
	begin := time.Now()
	for {
		t.setIdleDeadline(t.inflight.idleSince(begin).Add(limit), limit)
		b, err := t.in.Peek(t.requestLen())
		if err == nil {
			req, err := t.parseRequest(b)
			if err != nil {
				return req, hardDisconnect("not a request", err)
			}
			t.in.Discard(len(b))
			return req, nil
		}
		t.deadline = time.Time{}
		switch {
		case t.ended() != nil:
			return wire.Request{}, serverEnd{t.ended()}
		case !neterr.IsTimeout(err):
			if errors.Is(err, io.EOF) && len(b) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return wire.Request{}, hardDisconnect("connection lost without NBD_CMD_DISC", err)
		case !time.Now().Before(t.inflight.idleSince(begin).Add(limit)):
			return wire.Request{}, serverEnd{hardDisconnect(what+" within "+limit.String(), err)}
		}
		// A request is in flight, or has ended since: the connection is not idle for
		// that long.
	}
}

// setIdleDeadline sets the read deadline for the wait for a request. A deadline that is set
// already is kept if it is earlier by less than half of the limit, because setting it for
// each request would cost more than parsing the request. readRequest sets a new one then.
func (t *transmission) setIdleDeadline(at time.Time, limit time.Duration) {
	if !t.deadline.IsZero() && !t.deadline.After(at) && at.Sub(t.deadline) < limit/2 {
		return
	}
	t.deadline = at
	t.c.setReadDeadline(at)
}

// requestLen returns the length of a request without its payload, in bytes.
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

// maxDrained is the longest payload of a refused request that is read and dropped. Longer
// ones are possible only with extended headers, and no client sends them.
const maxDrained = 1 << 32

// reject refuses a request. It reads and drops the payload, which must not be parsed as
// requests.
func (t *transmission) reject(req wire.Request, errno wire.Errno) error {
	t.c.log.Debug("request refused", "cmd", req.Command, "flags", req.Flags, "cookie", req.Cookie,
		"offset", req.Offset, "length", req.Length, "err", errno)
	n := t.sess.payloadLength(req)
	if n > maxDrained {
		return hardDisconnect("the payload of a request is too long", nil)
	}
	if n > 0 {
		t.deadline = time.Time{}
		err := t.c.readPayload(int64(n), func() error {
			_, err := io.CopyN(io.Discard, t.in, int64(n))
			return err
		})
		if err != nil {
			return hardDisconnect("connection lost inside the payload of a refused request", err)
		}
	}
	t.refuse(req, errno)
	return nil
}

// refuse sends an error that is not one of the device, and counts it.
func (t *transmission) refuse(req wire.Request, errno wire.Errno) {
	t.stats.refused.Add(1)
	t.out.sendResult(req, errno)
}
