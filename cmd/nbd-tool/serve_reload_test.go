package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// reloadable is a running nbd-tool serve --config.
type reloadable struct {
	*served
	t       *testing.T
	dir     string // of the disks
	config  string
	reloads int // that have been seen in the log
}

// Lines of the log about reloads.
const reloaded, notReloaded = "SIGHUP: configuration reloaded", "SIGHUP: configuration not reloaded, the exports are as before"

// startReloadable starts a server with the disks NAME.img of these names, in the folder DIR.
func startReloadable(t *testing.T, disks []string, text string) *reloadable {
	t.Helper()
	// This process must not die of a signal that comes before or after the server.
	guard := make(chan os.Signal, 1)
	signal.Notify(guard, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(guard) })
	r := &reloadable{t: t, dir: t.TempDir()}
	for i, name := range disks {
		if err := os.WriteFile(r.disk(name), diskContent(i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.config = filepath.Join(r.dir, "exports.toml")
	r.write(text)
	r.served = startServe(t, "--config", r.config)
	return r
}

const diskSize = 1 << 20

// diskContent is that of the disk with this index.
func diskContent(i int) []byte { return nbdtest.Bytes(diskSize, 0, uint64(i+1)) }

func (r *reloadable) disk(name string) string { return filepath.Join(r.dir, name+".img") }

func (r *reloadable) write(text string) {
	r.t.Helper()
	if err := os.WriteFile(r.config, []byte(strings.ReplaceAll(text, "DIR", r.dir)), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// reload writes the file, has it read again, and returns the line of the log about it.
func (r *reloadable) reload(text string) string {
	r.t.Helper()
	r.write(text)
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		r.t.Fatal(err)
	}
	r.reloads++
	return r.waitReload(r.reloads)
}

// waitReload waits until n reloads are in the log, and returns the line of the last one.
func (r *reloadable) waitReload(n int) string {
	r.t.Helper()
	r.log.wait(r.t, func(text string) bool { return strings.Count(text, "msg=\"SIGHUP: ") >= n })
	lines := strings.Split(strings.TrimSpace(r.log.String()), "\n")
	for i := len(lines) - 1; ; i-- {
		if strings.Contains(lines[i], "SIGHUP: ") {
			return lines[i]
		}
	}
}

// open connects to an export.
func (r *reloadable) open(addr, name string) (*client.Conn, error) {
	ctx := context.WithoutCancel(r.t.Context())
	c, err := client.Dial(ctx, "tcp", addr, nil)
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, name)
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

func (r *reloadable) mustOpen(name string) *client.Conn {
	r.t.Helper()
	conn, err := r.open(r.addr, name)
	if err != nil {
		r.t.Fatalf("%q: %v", name, err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

// wantRead expects that a connection reads that content.
func (r *reloadable) wantRead(what string, conn *client.Conn, want []byte) {
	r.t.Helper()
	got := make([]byte, len(want))
	if _, err := conn.ReadAt(got, 0); err != nil {
		r.t.Errorf("%s: %v", what, err)
		return
	}
	sameBytes(r.t, what, got, want)
}

const (
	reloadListen = "listen = ['127.0.0.1:0']\n"
	reloadA      = "[[export]]\nname = 'a'\npath = 'DIR/a.img'\nread_only = false\n"
	reloadB      = "[[export]]\nname = 'b'\npath = 'DIR/b.img'\n"
)

// TestServeReload: exports come, change and go; connections stay, each on the file that it has
// opened.
func TestServeReload(t *testing.T) {
	r := startReloadable(t, []string{"a", "b"}, reloadListen+reloadA+reloadB)
	a, b := r.mustOpen("a"), r.mustOpen("b")

	line := r.reload(reloadListen + "[[export]]\nname = 'a'\npath = 'DIR/b.img'\n[[export]]\nname = 'c'\npath = 'DIR/a.img'\n")
	for _, want := range []string{"level=INFO", reloaded, "exports=2", "added=[c]", "removed=[b]", "changed=[a]"} {
		if !strings.Contains(line, want) {
			t.Errorf("the log has no %s: %s", want, line)
		}
	}
	r.wantRead("old connection to a, which is another file now", a, diskContent(0))
	if err := a.Write(t.Context(), []byte("new"), 0, true); err != nil {
		t.Errorf("old connection to a, which is read-only now: %v", err)
	}
	r.wantRead("old connection to b, which was removed", b, diskContent(1))
	if _, err := r.open(r.addr, "b"); err == nil || !strings.Contains(err.Error(), "no such export") {
		t.Errorf("new connection to b: %v", err)
	}
	again := r.mustOpen("a")
	r.wantRead("new connection to a", again, diskContent(1))
	if err := again.Write(t.Context(), []byte("new"), 0, true); err == nil {
		t.Error("new connection to a can write")
	}
	want := append([]byte("new"), diskContent(0)[3:]...)
	r.wantRead("c", r.mustOpen("c"), want)
	if got := succeed(t, "list", "nbd://"+r.addr); !strings.Contains(got, "c") || strings.Contains(got, "b\n") {
		t.Errorf("list: got %q", got)
	}
}

// TestServeReloadFails: after a reload that fails everything is as before, and the log has the
// reason.
func TestServeReloadFails(t *testing.T) {
	r := startReloadable(t, []string{"a", "b"}, reloadListen+reloadA)
	busy := startServe(t, "--listen=127.0.0.1:0", r.disk("b"))
	a := r.mustOpen("a")
	for _, tt := range []struct{ name, text, want string }{
		{"mistake", reloadListen + reloadB + "colour = 'red'\n", `line 5: unknown key \"export.colour\"`},
		{"empty", "", "no [[export]]"},
		{"no such file", reloadListen + reloadB + "[[export]]\nname = 'c'\npath = 'DIR/c.img'\n", "c.img: no such file"},
		{"address in use", "listen = ['127.0.0.1:0', 'localhost:0', '" + busy.addr + "']\n" + reloadB, "address already in use"},
		{"certificate", reloadListen + "certfile = 'DIR/exports.toml'\n" + reloadB, "exports.toml"},
	} {
		line := r.reload(tt.text)
		for _, want := range []string{"level=ERROR", notReloaded, tt.want} {
			if !strings.Contains(line, want) {
				t.Errorf("%s: the log has no %s: %s", tt.name, want, line)
			}
		}
		r.wantRead(tt.name+": old connection", a, diskContent(0))
		r.wantRead(tt.name+": new connection", r.mustOpen("a"), diskContent(0))
		if _, err := r.open(r.addr, "b"); err == nil {
			t.Errorf("%s: b was added", tt.name)
		}
	}
	if line := r.reload(reloadListen + reloadA + reloadB); !strings.Contains(line, reloaded) {
		t.Errorf("a good file after bad ones: %s", line)
	}
	r.wantRead("b", r.mustOpen("b"), diskContent(1))
}

// TestServeReloadAddresses: addresses and TLS change, connections stay.
func TestServeReloadAddresses(t *testing.T) {
	r := startReloadable(t, []string{"a"}, reloadListen+reloadA)
	cfg, _ := nbdtest.TLS(t)
	ca, pair := certificateFiles(t, cfg)
	a := r.mustOpen("a")
	r.reload("listen = ['127.0.0.1:0', 'localhost:0']\n" + reloadA)
	second := r.nextAddr(t)
	for _, addr := range []string{r.addr, second} {
		if got := succeed(t, "size", "nbd://"+addr+"/a"); got != fmt.Sprintln(diskSize) {
			t.Errorf("%s: got %q", addr, got)
		}
	}
	r.reload("listen = ['localhost:0']\ncertfile = '" + pair + "'\n" + reloadA)
	fail(t, exitFailed, []string{"connection refused"}, "size", "nbd://"+r.addr+"/a")
	fail(t, exitFailed, []string{"use nbds://"}, "size", "nbd://"+second+"/a")
	if got := succeed(t, "size", "--tls-certificates="+ca, "nbds://"+second+"/a"); got != fmt.Sprintln(diskSize) {
		t.Errorf("with TLS: got %q", got)
	}
	r.reload("listen = ['localhost:0']\n" + reloadA)
	if got := succeed(t, "size", "nbd://"+second+"/a"); got != fmt.Sprintln(diskSize) {
		t.Errorf("without TLS again: got %q", got)
	}
	r.wantRead("the connection of the beginning", a, diskContent(0))
}

// TestServeReloadsUnderLoad reloads 100 times, every third time a file with a mistake, while
// clients write and read back, and others come and go.
func TestServeReloadsUnderLoad(t *testing.T) {
	const rounds, writers = 100, 4
	r := startReloadable(t, []string{"a", "b"}, reloadListen+reloadA)
	var load sync.WaitGroup
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	passes := make([]int, writers)
	for i := range writers {
		conn := r.mustOpen("a") // which must last until the end
		load.Go(func() { passes[i] = r.writeAndRead(ctx, conn, i) })
	}
	comers := 0
	load.Go(func() {
		for ; ctx.Err() == nil; comers++ {
			conn, err := r.open(r.addr, "a")
			if err != nil {
				t.Errorf("a client that comes while the server reloads: %v", err)
				return
			}
			conn.Close()
		}
	})
	removed := make([]*client.Conn, 0, rounds)
	there := false
	for i := range rounds {
		text := reloadListen + reloadA
		switch i % 3 {
		case 0:
			text, there = text+reloadB, true
		case 1:
			text += "colour = 'red'\n"
		default:
			there = false
		}
		line := r.reload(text)
		if failed := strings.Contains(line, notReloaded); failed != (i%3 == 1) {
			t.Fatalf("reload %d: %s", i, line)
		}
		conn, err := r.open(r.addr, "b")
		switch {
		case (err == nil) != there:
			t.Fatalf("reload %d: opening b: %v, but it is there: %t", i, err, there)
		case err == nil && i%3 == 0:
			removed = append(removed, conn)
		case err == nil:
			conn.Close()
		}
	}
	stop()
	load.Wait()
	for i, conn := range removed {
		r.wantRead(fmt.Sprintf("connection %d to b, which was removed", i), conn, diskContent(1))
		conn.Close()
	}
	for i, n := range passes {
		if n == 0 {
			t.Errorf("writer %d was never done", i)
		}
	}
	if comers == 0 {
		t.Error("no client came")
	}
}

// writeAndRead writes to a quarter of the disk and reads it back, again and again until ctx
// ends, and returns how often.
func (r *reloadable) writeAndRead(ctx context.Context, conn *client.Conn, quarter int) (passes int) {
	const n = diskSize / 4
	off := int64(quarter) * n
	for got := make([]byte, n); ctx.Err() == nil; passes++ {
		want := nbdtest.Bytes(n, off, uint64(passes))
		_, err := conn.WriteAt(want, off)
		if err == nil {
			_, err = conn.ReadAt(got, off)
		}
		if err != nil || !bytes.Equal(got, want) {
			r.t.Errorf("writer %d, pass %d: %v; equal: %t", quarter, passes, err, bytes.Equal(got, want))
			return passes
		}
	}
	return passes
}
