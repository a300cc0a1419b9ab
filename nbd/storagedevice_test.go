//go:build linux

package nbd

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/nbd/wire"
)

// fileOf is the device of a file, such as the service has.
type fileOf struct{ f *os.File }

func (d fileOf) Size() int64 { return 16 << 20 }

func (d fileOf) Close() error { return nil }

func (d fileOf) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

func (d fileOf) File() *os.File { return d.f }

func (d fileOf) Verify(off, n int64) error { return nil }

// storageDevice is a file of which nothing is in the page cache, as far as the server
// can see: File is an empty one, so that RWF_NOWAIT never finds all bytes.
type storageDevice struct {
	fileOf
	mu       sync.Mutex
	handed   int             // reads that had a goroutine of their own
	readers  int             // reads by the reader of requests
	began    chan struct{}   // gets a value when a read begins; nil: not wanted
	released <-chan struct{} // reads wait for it; nil: they do not wait
}

func newStorageDevice(t *testing.T) *storageDevice {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "empty"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &storageDevice{fileOf: fileOf{f}}
}

func (d *storageDevice) ReadAt(p []byte, off int64) (int, error) {
	stack := make([]byte, 16<<10)
	stack = stack[:runtime.Stack(stack, false)]
	d.mu.Lock()
	if strings.Contains(string(stack), ".serveRead(") {
		d.handed++
	} else {
		d.readers++
	}
	d.mu.Unlock()
	if d.began != nil {
		d.began <- struct{}{}
	}
	if d.released != nil {
		<-d.released
	}
	return cheapDevice(0).ReadAt(p, off)
}

// storageServer serves d on a unix socket, where bytes have arrived when the
// call returns. No stall monitor runs unless stalls is true, so that a busy machine
// changes nothing.
func storageServer(t *testing.T, d *storageDevice, stalls bool) net.Conn {
	t.Helper()
	s := &Server{Exporter: oneDevice{d}}
	if !stalls {
		s.stalls.active.Store(true) // as if it ran already
	}
	l := listen(t, "unix")
	serveOn(t, s, l)
	return rawDial(t, l)
}

// sendReads sends n requests for 4 KiB in one message.
func sendReads(t *testing.T, nc net.Conn, n int) {
	t.Helper()
	var b []byte
	for i := range n {
		b = wire.Request{Command: wire.CmdRead, Cookie: uint64(i), Length: 4096}.Append(b)
	}
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
}

// receiveReads receives the replies to n of them.
func receiveReads(t *testing.T, nc net.Conn, n int) {
	t.Helper()
	if _, err := io.ReadFull(nc, make([]byte, n*(wire.SimpleReplyLen+4096))); err != nil {
		t.Fatal(err)
	}
}

// readRaw makes n reads of that length, depth at a time, without allocating.
func readRaw(t *testing.T, nc net.Conn, n, depth, length int) {
	t.Helper()
	requests := make([]byte, 0, depth*wire.RequestLen)
	for i := range depth {
		req := wire.Request{Command: wire.CmdRead, Cookie: uint64(i), Offset: uint64(i * length % (15 << 20)), Length: uint64(length)}
		requests = req.Append(requests)
	}
	replies := make([]byte, depth*(wire.SimpleReplyLen+length))
	for range n / depth {
		if _, err := nc.Write(requests); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(nc, replies); err != nil {
			t.Fatal(err)
		}
	}
}
