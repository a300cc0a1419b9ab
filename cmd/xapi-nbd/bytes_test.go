package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/internal/pagecache"
	"xapi-nbd/nbd/client"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// mostWaste is how many bytes may be moved for each one that is in a block with data.
const mostWaste = 1.02

// fullRead is how a client reads all of a disk.
type fullRead struct {
	secure, simple bool
	size, first    int64 // of the reads; the first one may be shorter
	depth          int
}

func (r fullRead) String() string {
	return fmt.Sprintf("TLS %t, simple replies %t, reads of %d KiB, the first of %d, %d at once", r.secure, r.simple, r.size>>10, r.first>>10, r.depth)
}

// TestOnlyTheBytesThatMatter reads all of a sparse disk from a block device. Neither the
// server nor the kernel on its behalf may read holes, and clients with structured replies
// must not receive them.
func TestOnlyTheBytesThatMatter(t *testing.T) {
	requires.LoopDevices(t)
	d := newTrackedDisk(t, xapitest.Config{Loop: true})
	var data int64 // in blocks with data
	var holes []extent
	for _, e := range d.nbdMap(t, d.now, "base:allocation", false) {
		if e.Type == 0 {
			data += e.Length
		} else {
			holes = append(holes, e)
		}
	}
	shapes := []fullRead{
		{size: 4 << 10, first: 4 << 10, depth: 8},
		{size: 48 << 10, first: 16 << 10, depth: 1}, // across the borders of blocks
		{size: 256 << 10, first: 256 << 10, depth: 1},
		{size: 256 << 10, first: 256 << 10, depth: 16},
		{size: 2 << 20, first: 2 << 20, depth: 1},
		{size: 2 << 20, first: 1 << 20, depth: 10},
	}
	for _, secure := range []bool{false, true} {
		for _, simple := range []bool{false, true} {
			for _, r := range shapes {
				r.secure, r.simple = secure, simple
				wire, device := d.readAll(t, r, holes)
				// With the race detector on a busy machine the count was once half as much
				// again, which is not explained. It is not what was read of holes: readAll
				// looks for that every time.
				for try := 0; try < 2 && float64(device) > mostWaste*float64(data); try++ {
					t.Logf("%v: %d bytes were read from the device; reading again", r, device)
					wire, device = d.readAll(t, r, holes)
				}
				if limit := int64(mostWaste * float64(data)); device > limit {
					t.Errorf("%v: %d bytes were read from the device, %d have data", r, device, data)
				} else if device < data {
					t.Errorf("%v: only %d bytes were read from the device, %d have data: it was cached", r, device, data)
				} else if !simple && r.size > 64<<10 && wire > limit {
					t.Errorf("%v: %d bytes were received, %d have data", r, wire, data)
				}
			}
		}
	}
}

// TestOnlyTheChangedBytes reads only what has changed since a snapshot, one piece at a time:
// nothing else is read from the device.
func TestOnlyTheChangedBytes(t *testing.T) {
	requires.LoopDevices(t)
	d := newTrackedDisk(t, xapitest.Config{Loop: true})
	context := service.UnchangedBlocks + d.base
	extents := d.nbdMap(t, d.now, context, false)
	conn := d.openAs(d.p, false, false, d.export(d.now), context)
	loop := d.loopDevice()
	before := sectorsRead(t, loop)
	var changed int64
	const piece = 64 << 10
	for _, e := range extents {
		for off := e.Offset; e.Type == 0 && off < e.Offset+e.Length; off += piece {
			must(t, conn.Read(t.Context(), make([]byte, piece), off))
			changed += piece
		}
	}
	if got := (sectorsRead(t, loop) - before) * 512; changed == 0 || got != changed {
		t.Errorf("%d bytes were read from the device, want the %d that have changed", got, changed)
	}
	must(t, conn.Close())
	d.waitClean(d.p)
}

// readAll reads a whole disk of a fresh attachment and compares it. It returns how many
// bytes the client received and how many were read from the block device. No page of a hole
// may have come into the page cache.
func (d *trackedDisk) readAll(t *testing.T, r fullRead, holes []extent) (wire, device int64) {
	t.Helper()
	var nc countingConn
	var err error
	nc.Conn, err = net.Dial("tcp", d.p.addr)
	must(t, err)
	cfg := client.Config{NoStructured: r.simple}
	if r.secure {
		cfg.TLSConfig = d.trust.Client
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := client.New(ctx, &nc, &cfg)
	must(t, err)
	conn, err := c.Go(ctx, d.export(d.now))
	must(t, err)
	loop := d.loopDevice()
	before := sectorsRead(t, loop)
	var mu sync.Mutex
	next := int64(0)
	take := func() (off, n int64) {
		mu.Lock()
		defer mu.Unlock()
		off, n = next, min(r.size, trackedSize-next)
		if off == 0 {
			n = r.first
		}
		next += n
		return off, n
	}
	group, ctx := errgroup.WithContext(ctx)
	for range r.depth {
		group.Go(func() error {
			p := make([]byte, r.size)
			for off, n := take(); n > 0; off, n = take() {
				if err := conn.Read(ctx, p[:n], off); err != nil {
					return err
				}
				if string(p[:n]) != string(d.fresh[off:off+n]) {
					return fmt.Errorf("%d bytes at %d are not those of the disk", n, off)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatalf("%v: %v", r, err)
	}
	wire, device = nc.received.Load(), (sectorsRead(t, loop)-before)*512
	wantNotCached(t, "/dev/"+loop, holes)
	must(t, conn.Close())
	d.waitClean(d.p)
	return wire, device
}

// wantNotCached requires that nothing of these ranges of a device is in the page cache.
func wantNotCached(t *testing.T, path string, ranges []extent) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	for _, e := range ranges {
		for off := e.Offset; off < e.Offset+e.Length; off += 4096 {
			resident, err := pagecache.Resident(int(f.Fd()), off)
			must(t, err)
			if resident {
				t.Errorf("the hole at %d of %d bytes was read at %d", e.Offset, e.Length, off)
				break
			}
		}
	}
}

// loopDevice is the name of the loop device of the only VBD.
func (d *trackedDisk) loopDevice() string {
	d.t.Helper()
	vbds := d.host.VBDs()
	if len(vbds) != 1 {
		d.t.Fatalf("VBDs: got %+v, want one", vbds)
	}
	path, err := os.Readlink(filepath.Join(d.host.DeviceDir(), vbds[0].Device))
	must(d.t, err)
	return filepath.Base(path)
}

// sectorsRead is how many sectors of 512 bytes were read from a block device.
func sectorsRead(t *testing.T, device string) int64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", device, "stat"))
	must(t, err)
	fields := strings.Fields(string(text))
	if len(fields) < 3 {
		t.Fatalf("%s has no counters: %q", device, text)
	}
	n, err := strconv.ParseInt(fields[2], 10, 64)
	must(t, err)
	return n
}

// countingConn counts the bytes that are received.
type countingConn struct {
	net.Conn
	received atomic.Int64
}

// Read implements net.Conn.
func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received.Add(int64(n))
	return n, err
}
