package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

var withProgressTimeout = &Config{ProgressTimeout: time.Minute}

// A server that stops anywhere makes the client end the connection with an error that says
// where.
func TestConnWithoutProgress(t *testing.T) {
	read := func(c *Conn) error { return c.Read(context.Background(), make([]byte, 4096), 512) }
	flush := func(c *Conn) error { return c.Flush(context.Background()) }
	tests := []struct {
		name  string
		serve func(s *script, mode replyMode, over <-chan struct{})
		call  func(c *Conn) error
		after time.Duration
		want  string
	}{
		{"never answers", func(s *script, _ replyMode, _ <-chan struct{}) { s.discard() }, read, time.Minute, "no reply to NBD_CMD_READ of 4096 bytes at 512 (1 request outstanding)"},
		{"does not end a chunk", func(s *script, mode replyMode, _ <-chan struct{}) {
			b := chunk(mode, s.requestIn(mode), done, wire.ChunkOffsetData, dataAt(512, 4096))
			s.send(b[:len(b)-1])
			s.discard()
		}, read, time.Minute, "the reply to NBD_CMD_READ of 4096 bytes at 512 has begun and does not end"},
		{"does not end a reply", func(s *script, mode replyMode, _ <-chan struct{}) {
			s.send(chunk(mode, s.requestIn(mode), 0, wire.ChunkOffsetData, dataAt(512, 4096)))
			s.discard()
		}, read, time.Minute, "has begun and does not end"},
		{"does not read", func(_ *script, _ replyMode, over <-chan struct{}) { <-over },
			func(c *Conn) error { return c.Write(context.Background(), make([]byte, 1<<20), 0, false) },
			time.Minute, "the server does not read NBD_CMD_WRITE of 1048576 bytes at 0"},
		{"never answers a flush", func(s *script, _ replyMode, _ <-chan struct{}) { s.discard() }, flush, 10 * time.Minute, "no reply to NBD_CMD_FLUSH (1"},
		{"never answers a zeroing", func(s *script, _ replyMode, _ <-chan struct{}) { s.discard() },
			func(c *Conn) error { return c.WriteZeroes(context.Background(), 0, 1<<20, ZeroOptions{}) }, 10 * time.Minute, "no reply to NBD_CMD_WRITE_ZEROES of 1048576 bytes at 0"},
		{"never answers a trim", func(s *script, _ replyMode, _ <-chan struct{}) { s.discard() },
			func(c *Conn) error { return c.Trim(context.Background(), 0, 1<<20, false) }, 10 * time.Minute, "no reply to NBD_CMD_TRIM of 1048576 bytes at 0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					over := make(chan struct{})
					defer close(over)
					conn := connWith(t, against(t, func(s *script) {
						s.exports(t, mode, mebibyte)
						tt.serve(s, mode, over)
					}), "a", withProgressTimeout)
					begin := time.Now()
					err := tt.call(conn)
					var stall *StallError
					if !errors.As(err, &stall) || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("got error %v, want a StallError that says %q", err, tt.want)
					}
					if took := time.Since(begin); took != tt.after {
						t.Errorf("after %v, want %v", took, tt.after)
					}
					if err := read(conn); !errors.As(err, &stall) {
						t.Errorf("the next call: got error %v", err)
					}
				})
			})
		})
	}
}

// Slow progress does not end the connection, and neither does idle time without requests.
func TestConnWithSlowProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100
		const pause = 59 * time.Second
		payload := patternOf(0, 4*sendPiece)
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			answer := chunk(structuredReplies, s.request(), done, wire.ChunkOffsetData, dataAt(0, n))
			for _, b := range answer {
				time.Sleep(pause)
				s.send([]byte{b})
			}
			r := s.request()
			var got []byte
			for len(got) < len(payload) {
				time.Sleep(pause)
				got = append(got, s.receive(sendPiece)...)
			}
			if !bytes.Equal(got, payload) {
				t.Error("the server got wrong data")
			}
			s.send(chunk(structuredReplies, r, done, wire.ChunkNone, nil))
			s.send(chunk(structuredReplies, s.request(), done, wire.ChunkNone, nil))
			s.discard()
		}), "a", withProgressTimeout)
		p := make([]byte, n)
		if err := conn.Read(t.Context(), p, 0); err != nil || !bytes.Equal(p, patternOf(0, n)) {
			t.Errorf("read: error %v or wrong data", err)
		}
		time.Sleep(24 * time.Hour)
		if err := conn.Write(t.Context(), payload, 0, false); err != nil {
			t.Errorf("write: %v", err)
		}
		time.Sleep(24 * time.Hour)
		if err := conn.Trim(t.Context(), 0, 512, false); err != nil {
			t.Errorf("trim: %v", err)
		}
		if err := conn.Read(t.Context(), p, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got error %v after all", err)
		}
	})
}

