package client

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

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
