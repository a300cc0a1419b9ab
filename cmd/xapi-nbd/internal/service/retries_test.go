package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/nbd"
	"xapi-nbd/xapi/xapitest"
)

// TestRetriesGrow: the pauses between attempts grow up to a limit, and the action is reported
// until it succeeds.
func TestRetriesGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRetries(slog.New(slog.DiscardHandler), nil)
		var pauses []time.Duration
		last := time.Now()
		failed := errors.New("not there")
		err := r.again(t.Context(), "do it", failed, func(context.Context) error {
			pauses = append(pauses, time.Since(last))
			last = time.Now()
			got := r.report()
			if len(got) != 1 || got[0].Action != "do it" || got[0].LastError != "not there" || got[0].Attempts != len(pauses) {
				t.Errorf("attempt %d: got %+v", len(pauses)+1, got)
			}
			if len(pauses) < 9 {
				return failed
			}
			return nil
		})
		want := []time.Duration{
			firstPause, 2 * firstPause, 4 * firstPause, 8 * firstPause, 16 * firstPause, 32 * firstPause,
			longestPause, longestPause, longestPause,
		}
		if err != nil || !slices.Equal(pauses, want) {
			t.Errorf("got %v, %v, want pauses %v", err, pauses, want)
		}
		if got := r.report(); len(got) != 0 {
			t.Errorf("afterwards: got %+v", got)
		}
		if err := r.again(t.Context(), "do it", failed, func(context.Context) error { return &kindError{ErrStateFolder, failed} }); err == nil {
			t.Error("a permanent error is no error")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.again(ctx, "do it", failed, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("an ended context: got %v", err)
		}
	})
}

// TestListenErrors: the addresses that are tried again, and those that match ErrListen.
func TestListenErrors(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	socket, err := net.Listen("unix", filepath.Join(w.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for _, tt := range []struct {
		addr  string
		never bool
	}{
		{busy.Addr().String(), false},
		{"192.0.2.1:10809", false}, // an address of no interface
		{"[fe80::1%nosuch0]:10809", false},
		{"unix:" + socket.Addr().String(), false},
		{"unix:" + w.dir + "/missing/socket", false},
		{"unix:" + w.dir, true},
		{"unix:" + w.File("file", ""), true},
		{"unix:" + w.File("file", "") + "/socket", true},
		{"unix:" + w.dir + "/" + strings.Repeat("long", 50), true},
		{"[fe80::1]:10809", true}, // without a zone
	} {
		l, err := listenOn(t.Context(), tt.addr)
		if err == nil {
			l.Close()
			t.Errorf("%s can be listened on", tt.addr)
			continue
		}
		if never := errors.Is(err, ErrListen); never != tt.never {
			t.Errorf("%s: never %v, want %v: %v", tt.addr, never, tt.never, err)
		}
	}
}

// TestReloadWhileAddressesAreWaitedFor: a reload ends the attempts for an address that is not
// configured any more, and starts attempts for one that it closed and could not open again.
func TestReloadWhileAddressesAreWaitedFor(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	addr := busy.Addr().String()
	s := w.inside(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", addr} })
	s.reloadWith(func(c *config.Config) { c.MaxVBDs = 3 }) // the pending address does not keep the reload from succeeding
	if got := s.Service.settings.Load().MaxVBDs; got != 3 {
		t.Errorf("max_vbds is %d\n%s", got, s.logged())
	}
	eventually(t, func() string {
		if waiting := s.retries.report(); len(waiting) != 1 {
			return fmt.Sprintf("waiting: %+v", waiting)
		}
		return ""
	})
	s.reloadWith(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0"} })
	eventually(t, func() string {
		if left := s.retries.report(); len(left) > 0 {
			return "still waiting for " + left[0].Action
		}
		return ""
	})
	busy.Close()
	s.reloadWith(func(c *config.Config) { c.Listen = []string{"127.0.0.1:0", addr} })
	if got := s.listening.addrs(); len(got) != 2 || got[1].String() != addr {
		t.Errorf("got %v, want %s as well\n%s", got, addr, s.logged())
	}
}

// TestAddressIsAddedAgain: an address that was waited for, removed and added again is opened,
// although the attempts for the first time have not noticed their end.
func TestAddressIsAddedAgain(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "s")
	l := &listeners{opened: func(net.Addr) {}, serve: func(net.Listener) error { return nbd.ErrServerClosed }}
	l.waiting = []*waiting{{addr: addr, cancel: func() {}}}
	for _, addrs := range [][]string{nil, {addr}} {
		if err := l.change(t.Context(), addrs); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.addrs(); len(got) != 1 {
		t.Errorf("got %v, want %s", got, addr)
	}
	l.stop()
	l.serving.Wait()
}

// TestListenerThatFails: a listener that fails is opened again.
func TestListenerThatFails(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	socket := "unix:" + w.dir + "/socket"
	s := w.inside(func(c *config.Config) { c.Listen = []string{socket} })
	s.listening.open[0].Close()
	eventually(t, func() string {
		conn, err := w.openUnix(socket, w.Export(vdi))
		if err != nil {
			return err.Error()
		}
		conn.Close()
		return ""
	})
}
