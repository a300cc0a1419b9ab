package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// poolHost is a server in memory, to which a Pool connects. Its connections can be cut.
type poolHost struct {
	t   *testing.T
	dev func() nbd.Device

	mu       sync.Mutex  // guards the fields below
	cuts     []int       // bytes after which the next connections break
	down     error       // why connecting fails; nil while it does not
	attempts []time.Time // of connecting
	last     *cutConn    // the newest connection
}

func newPoolHost(t *testing.T, ram *nbdtest.RAM) *poolHost {
	return &poolHost{t: t, dev: func() nbd.Device { return ram.Again() }}
}

func (h *poolHost) open(ctx context.Context) (*Conn, error) {
	h.mu.Lock()
	h.attempts = append(h.attempts, time.Now())
	down, left := h.down, -1
	if len(h.cuts) > 0 {
		left, h.cuts = h.cuts[0], h.cuts[1:]
	}
	h.mu.Unlock()
	if down != nil {
		return nil, down
	}
	pipe, _ := nbdtest.Pipe(h.t, &nbd.Server{Exporter: nbdtest.Single("a", h.dev())})
	near := &cutConn{Conn: pipe, left: -1}
	c, err := New(ctx, near, &Config{MetaContexts: []string{wire.BaseAllocation}})
	if err != nil {
		near.Close()
		return nil, err
	}
	conn, err := c.Go(ctx, "a")
	if err != nil {
		c.Abort()
		return nil, err
	}
	near.cutAfter(left)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = near
	return conn, nil
}

// times returns when the Pool has tried to connect.
func (h *poolHost) times() []time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.attempts)
}

// setDown makes connecting fail with err, or succeed again.
func (h *poolHost) setDown(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.down = err
}

// cutConn breaks after so many bytes have been written by the client; never if left is
// negative.
type cutConn struct {
	net.Conn
	mu   sync.Mutex
	left int
}

func (c *cutConn) cutAfter(left int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = left
}

func (c *cutConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < 0 || len(p) <= c.left {
		if c.left > 0 {
			c.left -= len(p)
		}
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:c.left])
	c.Close()
	return n, syscall.ECONNRESET
}

// isLost reports whether an error has a LostError in it.
func isLost(err error) bool {
	var lost *LostError
	return errors.As(err, &lost)
}

// newTestPool returns a Pool that is closed at the end of the test.
func newTestPool(t *testing.T, h *poolHost, cfg PoolConfig) *Pool {
	t.Helper()
	cfg.Open = h.open
	p, err := NewPool(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return p
}

// TestPoolRepeatsWhatWasLost cuts connections at all positions of a few requests: they
// succeed nevertheless, and the right data arrives.
func TestPoolRepeatsWhatWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 10
		for cut := 0; cut < 400; cut += 7 {
			ram := nbdtest.NewRAM(patternOf(0, size))
			h := newPoolHost(t, ram)
			h.cuts = []int{cut, cut / 2, -1}
			p := newTestPool(t, h, PoolConfig{RetryFor: time.Minute})
			var calls sync.WaitGroup
			for i := range int64(4) {
				calls.Go(func() {
					if err := p.Write(t.Context(), bytes.Repeat([]byte{byte(i)}, 64), i*1024, false); err != nil {
						t.Errorf("cut at %d: write: %v", cut, err)
					}
					got := make([]byte, 64)
					if err := p.Read(t.Context(), got, i*1024+64); err != nil || !bytes.Equal(got, patternOf(i*1024+64, 64)) {
						t.Errorf("cut at %d: read: error %v, or wrong data", cut, err)
					}
				})
			}
			calls.Wait()
			if err := errors.Join(p.WriteZeroes(t.Context(), 4096, 512, ZeroOptions{}), p.Trim(t.Context(), 5120, 512, false), p.Flush(t.Context())); err != nil {
				t.Errorf("cut at %d: %v", cut, err)
			}
			if _, err := p.BlockStatus(t.Context(), wire.BaseAllocation, 0, size); err != nil {
				t.Errorf("cut at %d: block status: %v", cut, err)
			}
			stable := ram.Stable()
			for i := range 4 {
				if !bytes.Equal(stable[i*1024:i*1024+64], bytes.Repeat([]byte{byte(i)}, 64)) {
					t.Errorf("cut at %d: wrong data on stable storage", cut)
				}
			}
			if p.Losses() != 2 && cut < 100 {
				t.Errorf("cut at %d: %d losses, want 2", cut, p.Losses())
			}
		}
	})
}

