//go:build linux

package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"

	"xapi-nbd/nbd/client"
)

// meteredConn counts the bytes that it receives.
type meteredConn struct {
	net.Conn
	received atomic.Int64
}

func (c *meteredConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received.Add(int64(n))
	return n, err
}

// splicedPull reads all of data, which a spliceDevice has, in pieces of that length, and
// returns how many bytes came over the connection and how many reads were not spliced.
func splicedPull(t *testing.T, data []byte, length int) (received, copied int64) {
	t.Helper()
	d := newSpliceDevice(t, data)
	file := capabilitiesOf(d).file
	if _ = file.ReadCached(make([]byte, 1), 0); !file.HasCache() {
		t.Skip("the file system of temporary files does not tell what is in the page cache")
	}
	l := listen(t, "tcp")
	serveOn(t, &Server{Exporter: oneDevice{d}}, l)
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	metered := &meteredConn{Conn: nc}
	c, err := client.New(context.Background(), metered, nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(context.Background(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := metered.received.Load()
	got := make([]byte, length)
	for off := 0; off < len(data); off += length {
		if _, err := conn.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, data[off:off+length]) {
			t.Fatalf("%d bytes at %d: wrong, or %v", length, off, err)
		}
	}
	return metered.received.Load() - before, d.copied.Load()
}

// Long runs of zeroes travel as holes though long reads are spliced; data is spliced.
func TestZeroesInSplicedReadsAreSentAsHoles(t *testing.T) {
	const size, piece = 32 << 20, 4 << 20
	data := make([]byte, size)
	pattern(data[:piece], 0)
	pattern(data[4*piece:5*piece], 0) // 8 MiB of 32 are data
	for _, length := range []int{spliceMin, 256 << 10, 2 << 20} {
		received, copied := splicedPull(t, data, length)
		// One read at the end of each run of zeroes is copied in vain.
		if got, limit := received, int64(2*piece+size/16); got > limit {
			t.Errorf("reads of %d bytes: %d bytes were sent for %d of data", length, got, 2*piece)
		}
		if most := int64((size-2*piece)/length + 1); copied > most {
			t.Errorf("reads of %d bytes: %d were copied, want %d at most", length, copied, most)
		}
	}
}

// TestSamplesDoNotMakeHoles: a range becomes a hole only after all of it was checked. After
// samples were wrong, the next ranges are not sampled.
func TestSamplesDoNotMakeHoles(t *testing.T) {
	const size, length = 32 << 20, 256 << 10
	r := rand.New(rand.NewPCG(1, 3))
	data := make([]byte, size)
	for page := 0; page < size; page += 4096 { // all samples are zeroes, and no page is
		data[page+sampleLen+r.IntN(4096-sampleLen)] = 1
	}
	received, copied := splicedPull(t, data, length)
	if received < size {
		t.Errorf("%d bytes were sent, want all %d", received, size)
	}
	if most := int64(size/length/wrongSamples + 1); copied > most {
		t.Errorf("%d reads of %d were copied, want %d at most", copied, size/length, most)
	}
}

// Data without zeroes is always spliced, and so is data with few of them.
func TestDataIsSpliced(t *testing.T) {
	data := patternOf(0, 32<<20)
	for at := 0; at < len(data); at += 8 * sampleEvery {
		clear(data[at : at+sampleEvery/2])
	}
	if _, copied := splicedPull(t, data, 2<<20); copied > 0 {
		t.Errorf("%d reads were copied, want none", copied)
	}
}
