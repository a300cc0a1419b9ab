package service

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// within requires that an action took about as long as its rate implies. The first step takes
// no time.
func within(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	if step := time.Second / stepsPerSecond; got > want+step || got < want-step-time.Millisecond {
		t.Errorf("%s took %v, want about %v", what, got, want)
	}
}

const mebibyte = 1 << 20

func TestRateLimits(t *testing.T) {
	tests := []struct {
		name        string
		all, perVDI config.ByteSize
		vdis        []string // of the connections, each of which reads 4 MiB
		want        time.Duration
	}{
		{"none", 0, 0, []string{"a"}, 0},
		{"one", mebibyte, 0, []string{"a"}, 4 * time.Second},
		{"shared by all", mebibyte, 0, []string{"a", "b"}, 8 * time.Second},
		{"a VDI", 0, mebibyte, []string{"a"}, 4 * time.Second},
		{"shared by those of a VDI", 0, mebibyte, []string{"a", "a"}, 8 * time.Second},
		{"not shared by others", 0, mebibyte, []string{"a", "b"}, 4 * time.Second},
		{"both", mebibyte, mebibyte * 3 / 4, []string{"a", "b"}, 8 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRates(tt.all, tt.perVDI)
				begin := time.Now()
				var readers sync.WaitGroup
				for _, vdi := range tt.vdis {
					p, leave := r.join(vdi)
					readers.Go(func() {
						defer leave()
						for range 4 {
							if p.Paces() {
								p.Pace(t.Context(), mebibyte)
							}
						}
					})
				}
				readers.Wait()
				within(t, "reading", time.Since(begin), tt.want)
				if len(r.vdis) != 0 {
					t.Errorf("%d VDIs are still known", len(r.vdis))
				}
			})
		})
	}
}

// TestRateLimitIsFair: a client with few short reads does not wait for one with many long ones.
func TestRateLimitIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r := newRates(mebibyte, 0)
		greedy, leave := r.join("a")
		defer leave()
		var reads sync.WaitGroup
		for range 64 {
			reads.Go(func() { greedy.Pace(ctx, 32*mebibyte) })
		}
		synctest.Wait()
		modest, leave := r.join("b")
		defer leave()
		for range 10 {
			begin := time.Now()
			modest.Pace(ctx, 4096)
			if got := time.Since(begin); got > 3*time.Second/stepsPerSecond {
				t.Errorf("a short read waited for %v", got)
			}
		}
		cancel()
		reads.Wait()
	})
}

// TestRateLimitChanges: a change also applies to reads that are waiting.
func TestRateLimitChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRates(config.MinRate, config.MinRate)
		p, leave := r.join("a")
		defer leave()
		begin := time.Now()
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.Pace(t.Context(), 1024*mebibyte) // hours
		}()
		synctest.Wait()
		r.set(0, 0)
		<-done
		if got := time.Since(begin); got > time.Second || p.Paces() {
			t.Errorf("went on after %v, Paces is %v", got, p.Paces())
		}
		r.set(0, mebibyte)
		begin = time.Now()
		p.Pace(t.Context(), mebibyte)
		within(t, "reading", time.Since(begin), time.Second)
	})
}
