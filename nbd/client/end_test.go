package client

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

func TestClientAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nc, wait := nbdtest.Pipe(t, new(nbd.Server))
		c, err := New(t.Context(), nc, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Abort(); err != nil {
			t.Error(err)
		}
		if err := wait(); err != nil {
			t.Errorf("server ended with %v, want peace", err)
		}
	})
}

func TestConnClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last wire.Command
		conn := connTo(t, against(t, func(s *script) {
			s.transmission()
			for range 4 {
				last = s.request().Command
			}
			s.discard()
		}), "a")
		failed := make(chan error, 3)
		for range cap(failed) {
			go func() {
				_, err := conn.ReadAt(make([]byte, 512), 0)
				failed <- err
			}()
		}
		synctest.Wait()
		for range 2 {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		for range cap(failed) {
			if err := <-failed; !errors.Is(err, net.ErrClosed) {
				t.Errorf("waiting call failed with %v, want %v", err, net.ErrClosed)
			}
		}
		if _, err := conn.ReadAt(make([]byte, 512), 0); !errors.Is(err, net.ErrClosed) {
			t.Errorf("later call failed with %v, want %v", err, net.ErrClosed)
		}
		synctest.Wait()
		if last != wire.CmdDisc {
			t.Errorf("last request was %v, want %v", last, wire.CmdDisc)
		}
	})
}

func TestClientContext(t *testing.T) {
	silent := func(*script) {}
	ack := wire.AppendOptionReply(nil, wire.OptStartTLS, wire.RepAck, nil)
	tests := []struct {
		name string
		run  func(s *script)
		tls  *tls.Config
		step string // where the error says that it stopped
	}{
		{"no greeting", silent, nil, "(no greeting from the server: timeout)"},
		{"half a greeting", func(s *script) { s.send([]byte("NBDMAGIC")) }, nil, "(no greeting from the server: timeout)"},
		{"no answer to STARTTLS", func(s *script) { s.greet() }, clientTLS(t), "(NBD_OPT_STARTTLS: no answer: timeout)"},
		{"no TLS handshake", func(s *script) { s.greet(); s.option(); s.send(ack) }, clientTLS(t), "(TLS handshake: "},
		{"no answer to the first option", func(s *script) { s.greet() }, nil, "(NBD_OPT_EXTENDED_HEADERS: no answer: timeout)"},
		{"no answer to GO", func(s *script) { s.replies(t, simpleReplies) }, nil, "(NBD_OPT_GO: no answer: timeout)"},
		{"half an answer to GO", func(s *script) { s.replies(t, simpleReplies); s.option(); s.send(goReply(wire.RepAck, nil)[:7]) }, nil, "(NBD_OPT_GO: no answer: timeout)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nc := against(t, func(s *script) { tt.run(s); s.discard() })
				why := errors.New("the user has had enough")
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, why)
				defer cancel()
				begin := time.Now()
				c, err := New(ctx, nc, &Config{TLSConfig: tt.tls})
				if err == nil {
					_, err = c.Go(ctx, "a")
				}
				if err != nil && !strings.Contains(err.Error(), tt.step) {
					t.Errorf("got error %v, want one that says %q", err, tt.step)
				}
				if !errors.Is(err, why) || time.Since(begin) != time.Minute {
					t.Errorf("got error %v after %v, want %v after a minute", err, time.Since(begin), why)
				}
			})
		})
	}
}

// Close returns within closeTimeout if the server does not read.
func TestConnCloseDoesNotWaitForTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		t.Cleanup(func() { close(ended) })
		conn := connTo(t, against(t, func(s *script) {
			s.transmission()
			<-ended
		}), "a")
		begin := time.Now()
		conn.Close()
		if got := time.Since(begin); got != closeTimeout {
			t.Errorf("took %v, want %v", got, closeTimeout)
		}
	})
}
