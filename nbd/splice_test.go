//go:build linux

package nbd

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// spliceDevice is a file; long reads that are not made by its descriptor are counted.
type spliceDevice struct {
	f      *os.File
	size   int64
	copied atomic.Int64 // calls of ReadAt for data that should be spliced
	refuse atomic.Pointer[error]
}

func newSpliceDevice(t testing.TB, data []byte) *spliceDevice {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &spliceDevice{f: f, size: int64(len(data))}
}

func (d *spliceDevice) ReadAt(p []byte, off int64) (int, error) {
	if len(p) >= spliceMin {
		d.copied.Add(1)
	}
	return d.f.ReadAt(p, off)
}
func (d *spliceDevice) Size() int64    { return d.size }
func (d *spliceDevice) Close() error   { return nil }
func (d *spliceDevice) File() *os.File { return d.f }

func (d *spliceDevice) Verify(int64, int64) error {
	if err := d.refuse.Load(); err != nil {
		return *err
	}
	return nil
}

// splicing is a server of one device on a real socket, because pipes of the net
// package cannot be spliced to, and a client.
func splicing(t testing.TB, d Device, network string) *client.Conn {
	t.Helper()
	l := listen(t, network)
	serveOn(t, &Server{Exporter: oneDevice{d}}, l)
	return dialGo(t, l)
}

type oneDevice struct{ Device }

func (d oneDevice) Open(context.Context, Peer, string) (Device, error) { return d.Device, nil }

// TestSplicedReads: every byte arrives, spliced or copied: lengths around the limit, unaligned
// offsets, more than one pipe can hold, many at once.
func TestSplicedReads(t *testing.T) {
	data := patternOf(0, 12<<20+77)
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			d := newSpliceDevice(t, data)
			conn := splicing(t, d, network)
			var readers sync.WaitGroup
			for seed := range uint64(4) {
				readers.Go(func() {
					r := rand.New(rand.NewPCG(seed, 1))
					for _, n := range []int{spliceMin - 1, spliceMin, spliceMin + 1, 64 << 10, 1<<20 + 3, 2 << 20, 3<<20 + 1, 8 << 20, len(data)} {
						off := r.IntN(len(data) - n + 1)
						got := make([]byte, n)
						if _, err := conn.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, data[off:off+n]) {
							t.Errorf("%d bytes at %d: wrong, or %v", n, off, err)
						}
					}
				})
			}
			readers.Wait()
			if got := d.copied.Load(); got > 0 {
				t.Errorf("%d long reads went through ReadAt, want none", got)
			}
		})
	}
}

// An error after the first byte of a long read is an errno like any other, and the
// connection continues. A pipe that is not empty is not used again.
func TestSpliceFails(t *testing.T) {
	data := patternOf(0, 4<<20)
	d := newSpliceDevice(t, data)
	conn := splicing(t, d, "tcp")
	got := make([]byte, 1<<20)
	for round := range 10 {
		if err := d.f.Truncate(3<<20 + 100); err != nil {
			t.Fatal(err)
		}
		// 8 MiB would be more than one pipe.
		if _, err := conn.ReadAt(make([]byte, 2<<20), 2<<20); !errors.Is(err, wire.EIO) {
			t.Fatalf("round %d: read behind the end of the file: got %v, want EIO", round, err)
		}
		if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, data[:len(got)]) {
			t.Fatalf("round %d: the next read: wrong data, or %v", round, err)
		}
		if err := d.f.Truncate(4 << 20); err != nil {
			t.Fatal(err)
		}
	}
}

// If Verify fails, the request fails and no data is sent.
func TestVerifyFails(t *testing.T) {
	d := newSpliceDevice(t, patternOf(0, 4<<20))
	conn := splicing(t, d, "tcp")
	err := error(syscall.ENXIO)
	d.refuse.Store(&err)
	if _, err := conn.ReadAt(make([]byte, 1<<20), 0); !errors.Is(err, wire.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
	d.refuse.Store(nil)
	if _, err := conn.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("the connection did not go on: %v", err)
	}
}

// If a peer closes the connection in the middle of a reply, the rest in the pipe does not
// become part of another reply.
func TestPeerHangsUpInASplicedReply(t *testing.T) {
	data := patternOf(0, 8<<20)
	d := newSpliceDevice(t, data)
	other := splicing(t, d, "tcp")
	l := listen(t, "tcp")
	serveOn(t, &Server{Exporter: oneDevice{d}}, l)
	for range 10 {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn := connWith(t, nc, "a", nil)
		asked := make(chan error)
		go func() { asked <- conn.Read(t.Context(), make([]byte, 8<<20), 0) }()
		nc.Close()
		<-asked
		got := make([]byte, 2<<20)
		if _, err := other.ReadAt(got, 3); err != nil || !bytes.Equal(got, data[3:3+len(got)]) {
			t.Fatalf("another connection: wrong data, or %v", err)
		}
	}
}
