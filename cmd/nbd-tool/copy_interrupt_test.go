package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// TestCopyThroughCutConnections cuts the connections to both ends after so many bytes, the
// next ones after fewer or more, until none is left to be cut.
func TestCopyThroughCutConnections(t *testing.T) {
	const size = 3<<20 + 512
	want := content(size)
	for i, cuts := range [][]int64{{1 << 20}, {100, 1 << 20, 50, 700 << 10}, {300 << 10, 300 << 10, 300 << 10, 300 << 10, 300 << 10}} {
		for _, connections := range []string{"1", "3"} {
			t.Run(fmt.Sprintf("%d by %s connections", i, connections), func(t *testing.T) {
				ram := nbdtest.NewRAM(bytes.Repeat([]byte{0xee}, size))
				// The first connections have to come about.
				first := []int64{600 << 10, 400 << 10, 500 << 10}
				_, src := startRelay(t, serveRAM(t, nbdtest.NewRAM(want)), append(first, cuts...)...)
				_, dst := startRelay(t, serveRAM(t, ram), append(first, cuts...)...)
				r := tool(t, "copy", "--verify", "--connections="+connections, src, dst)
				// With several, the copy may be complete before the last one is there again.
				again := connections != "1" || strings.Contains(r.err, "connected again")
				if r.code != exitOK || !strings.Contains(r.err, "connecting again for up to 1m0s") || !again {
					t.Errorf("exit code %d, error output %q", r.code, r.err)
				}
				sameBytes(t, "on stable storage", ram.Stable(), want)
			})
		}
	}
}

// TestCopyToAndFromAFileThroughCutConnections has one end that cannot be cut.
func TestCopyToAndFromAFileThroughCutConnections(t *testing.T) {
	want := content(2 << 20)
	file := writeFile(t, "src", want)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	_, uri := startRelay(t, serveRAM(t, ram), 500<<10, 500<<10)
	if r := tool(t, "copy", "--connections=1", file, uri); r.code != exitOK {
		t.Errorf("to the export: exit code %d: %s", r.code, r.err)
	}
	sameBytes(t, "on stable storage", ram.Stable(), want)

	_, uri = startRelay(t, serveRAM(t, nbdtest.NewRAM(want)), 500<<10, 500<<10)
	for _, to := range []string{filepath.Join(t.TempDir(), "dst"), "-"} {
		r := tool(t, "copy", "--connections=1", uri, to)
		if r.code != exitOK {
			t.Errorf("to %s: exit code %d: %s", to, r.code, r.err)
		}
		got := []byte(r.out)
		if to != "-" {
			got = readFile(t, to)
		}
		sameBytes(t, to, got, want)
	}
}

// TestCopyThroughCutTLSConnections: connections with TLS are made again with TLS.
func TestCopyThroughCutTLSConnections(t *testing.T) {
	want := content(2 << 20)
	serverTLS, _ := nbdtest.TLS(t)
	dir, _ := certificateFiles(t, serverTLS)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	addr := serveTLS(t, exporterFunc(func(string) (nbd.Device, error) { return ram.Again(), nil }), serverTLS)
	_, uri := startRelay(t, "nbd://"+addr, 500<<10, 400<<10, 500<<10)
	uri = "nbds" + strings.TrimPrefix(uri, "nbd")
	r := tool(t, "copy", "--verify", "--connections=2", "--tls-certificates="+dir, writeFile(t, "src", want), uri)
	if r.code != exitOK || !strings.Contains(r.err, "connected again") {
		t.Errorf("exit code %d, error output %q", r.code, r.err)
	}
	sameBytes(t, "on stable storage", ram.Stable(), want)
}

// forgettingServer serves a device in memory at a fixed address. Before one of the writes it
// is restarted, and the device has then lost the writes that were not flushed, as after a loss
// of power.
type forgettingServer struct {
	t         *testing.T
	addr      string
	ram       *nbdtest.RAM // of the newest start
	stop      func()
	writes    atomic.Int64
	at        int64 // the write before which the server is restarted
	restarted chan struct{}
}

func startForgetting(t *testing.T, content []byte, at int64) *forgettingServer {
	s := &forgettingServer{t: t, addr: "127.0.0.1:0", ram: nbdtest.NewRAM(content), at: at, restarted: make(chan struct{})}
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

// start listens at the address of the last start.
func (s *forgettingServer) start() {
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Error(err)
		return
	}
	s.addr = l.Addr().String()
	ram := s.ram
	server := &nbd.Server{Exporter: exporterFunc(func(string) (nbd.Device, error) { return &forgettingDevice{ram.Again(), s}, nil })}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(context.WithoutCancel(s.t.Context()), l)
	}()
	s.stop = func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // closes the connections at once
		_ = server.Shutdown(ctx)
		<-served
	}
}

func (s *forgettingServer) restart() {
	defer close(s.restarted)
	s.stop()
	s.ram = nbdtest.NewRAM(s.ram.Stable())
	s.start()
}

type forgettingDevice struct {
	*nbdtest.RAM
	s *forgettingServer
}

func (d *forgettingDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.s.writes.Add(1) == d.s.at {
		go d.s.restart()
	}
	return d.RAM.WriteAt(p, off)
}

