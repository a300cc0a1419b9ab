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

func (d fileOf) Size() int64                             { return 16 << 20 }
func (d fileOf) Close() error                            { return nil }
func (d fileOf) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }
func (d fileOf) File() *os.File                          { return d.f }
func (d fileOf) Verify(off, n int64) error               { return nil }

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

// Reads from storage one at a time cost no hand-over to another goroutine, which
// takes a good part of the time of such a read.
func TestSingleStorageReadsAreNotHandedOver(t *testing.T) {
	d := newStorageDevice(t)
	nc := storageServer(t, d, false)
	const n = 200
	for range n {
		sendReads(t, nc, 1)
		receiveReads(t, nc, 1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.handed > 0 || d.readers != n {
		t.Errorf("%d of %d reads were handed over, %d were not; want none and all", d.handed, n, d.readers)
	}
}

// Reads from storage that came together overlap: the reader waits for none of them.
func TestStorageReadsThatArriveTogetherOverlap(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 8), release
	nc := storageServer(t, d, true)
	sendReads(t, nc, 8)
	for range 8 {
		<-d.began // all of them before one ends
	}
	close(release)
	receiveReads(t, nc, 8)
}

// When the peer turns out to send requests before it has its replies, the reader waits
// for storage no more, until the peer has not done so for a while.
func TestPipelinedStorageReadsOverlap(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 2), release
	nc := storageServer(t, d, false)
	sendReads(t, nc, 1)
	<-d.began // the reader waits for it
	sendReads(t, nc, 1)
	release <- struct{}{}
	<-d.began
	for range 5 {
		sendReads(t, nc, 1)
		<-d.began // although the one before has not ended
		release <- struct{}{}
		receiveReads(t, nc, 1)
	}
	close(release)
	receiveReads(t, nc, 2)
	d.mu.Lock()
	if d.readers != 1 {
		t.Errorf("the reader waited for storage %d times, want once", d.readers)
	}
	d.mu.Unlock()
	for range pipelinedReads + 1 {
		sendReads(t, nc, 1)
		<-d.began
		receiveReads(t, nc, 1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.readers < 2 {
		t.Error("single reads are still handed over")
	}
}

// A slow device holds nothing up: requests that come while the reader waits for
// storage are read and served.
func TestRequestsAreReadWhileStorageStalls(t *testing.T) {
	d := newStorageDevice(t)
	release := make(chan struct{})
	d.began, d.released = make(chan struct{}, 4), release
	nc := storageServer(t, d, true)
	for range 4 {
		sendReads(t, nc, 1)
		<-d.began
	}
	close(release)
	receiveReads(t, nc, 4)
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
