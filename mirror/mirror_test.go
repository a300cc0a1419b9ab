package mirror

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fixture is a mirror of two simulated disks of 64 granules of 64 KiB, in fake time. Their
// operations end at once, unless the test sets free to false.
type fixture struct {
	*Mirror
	t    *testing.T
	p, s *simDevice
	stop context.CancelFunc
	ran  chan error
}

const fixtureSize = 64 * defaultGranule

// run runs test with a mirror for which setup has changed the configuration.
func run(t *testing.T, setup func(*Config, *fixture), test func(*testing.T, *fixture)) {
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		data := bytes.Repeat([]byte("0123456789abcdef"), fixtureSize/16)
		f := &fixture{t: t, ran: make(chan error, 1)}
		f.p = newSimDevice(t, "primary", rng, 1, data)
		f.s = newSimDevice(t, "secondary", rng, 1, make([]byte, fixtureSize))
		f.p.free, f.s.free = true, true
		cfg := Config{Primary: f.p, Secondary: f.s}
		if setup != nil {
			setup(&cfg, f)
		}
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		f.Mirror = m
		ctx, stop := context.WithCancel(t.Context())
		f.stop = stop
		go func() { f.ran <- m.Run(ctx) }()
		defer func() {
			for _, d := range []*simDevice{f.p, f.s} {
				d.kill(false)
			}
			stop()
		}()
		test(t, f)
	})
}

// wait waits until the mirror is ready to be completed.
func (f *fixture) wait() {
	f.t.Helper()
	if err := f.Wait(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// write begins a write of n bytes, and returns the channel for its result.
func (f *fixture) write(off, n int64, value byte) <-chan error {
	result := make(chan error, 1)
	go func() { result <- f.WriteAt(f.t.Context(), bytes.Repeat([]byte{value}, int(n)), off) }()
	synctest.Wait()
	return result
}

// answered reports whether a request has ended, with success.
func (f *fixture) answered(result <-chan error) bool {
	f.t.Helper()
	synctest.Wait()
	select {
	case err := <-result:
		if err != nil {
			f.t.Error(err)
		}
		return true
	default:
		return false
	}
}

// only returns the one operation that waits at a device.
func (f *fixture) only(d *simDevice) *simOp {
	f.t.Helper()
	synctest.Wait()
	if len(d.pending) != 1 {
		f.t.Fatalf("%s: %v in flight, want one operation", d.name, d.pending)
	}
	return d.pending[0]
}

func (f *fixture) equal() bool { return bytes.Equal(f.p.data, f.s.data) }

type readOnly struct{ *simDevice }

func (readOnly) ReadOnly() bool { return true }

type blockSize struct {
	*simDevice
	size int64
}

func (b blockSize) BlockSize() int64 { return b.size }

func TestRefusals(t *testing.T) {
	device := func(size int) *simDevice { return newSimDevice(t, "device", nil, 1, make([]byte, size)) }
	same := device(4096)
	for name, cfg := range map[string]Config{
		"no secondary":            {Primary: device(4096)},
		"the same device":         {Primary: same, Secondary: same},
		"sizes":                   {Primary: device(4096), Secondary: device(4095)},
		"nothing":                 {Primary: device(0), Secondary: device(0)},
		"read-only":               {Primary: device(4096), Secondary: readOnly{device(4096)}},
		"block sizes 512 and 520": {Primary: blockSize{device(4096), 512}, Secondary: blockSize{device(4096), 520}},
		"block size 3":            {Primary: device(4096), Secondary: blockSize{device(4096), 3}},
		"block size 128 KiB":      {Primary: device(4096), Secondary: blockSize{device(4096), 128 << 10}},
		"block size 0":            {Primary: device(4096), Secondary: blockSize{device(4096), 0}},
		"dirty behind the end": {Primary: device(4096), Secondary: device(4096),
			Dirty: func(yield func(off, n int64) bool) { yield(4000, 97) }},
	} {
		if _, err := New(cfg); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v, want an error that matches ErrRefused", name, err)
		}
	}
	if _, err := New(Config{Primary: blockSize{device(4096), 512}, Secondary: blockSize{device(4096), 4096}}); err != nil {
		t.Error(err)
	}
}

// Requests that are not inside the disk reach no device.
func TestRange(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		changes := f.p.changes
		for _, off := range []int64{-1, fixtureSize - 1, fixtureSize + 1, 1<<63 - 1} {
			for name, err := range map[string]error{
				"read":   f.ReadAt(t.Context(), make([]byte, 2), off),
				"write":  f.WriteAt(t.Context(), make([]byte, 2), off),
				"zeroes": f.WriteZeroes(t.Context(), off, 2),
				"trim":   f.Trim(t.Context(), off, 2),
			} {
				if !errors.Is(err, ErrRange) || !errors.Is(err, syscall.EINVAL) {
					t.Errorf("%s at %d: %v, want ErrRange", name, off, err)
				}
			}
		}
		if f.p.changes != changes {
			t.Error("a request reached the primary")
		}
	})
}

