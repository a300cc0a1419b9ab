package auth

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/xapi"
)

// slowFetch returns a policy whose call to xapi takes d and returns the result of answer,
// and a function that returns the number of calls.
func slowFetch(ttl, d time.Duration, answer func(n int) (xapi.NetworkPurpose, error)) (*NetworkPolicy, func() int) {
	var mu sync.Mutex
	var asked int
	p := &NetworkPolicy{ttl: ttl, fetch: func(ctx context.Context) (xapi.NetworkPurpose, error) {
		mu.Lock()
		asked++
		n := asked
		mu.Unlock()
		select {
		case <-time.After(d):
			return answer(n)
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}}
	return p, func() int {
		mu.Lock()
		defer mu.Unlock()
		return asked
	}
}

func nbd(int) (xapi.NetworkPurpose, error) { return xapi.PurposeNBD, nil }

func TestPurposeIsSingleFlighted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, asked := slowFetch(0, time.Second, nbd)
		start := time.Now()
		var callers sync.WaitGroup
		for range 50 {
			callers.Go(func() {
				if got, err := p.Purpose(t.Context()); got != xapi.PurposeNBD || err != nil {
					t.Errorf("got %q, %v, want nbd", got, err)
				}
			})
		}
		callers.Wait()
		if n := asked(); n != 1 || time.Since(start) != time.Second {
			t.Errorf("got %d calls in %v, want 1 in 1s", n, time.Since(start))
		}
		if p.Purpose(t.Context()); asked() != 2 {
			t.Errorf("got %d calls, want 2: ttl 0 keeps nothing", asked())
		}
	})
}

// TestPurposeOutlivesItsFirstCaller: when the context of the first of several callers ends,
// the others still get the answer.
func TestPurposeOutlivesItsFirstCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, asked := slowFetch(0, 5*time.Second, nbd)
		why := errors.New("connection gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		first := make(chan error, 1)
		go func() { _, err := p.Purpose(ctx); first <- err }()
		synctest.Wait()
		second := make(chan error, 1)
		go func() { _, err := p.Purpose(t.Context()); second <- err }()
		synctest.Wait()

		start := time.Now()
		cancel(why)
		if err := <-first; !errors.Is(err, why) || time.Since(start) != 0 {
			t.Errorf("first caller: got %v after %v, want its own cause at once", err, time.Since(start))
		}
		if err := <-second; err != nil {
			t.Errorf("second caller: got %v", err)
		}
		if n := asked(); n != 1 {
			t.Errorf("got %d calls, want 1", n)
		}
	})
}

// TestPurposeGivesUp: a call that xapi does not answer ends by fetchTimeout, and its error is not cached.
func TestPurposeGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, asked := slowFetch(time.Hour, time.Hour, nbd)
		start := time.Now()
		_, err := p.Purpose(t.Context())
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != fetchTimeout {
			t.Errorf("got %v after %v, want DeadlineExceeded after %v", err, time.Since(start), fetchTimeout)
		}
		if _, err := p.Purpose(t.Context()); err == nil || asked() != 2 {
			t.Errorf("got %v and %d calls, want another failure and 2", err, asked())
		}
	})
}

func TestPurposeCache(t *testing.T) {
	const ttl = 5 * time.Second
	other := errors.New("unreachable")
	tests := []struct {
		name   string
		answer error
		kept   bool
	}{
		{"success", nil, true},
		{"no purpose", ErrNoPurpose, true},
		{"conflicting purposes", ErrConflictingPurpose, true},
		{"xapi's error", &xapi.Error{Method: "network.get_all_records", Code: xapi.HostStillBooting}, false},
		{"transport error", &xapi.TransportError{Err: other}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, asked := slowFetch(ttl, time.Second, func(n int) (xapi.NetworkPurpose, error) {
					if n == 1 {
						return "", tt.answer
					}
					return xapi.PurposeInsecureNBD, nil
				})
				if _, err := p.Purpose(t.Context()); !errors.Is(err, tt.answer) {
					t.Fatalf("got %v, want %v", err, tt.answer)
				}
				_, err := p.Purpose(t.Context())
				if got := asked() == 1; got != tt.kept {
					t.Errorf("got %d calls, want the answer kept: %v", asked(), tt.kept)
				}
				if tt.kept && !errors.Is(err, tt.answer) {
					t.Errorf("kept %v, want %v", err, tt.answer)
				}
				<-time.After(ttl) // fake time: beyond the age of any kept answer
				if got, err := p.Purpose(t.Context()); got != xapi.PurposeInsecureNBD || err != nil {
					t.Errorf("after the ttl: got %q, %v, want the new answer", got, err)
				}
			})
		})
	}
}

func TestUnion(t *testing.T) {
	type purposes = []xapi.NetworkPurpose
	tests := []struct {
		name     string
		networks []purposes
		want     xapi.NetworkPurpose
		err      error
	}{
		{"no networks", nil, "", ErrNoPurpose},
		{"no purposes", []purposes{nil, {}}, "", ErrNoPurpose},
		{"unknown purposes", []purposes{{"NBD", "nbd2", ""}}, "", ErrNoPurpose},
		{"one nbd among many", []purposes{nil, {"nbd"}, nil}, xapi.PurposeNBD, nil},
		{"nbd beside something unknown", []purposes{{"future", "nbd"}}, xapi.PurposeNBD, nil},
		{"insecure", []purposes{{"insecure_nbd"}, {"insecure_nbd"}}, xapi.PurposeInsecureNBD, nil},
		{"both, on two networks", []purposes{{"insecure_nbd"}, nil, {"nbd"}}, "", ErrConflictingPurpose},
		{"both, on one network", []purposes{{"insecure_nbd", "nbd"}}, "", ErrConflictingPurpose},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			networks := make(map[xapi.NetworkRef]xapi.NetworkRecord)
			for i, p := range tt.networks {
				networks[xapi.NetworkRef(rune('a'+i))] = xapi.NetworkRecord{Purpose: p}
			}
			if got, err := union(networks); got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("got %q, %v, want %q, %v", got, err, tt.want, tt.err)
			}
		})
	}
}
