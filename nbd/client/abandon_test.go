package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// encrypted puts TLS on both ends of a connection to a script that has
// negotiated. Writes of the server's end do not wait for the client.
func encrypted(t *testing.T, run func(s *script)) net.Conn {
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer far.Close()
		run(&script{tls.Server(far, serverTLS(t))})
	})
	c := tls.Client(near, clientTLS(t))
	t.Cleanup(func() {
		near.Close()
		wg.Wait()
	})
	return c
}

// A read whose context is done returns at once, however much of its reply has arrived. Its
// buffer is not written to any more, and the connection can be used further.
func TestConnGivesUpARead(t *testing.T) {
	const n = 100 << 10
	stages := map[string]func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}){
		"nothing has come": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			<-givenUp
			s.send(chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n)))
		},
		"between chunks": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			s.send(chunk(mode, r, 0, wire.ChunkOffsetData, dataAt(0, 100)))
			<-givenUp
			s.send(chunk(mode, r, 0, wire.ChunkOffsetHole, holeAt(100, 100)))
			s.send(chunk(mode, r, done, wire.ChunkOffsetData, dataAt(200, n-200)))
		},
		"inside the data": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			b := chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n))
			s.send(b[:n/2])
			<-givenUp
			s.send(b[n/2:])
		},
		"inside a header": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) {
			b := chunk(mode, r, done, wire.ChunkOffsetData, dataAt(0, n))
			s.send(b[:22])
			<-givenUp
			s.send(b[22:])
		},
		"never": func(s *script, mode replyMode, r wire.Request, givenUp <-chan struct{}) { <-givenUp },
	}
	connect := map[string]func(*testing.T, func(s *script)) net.Conn{
		"clear": func(t *testing.T, run func(s *script)) net.Conn { return against(t, run) },
		"TLS":   encrypted,
	}
	for name, stage := range stages {
		for how, connect := range connect {
			t.Run(name+", "+how, func(t *testing.T) {
				everyMode(t, func(t *testing.T, mode replyMode) {
					synctest.Test(t, func(t *testing.T) {
						givenUp := make(chan struct{})
						conn := connWith(t, connect(t, func(s *script) {
							s.exports(t, mode, mebibyte)
							stage(s, mode, s.requestIn(mode), givenUp)
							for {
								s.send(chunk(mode, s.requestIn(mode), done, wire.ChunkNone, nil))
							}
						}), "a", nil)
						ctx, cancel := context.WithCancelCause(t.Context())
						reason := errors.New("no patience")
						time.AfterFunc(time.Second, func() { cancel(reason) })
						p := make([]byte, n)
						if err := conn.Read(ctx, p, 0); !errors.Is(err, reason) {
							t.Errorf("got error %v, want the cause", err)
						}
						mine := bytes.Repeat([]byte{0xa5}, n)
						copy(p, mine)
						close(givenUp)
						if err := conn.Flush(t.Context()); err != nil {
							t.Errorf("the next call: %v", err)
						}
						if !bytes.Equal(p, mine) {
							t.Error("the buffer was written to after the return")
						}
						if err := conn.Close(); err != nil {
							t.Error(err)
						}
					})
				})
			})
		}
	}
}

// A write whose context is done returns at once even if the server does not read. The rest
// of its request is sent from a copy, so that the connection can be used further.
func TestConnGivesUpAWrite(t *testing.T) {
	for _, n := range []int{512, 1 << 20} { // in one piece with its header, or not
		for _, taken := range []int{0, 10, 28, 29, 400} {
			synctest.Test(t, func(t *testing.T) {
				goOn := make(chan struct{})
				got := make(chan []byte, 1)
				conn := connWith(t, against(t, func(s *script) {
					s.exports(t, structuredReplies, mebibyte)
					head := s.receive(taken)
					<-goOn
					head = append(head, s.receive(wire.RequestLen+n-taken)...)
					got <- head[wire.RequestLen:]
					r, _ := wire.ParseRequest((*[wire.RequestLen]byte)(head))
					s.send(simpleReply(wire.Success, r.Cookie))
					s.send(simpleReply(wire.Success, s.request().Cookie))
					s.discard()
				}), "a", nil)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				p := patternOf(7, n)
				if err := conn.Write(ctx, p, 0, false); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got error %v", err)
				}
				clear(p)
				// A request of which nothing has been sent is not sent.
				impatient, cancel2 := context.WithTimeout(t.Context(), time.Second)
				defer cancel2()
				if err := conn.Trim(impatient, 0, 512, false); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("second call: got error %v", err)
				}
				close(goOn)
				if err := conn.Flush(t.Context()); err != nil {
					t.Errorf("the next call: %v", err)
				}
				if !bytes.Equal(<-got, patternOf(7, n)) {
					t.Error("the server got wrong data")
				}
			})
		}
	}
}

// Over TLS the rest of a request cannot be sent after a write that timed out.
func TestConnGivesUpAWriteOverTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan struct{})
		conn := connWith(t, encrypted(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			<-gone
		}), "a", nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := conn.Write(ctx, make([]byte, 1<<20), 0, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v", err)
		}
		<-conn.Done()
		close(gone)
		if conn.Err() == nil {
			t.Error("the connection has ended without an error")
		}
	})
}

// A call whose context is done already sends nothing.
func TestConnCallsWithAnEndedContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			if r := s.request(); r.Command != wire.CmdDisc {
				t.Errorf("the client sent %v", r.Command)
			}
		}), "a", nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for name, err := range map[string]error{
			"Read":  conn.Read(ctx, make([]byte, 1), 0),
			"Write": conn.Write(ctx, make([]byte, 1), 0, false),
			"Flush": conn.Flush(ctx),
		} {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: got error %v", name, err)
			}
		}
		conn.Close()
	})
}

// Close returns within closeTimeout while the rest of a request cannot be sent.
func TestConnCloseWithHalfARequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan struct{})
		conn := connWith(t, against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte)
			s.receive(10)
			<-gone
		}), "a", nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := conn.Write(ctx, make([]byte, 4096), 0, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v", err)
		}
		begin := time.Now()
		conn.Close()
		if took := time.Since(begin); took > closeTimeout {
			t.Errorf("Close took %v, want at most %v", took, closeTimeout)
		}
		close(gone)
	})
}