// A client is answered after two seconds although the secondary is not. The range is not copied
// and not changed at the secondary until that write has ended.
func TestStall(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.s.free = false
		first := f.write(100, 10, 'x')
		late := f.only(f.s)
		time.Sleep(defaultStall - 1)
		if f.answered(first) {
			t.Fatal("answered before the secondary, and too early")
		}
		time.Sleep(time.Nanosecond)
		if !f.answered(first) {
			t.Fatal("not answered after two seconds")
		}
		for _, off := range []int64{105, 5 * defaultGranule} {
			if !f.answered(f.write(off, 10, 'y')) {
				t.Errorf("a change at %d waits for the secondary, which is known to be stuck", off)
			}
		}
		if s := f.Status(); s.Stalls != 1 || s.State != Mirroring || s.Ready || s.Dirty == 0 {
			t.Errorf("status while the secondary is stuck: %+v", s)
		}
		time.Sleep(time.Minute)
		for _, o := range f.s.pending {
			if o != late && o.off < defaultGranule {
				t.Errorf("%v although a write to the granule is in flight", o)
			}
		}
		f.s.mu.Lock()
		f.s.free = true
		f.s.mu.Unlock()
		for _, o := range append([]*simOp(nil), f.s.pending...) {
			f.s.finish(o, nil)
		}
		f.wait()
		if !f.equal() || f.s.data[105] != 'y' {
			t.Error("the ends differ after the secondary has answered")
		}
	})
}

// A change waits two seconds at most for a copy that is stuck, and later ones do not wait.
func TestStalledCopy(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		f.s.free = false
		if err := f.Trim(t.Context(), 0, 10); err != nil {
			t.Fatal(err)
		}
		f.only(f.s)
		began := time.Now()
		for range 3 {
			if err := f.WriteAt(t.Context(), []byte("x"), 0); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(began); waited != defaultStall {
			t.Errorf("three changes waited %v, want %v", waited, defaultStall)
		}
	})
}

// Zeroes are not written where the secondary has them, and not as data elsewhere.
func TestZeroes(t *testing.T) {
	for _, blank := range []bool{false, true} {
		run(t, func(c *Config, f *fixture) {
			clear(f.p.data[defaultGranule : fixtureSize-10])
			copy(f.s.data, f.p.data)
			copy(f.s.data, make([]byte, defaultGranule))
			c.SecondaryIsZero = blank
		}, func(t *testing.T, f *fixture) {
			f.wait()
			s := f.Status()
			if want := int64(2 * defaultGranule); s.Sent != want || s.Copied != fixtureSize {
				t.Errorf("sent %d bytes, want %d; copied %d, want %d", s.Sent, want, s.Copied, fixtureSize)
			}
			if writes := 2; blank && f.s.changes != writes {
				t.Errorf("%d changes of the secondary, want %d", f.s.changes, writes)
			}
			if !f.equal() {
				t.Error("the ends differ")
			}
			// What has been written once has to be zeroed.
			if err := f.WriteZeroes(t.Context(), 0, defaultGranule); err != nil {
				t.Fatal(err)
			}
			if f.wait(); !f.equal() {
				t.Error("the ends differ after a range was zeroed")
			}
		})
	}
}

// asked is a device that counts questions for its extents.
type asked struct {
	*simDevice
	questions int
}

func (d *asked) Extents(ctx context.Context, off, n int64) ([]Extent, error) {
	d.questions++
	return d.simDevice.Extents(ctx, off, n)
}

// Where there are only data the primary is not asked about each range.
func TestExtents(t *testing.T) {
	var p *asked
	run(t, func(c *Config, f *fixture) {
		p = &asked{simDevice: f.p}
		c.Primary, c.Requests, c.copySize = p, 1, defaultGranule
	}, func(t *testing.T, f *fixture) {
		if f.wait(); p.questions > 10 || !f.equal() {
			t.Errorf("%d questions for 64 granules, want 10 at most; equal: %t", p.questions, f.equal())
		}
	})
}

// Copying of data is limited; clients and zeroes are not. A new limit holds at once.
func TestRate(t *testing.T) {
	run(t, func(c *Config, f *fixture) { c.Rate = 1; clear(f.p.data) }, func(t *testing.T, f *fixture) {
		began := time.Now()
		if f.wait(); time.Since(began) > 2*time.Second {
			t.Errorf("zeroes took %v", time.Since(began))
		}
	})
	run(t, func(c *Config, _ *fixture) { c.Rate = 256 << 10 }, func(t *testing.T, f *fixture) {
		began := time.Now()
		if err := f.WriteAt(t.Context(), bytes.Repeat([]byte("x"), fixtureSize), 0); err != nil || time.Since(began) > 0 {
			t.Errorf("a change took %v: %v", time.Since(began), err)
		}
		time.Sleep(7 * time.Second)
		s := f.Status()
		if s.Copied < 1<<20 || s.Copied > 3<<20 {
			t.Errorf("%d bytes copied after 7 s, want about 2 MiB", s.Copied)
		}
		if s.State != Copying || s.Rate < 100<<10 || s.Rate > 400<<10 || !s.Converging || s.TimeLeft < 5*time.Second || s.TimeLeft > 30*time.Second {
			t.Errorf("status: %+v", s)
		}
		f.SetRate(0)
		began = time.Now()
		f.wait()
		if waited := time.Since(began); waited > 2*time.Second {
			t.Errorf("ready %v after the limit was removed", waited)
		}
	})
}