// TestPoolPausesAndGivesUp: attempts become rarer, and end after RetryFor.
func TestPoolPausesAndGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
		h.cuts = []int{0}
		var lost, failed []string
		p := newTestPool(t, h, PoolConfig{
			RetryFor: 20 * time.Second,
			Lost:     func(err error) { lost = append(lost, err.Error()) },
			Failed:   func(err error) { failed = append(failed, err.Error()) },
		})
		h.setDown(syscall.ECONNREFUSED)
		begin := time.Now()
		err := p.Read(t.Context(), make([]byte, 512), 0)
		if took := time.Since(begin); took != 20*time.Second {
			t.Errorf("gave up after %v, want 20s", took)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || !isLost(err) || !strings.Contains(err.Error(), "not connected again within 20s") {
			t.Errorf("got error %v, want one with the loss and the last attempt", err)
		}
		var after []string
		for _, at := range h.times()[1:] {
			after = append(after, at.Sub(begin).String())
		}
		if got, want := fmt.Sprint(after), "[0s 100ms 300ms 700ms 1.5s 3.1s 6.3s 11.3s 16.3s]"; got != want {
			t.Errorf("attempts: got %s, want %s", got, want)
		}
		if len(lost) != 1 || len(failed) != len(after) {
			t.Errorf("told of %q and %q", lost, failed)
		}
		if again := p.Read(t.Context(), make([]byte, 512), 0); again == nil || p.Err() == nil {
			t.Errorf("later calls: error %v, Err %v", again, p.Err())
		}
	})
}

// TestPoolComesBack has a server that is away for less than RetryFor.
func TestPoolComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(patternOf(0, 4096)))
		h.cuts = []int{0, -1, 0}
		var restored atomic.Int64
		p := newTestPool(t, h, PoolConfig{RetryFor: 20 * time.Second, Restored: func() { restored.Add(1) }})
		for _, away := range []error{
			syscall.ECONNREFUSED,
			&Error{Op: "NBD_OPT_GO", Reply: wire.RepErrPolicy, Text: "xapi not reachable yet"},
			&Error{Op: "NBD_OPT_GO", Reply: wire.RepErrUnknown, Text: "still being detached"},
			&Error{Op: "NBD_OPT_GO", Reply: wire.RepErrShutdown},
		} {
			h.setDown(away)
			time.AfterFunc(15*time.Second, func() { h.setDown(nil) })
			h.last.cutAfter(0)
			got := make([]byte, 512)
			if err := p.Read(t.Context(), got, 512); err != nil || !bytes.Equal(got, patternOf(512, 512)) {
				t.Errorf("%v: error %v, or wrong data", away, err)
			}
		}
		synctest.Wait()
		if restored.Load() != 4 || p.Losses() != 4 {
			t.Errorf("restored %d times after %d losses, want 4", restored.Load(), p.Losses())
		}
		if n := p.Changes(); n != 8 {
			t.Errorf("%d changes, want 4 losses and 4 connections that were made again", n)
		}
	})
}

// TestPoolFinalErrors: some errors do not get better.
func TestPoolFinalErrors(t *testing.T) {
	for name, final := range map[string]error{
		"TLS": &Error{Op: "NBD_OPT_GO", Reply: wire.RepErrTLSReqd}, "invalid": &Error{Reply: wire.RepErrInvalid}, "unsupported": ErrUnsupported,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
				h.cuts = []int{0}
				p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour})
				h.setDown(final)
				begin := time.Now()
				if err := p.Flush(t.Context()); !errors.Is(err, final) || !isLost(err) || time.Since(begin) != 0 {
					t.Errorf("after %v: got error %v, want at once the loss and %v", time.Since(begin), err, final)
				}
			})
		})
	}
	t.Run("of a request", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, 4096)))
			f.Fail(0, 512, syscall.EIO)
			h := &poolHost{t: t, dev: func() nbd.Device { return f }}
			p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour})
			if err := p.Read(t.Context(), make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
				t.Errorf("got error %v, want EIO", err)
			}
			if err := p.Read(t.Context(), make([]byte, 512), 512); err != nil || p.Losses() != 0 || len(h.times()) != 1 {
				t.Errorf("then: error %v, %d losses, %d attempts", err, p.Losses(), len(h.times()))
			}
		})
	})
	t.Run("without retrying", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
			h.cuts = []int{0}
			p := newTestPool(t, h, PoolConfig{})
			if err := p.Flush(t.Context()); !isLost(err) {
				t.Errorf("got error %v, want the loss", err)
			}
			if err := p.Flush(t.Context()); err == nil || len(h.times()) != 1 {
				t.Errorf("later: error %v after %d attempts", err, len(h.times()))
			}
		})
	})
}

// TestPoolRefusesAnotherExport has a server that shows another disk after a loss.
func TestPoolRefusesAnotherExport(t *testing.T) {
	disk := func(size int, change func(*nbdtest.RAM)) func() nbd.Device {
		return func() nbd.Device {
			r := nbdtest.NewRAM(make([]byte, size))
			r.Text, r.Min = "disk one", 512
			if change != nil {
				change(r)
			}
			return r
		}
	}
	for want, dev := range map[string]func() nbd.Device{
		"8192 bytes instead of 4096":              disk(8192, nil),
		`"disk two" instead of "disk one"`:        disk(4096, func(r *nbdtest.RAM) { r.Text = "disk two" }),
		"1024 bytes instead of 512":               disk(4096, func(r *nbdtest.RAM) { r.Min = 1024 }),
		"it is read-only now":                     func() nbd.Device { return nbd.ReadOnly(disk(4096, nil)()) },
		"without CAN_MULTI_CONN":                  func() nbd.Device { return single{disk(4096, nil)().(*nbdtest.RAM)} },
		"the server shows another export than be": disk(0, nil),
	} {
		t.Run(want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &poolHost{t: t, dev: disk(4096, nil), cuts: []int{0}}
				p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour})
				h.dev = dev
				for range 2 {
					if err := p.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("got error %v, want one with %q", err, want)
					}
				}
			})
		})
	}
	t.Run("allowed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &poolHost{t: t, dev: disk(4096, nil), cuts: []int{0}}
			p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour, SameExport: func(_, _ wire.ExportInfo) bool { return true }})
			h.dev = disk(4096, func(r *nbdtest.RAM) { r.Text = "another name" })
			if err := p.Flush(t.Context()); err != nil {
				t.Error(err)
			}
		})
	})
}

