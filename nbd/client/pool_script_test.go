package client

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
)

// scriptedPool returns a Pool of one connection, which has a conversation with a script, and
// when it is made again with the next one.
func scriptedPool(t *testing.T, talks ...func(s *script)) *Pool {
	t.Helper()
	p, err := NewPool(t.Context(), PoolConfig{RetryFor: time.Hour, Open: func(ctx context.Context) (*Conn, error) {
		if len(talks) == 0 {
			return nil, ErrUnsupported // ends the attempts
		}
		talk := talks[0]
		talks = talks[1:]
		c, err := New(ctx, against(t, func(s *script) {
			s.transmission()
			talk(s)
		}), &Config{NoStructured: true})
		if err != nil {
			return nil, err
		}
		return c.Go(ctx, "a")
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// answer answers one read with the pattern.
func (s *script) answer() {
	r := s.request()
	s.send(simpleReply(wire.Success, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...))
}

// TestPoolServerShutsDown: a server that announces its end is a lost connection, also for the
// request that it answers so.
func TestPoolServerShutsDown(t *testing.T) {
	p := scriptedPool(t, func(s *script) {
		s.send(simpleReply(wire.ESHUTDOWN, s.request().Cookie))
		s.discard()
	}, func(s *script) {
		s.answer()
		s.discard()
	})
	got := make([]byte, 16)
	if err := p.Read(t.Context(), got, 512); err != nil || !bytes.Equal(got, patternOf(512, 16)) {
		t.Errorf("error %v, or wrong data", err)
	}
	if p.Losses() != 1 {
		t.Errorf("%d losses, want 1", p.Losses())
	}
}

// TestPoolErrorBeforeALoss: a server that answers a request with an error and closes the
// connection right after it is a lost connection, and the error is that of the request alone.
func TestPoolErrorBeforeALoss(t *testing.T) {
	p := scriptedPool(t, func(s *script) {
		s.send(simpleReply(wire.EINVAL, s.request().Cookie))
	}, func(s *script) {
		s.answer()
		s.discard()
	})
	err := p.do(t.Context(), func(c *Conn) error {
		err := c.Read(t.Context(), make([]byte, 16), 0)
		<-c.Done()
		return err
	})
	if !errors.Is(err, wire.EINVAL) {
		t.Errorf("got error %v, want that of the request", err)
	}
	if p.Losses() != 1 || p.Err() != nil {
		t.Errorf("%d losses, error of the pool %v; want 1 and none", p.Losses(), p.Err())
	}
	got := make([]byte, 16)
	if err := p.Read(t.Context(), got, 512); err != nil || !bytes.Equal(got, patternOf(512, 16)) {
		t.Errorf("the next request: error %v, or wrong data", err)
	}
}

// TestPoolEndsWithViolations: a server that violates the protocol is not asked again.
func TestPoolEndsWithViolations(t *testing.T) {
	p := scriptedPool(t, func(s *script) {
		s.request()
		s.send(bytes.Repeat([]byte("?"), wire.SimpleReplyLen))
		s.discard()
	}, func(s *script) {
		s.answer()
		s.discard()
	})
	err := p.Read(t.Context(), make([]byte, 16), 0)
	if err == nil || !strings.Contains(err.Error(), "magic") || p.Losses() != 0 {
		t.Errorf("got error %v after %d losses", err, p.Losses())
	}
	if again := p.Read(t.Context(), make([]byte, 16), 0); !errors.Is(again, err) {
		t.Errorf("then: got error %v, want %v", again, err)
	}
}
