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
