package main

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

// fullRead describes the requests with which a client reads all of a disk.
type fullRead struct {
	secure, simple bool
	size, first    int64 // of the reads; the first one may be shorter
	depth          int
}

func (r fullRead) String() string {
	return fmt.Sprintf("TLS %t, simple replies %t, reads of %d KiB, the first of %d, %d at once", r.secure, r.simple, r.size>>10, r.first>>10, r.depth)
}

// readAll reads a whole disk of a fresh attachment and compares it. It returns how many
// bytes the client received and how many were read from the block device. It fails the test
// if a page of a hole is in the page cache.
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
