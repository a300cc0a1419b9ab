package main

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/internal/pagecache"
)

// wantNotCached requires that no page of these ranges of a device is in the page cache.
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

// loopDevice returns the name of the loop device of the only VBD.
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

// sectorsRead returns the number of sectors of 512 bytes that were read from a block device.
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
