package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// TestReloadUnderLoad: no read fails during a hundred reloads, each with other settings.
func TestReloadUnderLoad(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	image := random(5, 1<<20)
	vdi := w.addVDI(image, xapitest.VDISpec{})
	file := w.file("reload.toml", "")
	p := w.start("--config=" + file)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 4 {
		conn, err := w.open(p, w.export(vdi), i%2 == 0)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		readers.Go(func() {
			got := make([]byte, len(image))
			for !isClosed(stop) {
				if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
					t.Errorf("a read failed: %v", err)
					return
				}
			}
		})
	}
	for i := range 100 {
		text := fmt.Sprintf("max_connections = %d\nmax_vbds = %d\nmax_inflight_bytes = \"%d MiB\"\nidle_timeout = \"%dm\"\nrate_limit = \"%d GiB\"\n",
			10+i%2, 3+i%3, 8+i%5, 1+i%7, i%2)
		if err := os.Rename(w.file("new.toml", text), file); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitLines("configuration reloaded", i+1)
	}
	if r := w.report(); r.Limits.MaxConnections != 11 || r.Limits.MaxVBDs != 3 || r.Limits.MaxInflightBytes != 12<<20 || r.Limits.RateLimit != 1<<30 {
		t.Errorf("limits after the last reload: got %+v", r.Limits)
	}
	close(stop)
	readers.Wait()
	if n := len(w.report().Connections); n != 4 {
		t.Errorf("got %d connections, want the 4 that there were", n)
	}
}

// waitLines waits until a text was logged n times.
func (p *process) waitLines(what string, n int) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	defer time.AfterFunc(patience, p.lines.Broadcast).Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for strings.Count(p.text.String(), what) < n {
		if p.eof || time.Now().After(deadline) {
			p.t.Fatalf("the service did not say %q %d times:\n%s", what, n, p.text.String())
		}
		p.lines.Wait()
	}
}

// TestReloadBrokenFile: a file with a mistake changes nothing, and the log names the mistake
// and its line.
func TestReloadBrokenFile(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	file := w.file("reload.toml", "max_vbds = 7\n")
	p := w.start("--config=" + file)
	tests := []struct {
		text string
		want []string // all in one line of the log
	}{
		{"max_vbds = 8\nmax_vdbs = 8\n", []string{"line 2", "max_vdbs"}},
		{"max_vbds = 8\n\nidle_timeout = 30\n", []string{"line 3", "idle_timeout"}},
		{"max_vbds = 8\nmax_connections = 0\n", []string{"line 2", "max_connections must be at least 1"}},
		{"max_vbds = 8\nmetrics = \n", []string{"line 2"}},
		{"max_vbds = 8\ntls = \"maybe\"\n", []string{"line 2", "tls must be"}},
		{"max_vbds = 8\nrate_limit = 5\n", []string{"line 2", "rate_limit"}},
	}
	for i, tt := range tests {
		if err := os.Rename(w.file("new.toml", tt.text), file); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitLines("configuration not reloaded", i+1)
		last := ""
		for line := range strings.Lines(p.output()) {
			if strings.Contains(line, "configuration not reloaded") {
				last = line
			}
		}
		for _, want := range tt.want {
			if !strings.Contains(last, want) {
				t.Errorf("%q: the log does not say %q: %s", tt.text, want, last)
			}
		}
	}
	if got := w.report().Limits.MaxVBDs; got != 7 {
		t.Errorf("max_vbds: got %d, want 7 as before", got)
	}
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
}

func (w *world) openUnix(addr, export string) (*client.Conn, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	c, err := client.Dial(ctx, "unix", strings.TrimPrefix(addr, "unix:"), nil)
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, export)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}
