package nbd

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

func TestRepliesInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 8
		s := newTestServer(t)
		d := newDevice(n * 512)
		var gates [n]*hold
		for i := range gates {
			gates[i] = newHold(t)
		}
		d.onRead = func(p []byte, off int64) (int, error) { return gates[off/512].read(p, off) }
		s.serve(d)
		p := s.negotiated("a")
		cookie := func(i int) uint64 { return 0xfedcba9876543210 ^ uint64(i)<<60 ^ uint64(i) }
		for i := range n {
			p.read(cookie(i), i*512, 512)
		}
		synctest.Wait()
		if reading, _ := d.meter.now(); reading != n {
			t.Fatalf("%d reads under way at once, want %d", reading, n)
		}
		order := rand.New(rand.NewPCG(1, 2)).Perm(n)
		for _, i := range append(order[1:], order[0]) {
			gates[i].release()
			if errno := p.answer(cookie(i), i*512, 512); errno != wire.Success {
				t.Errorf("read %d: %v", i, errno)
			}
		}
	})
}

// The first request of a connection must not delay the requests after it.
func TestRepliesDoNotWaitForASlowRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		held := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = func(p []byte, off int64) (int, error) {
			if off == 0 {
				return held.read(p, off)
			}
			pattern(p, off)
			return len(p), nil
		}
		s.serve(d)
		p := s.negotiated("a")
		p.read(1, 0, 4096)
		for i := 1; i < 100; i++ {
			p.reads(i*4096, 4096)
		}
		held.release()
		p.answer(1, 0, 4096)
	})
}