// TestCopyToAServerThatLosesWrites: writes that were acknowledged and not flushed before the
// server was restarted are made again.
func TestCopyToAServerThatLosesWrites(t *testing.T) {
	want := nbdtest.Bytes(8<<20, 0, 1) // 32 writes
	src := writeFile(t, "src", want)
	for _, at := range []int64{1, 7, 20, 32} {
		for _, extra := range []string{"--destination-is-zero", "--verify"} {
			s := startForgetting(t, make([]byte, len(want)), at)
			r := tool(t, "copy", "--connections=2", extra, src, "nbd://"+s.addr+"/")
			if r.code != exitOK {
				t.Fatalf("write %d: exit code %d: %s", at, r.code, r.err)
			}
			<-s.restarted
			sameBytes(t, "on stable storage", s.ram.Stable(), want)
		}
	}
}

// TestCopyServerStaysAway: the tool gives up, says so, and leaves no doubt that the copy is
// incomplete.
func TestCopyServerStaysAway(t *testing.T) {
	want := content(2 << 20)
	for _, tt := range []struct{ retry, want string }{
		{"200ms", "not connected again within 200ms"}, {"0", "connection lost"},
	} {
		r, uri := startRelay(t, serveRAM(t, nbdtest.NewRAM(want)), 700<<10, 0)
		stop := &stopping{n: 300 << 10, stop: func() { r.redirect(t, "") }}
		var errOut bytes.Buffer
		code := run(t.Context(), []string{"copy", "--connections=1", "--requests=1", "--retry-for=" + tt.retry, uri, "-"}, streams{nil, stop, &errOut})
		checkFailure(t, result{code: code, err: errOut.String()}, exitFailed, "is incomplete", tt.want)
	}
	fail(t, exitUsage, []string{"--retry-for must be 0 or more"}, "copy", "--retry-for=-1s", "a", "b")
	// The first connection is tried only once.
	fail(t, exitFailed, []string{"refused"}, "copy", "nbd+unix:///?socket="+closedSocket(t), filepath.Join(t.TempDir(), "dst"))
}

// closedSocket returns the path of a unix socket that nobody listens on any more.
func closedSocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd-tool") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	return filepath.Join(dir, "s")
}

// TestCopyRefusesAnotherDisk has a server that shows another disk after the connection was
// lost. Nothing of it is written to the destination.
func TestCopyRefusesAnotherDisk(t *testing.T) {
	const size = 1 << 20
	named := func(text string, n int) string {
		ram := nbdtest.NewRAM(bytes.Repeat([]byte{1}, n))
		ram.Text = text
		return serveRAM(t, ram)
	}
	for want, other := range map[string]string{
		"1048577 bytes instead of 1048576": named("one", size+1), `"two" instead of "one"`: named("two", size),
	} {
		r, uri := startRelay(t, named("one", size))
		stop := &stopping{n: 1, stop: func() { r.redirect(t, other) }}
		var errOut bytes.Buffer
		code := run(t.Context(), []string{"copy", "--connections=1", "--requests=1", uri, "-"}, streams{nil, stop, &errOut})
		checkFailure(t, result{code: code, err: errOut.String()}, exitFailed, "another export than before: "+want)
	}
}

// TestCopyInterruptedWhileConnecting: an ending signal does not wait for --retry-for.
func TestCopyInterruptedWhileConnecting(t *testing.T) {
	r, uri := startRelay(t, serveRAM(t, nbdtest.NewRAM(content(2<<20))))
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	r.onRefusal(func() { cancel(errors.New("interrupt signal received")) })
	stop := &stopping{n: 1, stop: func() { r.redirect(t, "") }}
	var errOut bytes.Buffer
	code := run(ctx, []string{"copy", "--connections=1", "--requests=1", "--retry-for=24h", uri, "-"}, streams{nil, stop, &errOut})
	checkFailure(t, result{code: code, err: errOut.String()}, exitFailed, "is incomplete: interrupt signal received")
}

// fullPipe takes nothing until it is released.
type fullPipe struct{ reached, released chan struct{} }

func (f fullPipe) Write([]byte) (int, error) {
	f.reached <- struct{}{}
	<-f.released
	return 0, errors.New("closed")
}

// TestCopyInterruptedWhileNobodyReads: an ending signal does not wait for the reader of standard
// output.
func TestCopyInterruptedWhileNobodyReads(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	out := fullPipe{make(chan struct{}), make(chan struct{})}
	defer close(out.released)
	ended := make(chan result, 1)
	src := writeFile(t, "src", content(2<<20))
	go func() {
		var errOut bytes.Buffer
		code := run(ctx, []string{"copy", src, "-"}, streams{nil, out, &errOut})
		ended <- result{code: code, err: errOut.String()}
	}()
	<-out.reached
	cancel(errors.New("interrupt signal received"))
	select {
	case r := <-ended:
		checkFailure(t, r, exitFailed, "stopped after 0 of 2097152 bytes", "is incomplete: interrupt signal received")
	case <-time.After(time.Minute):
		t.Error("the copy waits for the reader")
	}
}
