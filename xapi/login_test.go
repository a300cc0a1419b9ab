package xapi

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var errRefused = errors.New("refused for the test")

// The pauses double from 0.25 s to 4 s, and the end of the context ends the
// wait at once, with its cause and the last attempt's error.
func TestWaitLoginBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{})
		start := time.Now()
		var attempts []time.Duration
		c.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			attempts = append(attempts, time.Since(start))
			return nil, &net.OpError{Op: "dial", Net: "unix", Err: errRefused}
		}
		why := errors.New("waited long enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 13*time.Second, why)
		defer cancel()
		_, err := c.WaitLogin(ctx, "test")
		for _, want := range []error{why, context.DeadlineExceeded, errRefused} {
			if !errors.Is(err, want) {
				t.Errorf("got %v, want it to match %v", err, want)
			}
		}
		if got := time.Since(start); got != 13*time.Second {
			t.Errorf("ended after %v, want 13s", got)
		}
		const s = time.Second
		want := []time.Duration{0, s / 4, 3 * s / 4, 7 * s / 4, 15 * s / 4, 31 * s / 4, 47 * s / 4}
		if diff := cmp.Diff(want, attempts); diff != "" {
			t.Errorf("attempts (-want +got):\n%s", diff)
		}
	})
}

// A login that is not answered, as on a supporter without its master, ends after CallTimeout
// and is tried again.
func TestWaitLoginTriesAgainAfterHanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{CallTimeout: time.Minute})
		var attempts int
		c.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			attempts++
			ours, theirs := net.Pipe()
			first := attempts == 1
			go func() {
				defer theirs.Close()
				req, err := http.ReadRequest(bufio.NewReader(theirs))
				if err != nil {
					return
				}
				io.Copy(io.Discard, req.Body)
				if first {
					io.Copy(io.Discard, theirs) // until the client gives up
					return
				}
				io.WriteString(theirs, ok(successXML(secret)))
			}()
			return ours, nil
		}
		start := time.Now()
		s, err := c.WaitLogin(t.Context(), "test")
		if err != nil || string(s.Ref()) != secret {
			t.Fatalf("got %v, want a session", err)
		}
		if got, want := time.Since(start), time.Minute+firstLoginPause; got != want || attempts != 2 {
			t.Errorf("got %d attempts in %v, want 2 in %v", attempts, got, want)
		}
	})
}

func TestWaitLoginWithFinishedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(Config{Socket: "/nowhere"}).WaitLogin(ctx, "test"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

func TestLoginOnTheWire(t *testing.T) {
	r := respond(t, always(ok(successXML(secret))))
	s, err := testClient(t, Config{Socket: r.Socket}).Login(t.Context(), "xapi-nbd")
	if err != nil || string(s.Ref()) != secret {
		t.Fatalf("got %v, want a session", err)
	}
	text := func(s string) string { return "<param><value><string>" + s + "</string></value></param>" }
	want := `<?xml version="1.0" encoding="UTF-8"?><methodCall><methodName>session.login_with_password</methodName><params>` +
		text("") + text("") + text("1.0") + text("xapi-nbd") + `</params></methodCall>`
	if diff := cmp.Diff(want, r.seen()[0].body); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}
}
