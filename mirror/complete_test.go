package mirror

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// slowDevice is a device of which each write takes a second.
type slowDevice struct{ *simDevice }

func (d slowDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(time.Second)
	return d.simDevice.WriteAt(ctx, p, off)
}

// runOf returns a mirror that runs until the end of the test, and its ends. The secondary is
// slow if slow is true.
func runOf(t *testing.T, size int, slow bool, change func(*Config)) (*Mirror, [2]*simDevice) {
	t.Helper()
	ends := [2]*simDevice{
		newSimDevice(t, "primary", nil, 1, bytes.Repeat([]byte{1}, size)),
		newSimDevice(t, "secondary", nil, 1, make([]byte, size)),
	}
	for _, d := range ends {
		d.free = true
	}
	cfg := Config{Primary: ends[primary], Secondary: ends[secondary], Requests: 1, granule: modelGranule, copySize: modelGranule}
	if slow {
		cfg.Secondary = slowDevice{ends[secondary]}
	}
	if change != nil {
		change(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		_ = m.Run(ctx)
	}()
	synctest.Wait()
	t.Cleanup(func() {
		stop()
		<-ran
	})
	return m, ends
}

// TestCompleteHoldsBriefly: what is left is copied before changes are held, if copying it takes
// longer than clients can wait.
func TestCompleteHoldsBriefly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// One percent is copied in 50 s, which is more than MaxHold.
		m, ends := runOf(t, 5000*modelGranule, true, nil)
		result := make(chan error, 1)
		go func() { result <- m.Complete(t.Context(), Pivot, false) }()
		var longest time.Duration
		for ended := false; !ended; {
			began := time.Now()
			if err := m.WriteAt(t.Context(), []byte{2}, 0); err != nil {
				t.Fatal(err)
			}
			longest = max(longest, time.Since(began))
			select {
			case err := <-result:
				if err != nil {
					t.Errorf("Complete: %v", err)
				}
				ended = true
			case <-time.After(5 * time.Second):
			}
		}
		if longest > 5*time.Second {
			t.Errorf("a write took %v", longest)
		}
		if !bytes.Equal(ends[primary].data[1:], ends[secondary].data[1:]) {
			t.Error("the ends differ")
		}
	})
}

// TestDifferenceCopiesEverything: after a comparison that has found a difference the rest is not
// trusted, neither by this mirror nor by one that is resumed with the log.
func TestDifferenceCopiesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 8 * modelGranule
		log := newSimIntent(t, nil, size, modelGranule)
		log.disk.free = true
		m, ends := runOf(t, size, false, func(c *Config) { c.Intent = log })
		if err := m.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // the bits of the log are cleared
		synctest.Wait()
		if bytes.Contains(log.disk.data, []byte{1}) {
			t.Fatalf("bits of the log: %v, want none", log.disk.data)
		}
		for _, off := range []int64{0, 3 * modelGranule, size - 1} {
			ends[secondary].data[off]++ // by somebody else
		}
		var difference *DifferenceError
		if err := m.Complete(t.Context(), StopClients, true); !errors.As(err, &difference) {
			t.Fatalf("Complete: got error %v, want a DifferenceError", err)
		}
		synctest.Wait()
		if bytes.Contains(log.disk.data, []byte{0}) {
			t.Errorf("bits of the log: %v, want all", log.disk.data)
		}
		if err := m.Complete(t.Context(), StopClients, false); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(ends[primary].data, ends[secondary].data) {
			t.Error("the ends differ")
		}
	})
}