// single is a device that does not promise consistency between connections.
type single struct{ *nbdtest.RAM }

func (single) MultiConn() bool { return false }

// TestPoolConnections: there are several where the server allows it. Calls are spread over
// them, and go on while one is lost.
func TestPoolConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := nbdtest.NewFaultyRAM(nbdtest.NewRAM(make([]byte, 4096)))
		h := &poolHost{t: t, dev: func() nbd.Device { return f.RAM.Again() }}
		p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour, Connections: 3})
		if p.Connections() != 3 || len(h.times()) != 3 {
			t.Errorf("%d connections of %d, want 3", p.Connections(), len(h.times()))
		}
		h.setDown(syscall.ECONNREFUSED)
		h.last.Close()
		for range 6 {
			if err := p.Read(t.Context(), make([]byte, 512), 0); err != nil {
				t.Errorf("with two connections: %v", err)
			}
		}
		if p.Losses() != 1 {
			t.Errorf("%d losses, want 1", p.Losses())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := &poolHost{t: t, dev: func() nbd.Device { return single{nbdtest.NewRAM(make([]byte, 4096))} }}
		if p := newTestPool(t, h, PoolConfig{Connections: 3}); p.Connections() != 1 {
			t.Errorf("%d connections, want 1", p.Connections())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
		_, err := NewPool(t.Context(), PoolConfig{Connections: 3, Open: func(ctx context.Context) (*Conn, error) {
			if len(h.times()) > 0 {
				return nil, syscall.ECONNREFUSED
			}
			return h.open(ctx)
		}})
		if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "of 3") {
			t.Errorf("got error %v, want that of the second or third connection", err)
		}
	})
}

// TestPoolOpensSeveralAtOnce: all connections but the first are made openAtOnce at a time.
func TestPoolOpensSeveralAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
		var calls atomic.Int32
		more, made := make(chan struct{}), make(chan error)
		var p *Pool
		go func() { // ends when all connections are made
			var err error
			p, err = NewPool(t.Context(), PoolConfig{Connections: 2 + openAtOnce, Open: func(ctx context.Context) (*Conn, error) {
				if calls.Add(1) > 1 {
					<-more
				}
				return h.open(ctx)
			}})
			made <- err
		}()
		synctest.Wait()
		if got := calls.Load() - 1; got != openAtOnce {
			t.Errorf("%d connections are being made, want %d", got, openAtOnce)
		}
		close(more)
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestPoolClose: it ends calls that wait for a connection, and attempts to make one.
func TestPoolClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
		h.cuts = []int{0}
		p := newTestPool(t, h, PoolConfig{RetryFor: time.Hour})
		h.setDown(syscall.ECONNREFUSED)
		ctx, cancel := context.WithCancelCause(t.Context())
		waiting := make(chan error, 2)
		go func() { waiting <- p.Flush(t.Context()) }()
		synctest.Wait()
		go func() { waiting <- p.Flush(ctx) }()
		synctest.Wait()
		given := errors.New("given up")
		cancel(given)
		if err := <-waiting; !errors.Is(err, given) {
			t.Errorf("a call whose context ended: %v", err)
		}
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if err := <-waiting; !errors.Is(err, net.ErrClosed) {
			t.Errorf("a waiting call: got %v, want net.ErrClosed", err)
		}
		if err := p.Flush(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a call after Close: %v", err)
		}
	})
}

// TestPoolDoesNotHurryIntoLosses: a call that breaks every connection is repeated with growing
// pauses, and for RetryFor.
func TestPoolDoesNotHurryIntoLosses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolHost(t, nbdtest.NewRAM(make([]byte, 4096)))
		h.cuts = make([]int, 1000)
		p := newTestPool(t, h, PoolConfig{RetryFor: 20 * time.Second})
		begin := time.Now()
		err := p.Flush(t.Context())
		if took := time.Since(begin); err == nil || !strings.Contains(err.Error(), "repeated for 20s") || took < 20*time.Second || took > 30*time.Second {
			t.Errorf("after %v: got error %v", took, err)
		}
		if n := len(h.times()); n < 8 || n > 12 {
			t.Errorf("%d connections, want about 10", n)
		}
	})
}