// Without ProgressTimeout a call waits until its context is done.
func TestConnWithoutProgressTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			s.discard()
		}), "a", nil)
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		if err := conn.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v", err)
		}
		if err := conn.Err(); err != nil {
			t.Errorf("the connection has ended: %v", err)
		}
	})
}

// The error of a lost connection has the number of outstanding requests.
func TestConnLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			for range 3 {
				s.request()
			}
		}), "a", nil)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				err := conn.Read(context.Background(), make([]byte, 512), 0)
				var lost *LostError
				if !errors.As(err, &lost) || lost.Outstanding != 3 || !errors.Is(err, io.ErrUnexpectedEOF) ||
					!strings.Contains(err.Error(), "the server closed the connection (3 requests outstanding)") {
					t.Errorf("got error %v", err)
				}
			})
		}
		wg.Wait()
	})
}

// The text of the error of a reset connection does not name a system call.
func TestConnReset(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		nc, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close()
		s := &script{nc}
		s.exports(t, structuredReplies, mebibyte)
		s.request()
		if err := nc.(*net.TCPConn).SetLinger(0); err != nil {
			t.Error(err)
		}
	})
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := connWith(t, nc, "a", nil)
	err = conn.Read(t.Context(), make([]byte, 512), 0)
	if !errors.Is(err, syscall.ECONNRESET) || err.Error() != "connection lost: the connection was reset by the server, or on the way to it (1 request outstanding)" {
		t.Errorf("got error %v", err)
	}
}

// brokenWrites is a connection whose writes fail once broken is set.
type brokenWrites struct {
	net.Conn
	broken atomic.Bool
}

func (b *brokenWrites) Write(p []byte) (int, error) {
	if b.broken.Load() {
		return 0, &net.OpError{Op: "write", Err: syscall.EPIPE}
	}
	return b.Conn.Write(p)
}

// A write often fails before the client has read the server's last reply, which tells the
// reason: the client reads that first.
func TestConnReadsTheReasonAfterABrokenWrite(t *testing.T) {
	for _, answers := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan struct{})
			nc := &brokenWrites{Conn: against(t, func(s *script) {
				s.exports(t, simpleReplies, mebibyte)
				first := s.request()
				<-release
				if answers {
					s.send(simpleReply(wire.ESHUTDOWN, first.Cookie))
					return
				}
				s.discard() // as a network that does not deliver the end of a connection
			})}
			conn := connWith(t, nc, "a", nil)
			errs := make(chan error, 2)
			read := func() { errs <- conn.Read(context.Background(), make([]byte, 512), 0) }
			go read()
			synctest.Wait()
			nc.broken.Store(true)
			go read()
			synctest.Wait()
			close(release)
			begin := time.Now()
			for range 2 {
				err := <-errs
				var lost *LostError
				switch {
				case answers && !errors.Is(err, wire.ESHUTDOWN):
					t.Errorf("got error %v, want the server's reply", err)
				case !answers && (!errors.As(err, &lost) || !errors.Is(err, syscall.EPIPE) || lost.Outstanding != 2):
					t.Errorf("got error %v, want one of the connection", err)
				}
			}
			if took := time.Since(begin); took > closeTimeout {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// Idle time before a request does not count for its progress timeout.
func TestConnIdleTimeDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		defer close(over)
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			s.send(chunk(structuredReplies, s.request(), done, wire.ChunkNone, nil))
			<-over
		}), "a", withProgressTimeout)
		if err := conn.Trim(t.Context(), 0, 512, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Second)
		begin := time.Now()
		if err := conn.Read(t.Context(), make([]byte, 512), 0); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got error %v", err)
		}
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("after %v, want a minute", took)
		}
	})
}