// Few copies are in flight while clients use the disk.
func TestCopiesGiveWay(t *testing.T) {
	run(t, func(c *Config, f *fixture) {
		f.s.free = false
		c.Requests, c.copySize = 16, defaultGranule
	}, func(t *testing.T, f *fixture) {
		inFlight := func() int {
			synctest.Wait()
			n := len(f.s.pending)
			f.Status() // by its lock the mirror goes on after the line above
			return n
		}
		if n := inFlight(); n != 16 {
			t.Errorf("%d copies in flight without clients, want 16", n)
		}
		if err := f.ReadAt(t.Context(), make([]byte, 1), 0); err != nil {
			t.Fatal(err)
		}
		end := func(n int) {
			for range n {
				f.s.finish(f.s.pending[0], nil)
				synctest.Wait()
			}
		}
		time.Sleep(slowCopy)
		if end(15); inFlight() != 2 {
			t.Errorf("%d slow copies in flight while a client reads, want 2", inFlight())
		}
		time.Sleep(activeFor)
		if end(1); inFlight() != 16 {
			t.Errorf("%d copies in flight after the client has left, want 16", inFlight())
		}
		if err := f.ReadAt(t.Context(), make([]byte, 1), 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		if end(16); inFlight() != 0 {
			t.Errorf("%d fast copies in flight right after others, want none", inFlight())
		}
		time.Sleep(time.Millisecond)
		if inFlight() != 1 {
			t.Errorf("%d fast copies in flight while a client reads, want 1", inFlight())
		}
		f.mu.Lock()
		f.Mirror.t.passes = 1
		f.unlock()
		if end(1); inFlight() != 2 {
			t.Errorf("%d copies in flight in the second pass, want 2", inFlight())
		}
	})
}

// The copy in flight ends, and no other one begins until Resume.
func TestPause(t *testing.T) {
	run(t, func(c *Config, f *fixture) { c.Requests, f.s.free = 1, false }, func(t *testing.T, f *fixture) {
		o := f.only(f.s)
		f.Pause()
		f.s.free = true
		f.s.finish(o, nil)
		time.Sleep(time.Minute)
		if s := f.Status(); s.Copied != maxCopySize || !s.Paused {
			t.Errorf("status while paused: %+v", s)
		}
		if err := f.Complete(t.Context(), Pivot, false); !errors.Is(err, ErrPaused) {
			t.Errorf("complete: %v, want ErrPaused", err)
		}
		f.Resume()
		f.wait()
	})
}

// A disk of which one granule is written again as soon as it has been copied does not converge
// by copying, so changes are made at both ends.
func TestConvergence(t *testing.T) {
	run(t, func(c *Config, _ *fixture) { c.Requests = 1 }, func(t *testing.T, f *fixture) {
		f.s.free = false
		for round := 0; f.Status().Mode == Background; round++ {
			synctest.Wait()
			if round > 500 {
				t.Fatal("still in mode background")
			}
			for _, o := range append([]*simOp(nil), f.s.pending...) {
				f.s.finish(o, nil)
			}
			for off := int64(0); off < fixtureSize; off += 32 * defaultGranule {
				if !f.answered(f.write(off, 10, byte(round))) {
					return // in mode blocking it waits
				}
			}
		}
	})
}

// What clients wrote and the primary has lost is reported by their next flush, once.
func TestPrimaryLoses(t *testing.T) {
	run(t, nil, func(t *testing.T, f *fixture) {
		f.wait()
		for range 2 {
			if err := f.WriteAt(t.Context(), []byte("x"), 0); err != nil {
				t.Fatal(err)
			}
			f.p.lose()
			if err := f.Flush(t.Context()); !errors.Is(err, ErrLost) || !errors.Is(err, syscall.EIO) {
				t.Errorf("flush after a loss: %v, want ErrLost", err)
			}
			if err := f.Flush(t.Context()); err != nil {
				t.Errorf("second flush after a loss: %v", err)
			}
		}
		f.p.lose()
		if err := f.Flush(t.Context()); err != nil {
			t.Errorf("flush after a loss of nothing: %v", err)
		}
		if f.wait(); !f.equal() {
			t.Error("the ends differ after a loss of the primary")
		}
	})
}
