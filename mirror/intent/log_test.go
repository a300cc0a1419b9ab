package intent

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/fsys/memfs"
)

// clearAll opens a new log and removes all regions from it.
func clearAll(t *testing.T, files *memfs.FS) *Log {
	t.Helper()
	l := mustOpen(t, files, fourRegions)
	wantListed(t, listed(l), 0, 1, 2, 3)
	if err := l.Clear(t.Context(), time.Now(), always); err != nil {
		t.Fatal(err)
	}
	wantListed(t, listed(l))
	return l
}

func TestNewLogListsAll(t *testing.T) {
	l := mustOpen(t, newFiles(), fourRegions)
	if l.Resumed() || l.DirtyBytes() != fourRegions.Size {
		t.Errorf("a new log: resumed %v, %d bytes of %d are dirty", l.Resumed(), l.DirtyBytes(), fourRegions.Size)
	}
}

// A region is durably in the file when Mark returns, whatever survives a power cut.
func TestMarkIsDurable(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	for _, region := range []int{2, 0, 3} {
		mark(t, l, region)
		for _, s := range memfs.Survivals {
			if got := listedAfter(t, files.AfterPowerCut(s), fourRegions); !slices.Contains(got, region) {
				t.Errorf("%v: listed are %v, without %d", s, got, region)
			}
		}
	}
}

func TestMarkOfARange(t *testing.T) {
	for _, tc := range []struct {
		off, n int64
		want   []int
	}{
		{0, 0, nil},
		{0, 1, []int{0}},
		{minRegion - 1, 1, []int{0}},
		{minRegion - 1, 2, []int{0, 1}},
		{minRegion, minRegion, []int{1}},
		{minRegion - 512, 2*minRegion + 1024, []int{0, 1, 2, 3}},
		{fourRegions.Size - 1, 1, []int{3}},
		{fourRegions.Size, 0, nil},
	} {
		files := newFiles()
		l := clearAll(t, files)
		if err := l.Mark(t.Context(), tc.off, tc.n); err != nil {
			t.Errorf("%d bytes at %d: %v", tc.n, tc.off, err)
		}
		wantListed(t, listedAfter(t, files.AfterPowerCut(memfs.NothingSurvives), fourRegions), tc.want...)
	}
	l := clearAll(t, newFiles())
	for _, bad := range [][2]int64{{-1, 1}, {0, -1}, {fourRegions.Size, 1}, {1, fourRegions.Size}, {1 << 62, 1 << 62}} {
		if err := l.Mark(t.Context(), bad[0], bad[1]); err == nil {
			t.Errorf("%d bytes at %d: no error", bad[1], bad[0])
		}
	}
	wantListed(t, listed(l))
}

// Writes to listed regions cost no I/O.
func TestMarkAgain(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	syncs := counter(files, "sync ")
	write(t, l, 1)
	for range 10 {
		write(t, l, 1)
	}
	if *syncs != 1 {
		t.Errorf("11 writes of one region: %d syncs, want 1", *syncs)
	}
}

// Concurrent writes share changes of the file: those that come during one share the next.
func TestMarksShareAChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFiles()
		l := clearAll(t, files)
		syncs, goOn := 0, make(chan struct{})
		files.OnOp(func(op memfs.Op) error {
			if !op.After && op.Name == "sync mirror" {
				if syncs++; syncs == 1 {
					<-goOn
				}
			}
			return nil
		})
		var wg sync.WaitGroup
		returned := 0
		var mu sync.Mutex
		start := func(region int) {
			wg.Go(func() {
				mark(t, l, region)
				mu.Lock()
				defer mu.Unlock()
				returned++
			})
		}
		start(0)
		synctest.Wait()
		for range 4 {
			for region := range 4 {
				start(region)
			}
		}
		synctest.Wait()
		if returned != 0 {
			t.Errorf("%d of 17 returned before the sync", returned)
		}
		close(goOn)
		wg.Wait()
		if syncs != 2 {
			t.Errorf("17 concurrent writes: %d syncs, want 2", syncs)
		}
	})
}

// A region that is being removed from the file when it is written is there again before the
// write begins.
func TestMarkWhileCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFiles()
		l := mustOpen(t, files, fourRegions)
		goOn := make(chan struct{})
		files.OnOp(func(op memfs.Op) error {
			if !op.After && op.Name == "sync mirror" {
				<-goOn
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := l.Clear(context.Background(), time.Now(), always); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			mark(t, l, 2)
			wantListed(t, listedAfter(t, files.AfterPowerCut(memfs.NothingSurvives), fourRegions), 2)
		})
		synctest.Wait()
		close(goOn)
		wg.Wait()
	})
}

// The end of a mirror is a change of its own, after one that is under way.
func TestCompleteWhileCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFiles()
		l := mustOpen(t, files, fourRegions)
		goOn, changes := make(chan struct{}), 0
		files.OnOp(func(op memfs.Op) error {
			if op.After || op.Name != "write mirror" {
				return nil
			}
			if changes++; changes == 1 {
				<-goOn
				return syscall.EIO
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := l.Clear(context.Background(), time.Now(), always); !errors.Is(err, syscall.EIO) {
				t.Errorf("Clear: got %v, want EIO", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if err := l.Complete(context.Background(), true); err != nil {
				t.Errorf("Complete: %v", err)
			}
		})
		synctest.Wait()
		if changes != 1 {
			t.Errorf("%d changes at the same time", changes)
		}
		close(goOn)
		wg.Wait()
		if _, err := open(files.AfterPowerCut(memfs.NothingSurvives), statePath, fourRegions); !errors.Is(err, ErrCompleted) {
			t.Errorf("got %v, want ErrCompleted", err)
		}
	})
}

// Regions are cleared 5 s after their last write ended, if a flush began after that.
func TestClear(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, l *Log) (began time.Time)
		want []int
	}{
		{"after 5 s", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			time.Sleep(settle)
			return time.Now()
		}, nil},
		{"before 5 s", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			time.Sleep(settle - 1)
			return time.Now()
		}, []int{1}},
		{"5 s after the first write, not the last", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			time.Sleep(settle - 1)
			write(t, l, 1)
			time.Sleep(time.Nanosecond)
			return time.Now()
		}, []int{1}},
		{"5 s after Mark, not Done", func(t *testing.T, l *Log) time.Time {
			mark(t, l, 1)
			time.Sleep(settle)
			l.Done(minRegion, 512)
			return time.Now().Add(time.Second)
		}, []int{1}},
		{"a flush that began with the end of the write", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			began := time.Now()
			time.Sleep(2 * settle)
			return began
		}, []int{1}},
		{"a write under way", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			mark(t, l, 1)
			time.Sleep(2 * settle)
			return time.Now()
		}, []int{1}},
		{"two writes under way, one of which ends", func(t *testing.T, l *Log) time.Time {
			mark(t, l, 1)
			write(t, l, 1)
			time.Sleep(2 * settle)
			return time.Now()
		}, []int{1}},
		{"another region", func(t *testing.T, l *Log) time.Time {
			write(t, l, 1)
			time.Sleep(settle)
			write(t, l, 3)
			return time.Now().Add(1)
		}, []int{3}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				files := newFiles()
				l := clearAll(t, files)
				began := tc.do(t, l)
				if err := l.Clear(t.Context(), began, always); err != nil {
					t.Fatal(err)
				}
				wantListed(t, listed(l), tc.want...)
				wantListed(t, listedAfter(t, files.AfterPowerCut(memfs.NothingSurvives), fourRegions), tc.want...)
			})
		})
	}
}

// Clear asks for each listed region whether it is equal, with its range.
func TestClearAsks(t *testing.T) {
	l := mustOpen(t, newFiles(), fourRegions)
	var asked [][2]int64
	only2 := func(off, n int64) bool {
		asked = append(asked, [2]int64{off, n})
		return off == 2*minRegion
	}
	for range 2 {
		if err := l.Clear(t.Context(), time.Now(), only2); err != nil {
			t.Fatal(err)
		}
	}
	wantListed(t, listed(l), 0, 1, 3)
	last := [2]int64{3 * minRegion, 512}
	want := [][2]int64{{0, minRegion}, {minRegion, minRegion}, {2 * minRegion, minRegion}, last, {0, minRegion}, {minRegion, minRegion}, last}
	if !slices.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
}

// A Mark that fails or is cancelled leaves no write behind that keeps its region from being
// cleared, and the next one tries again.
func TestMarkFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFiles()
		l := clearAll(t, files)
		files.OnOp(func(memfs.Op) error { return syscall.ENOSPC })
		if err := l.Mark(t.Context(), 0, 512); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v, want ENOSPC", err)
		}
		goOn := make(chan struct{})
		files.OnOp(func(memfs.Op) error { <-goOn; return nil })
		var wg sync.WaitGroup
		wg.Go(func() { mark(t, l, 1) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := l.Mark(ctx, 2*minRegion, 512); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
		close(goOn)
		wg.Wait()
		l.Done(minRegion, 512)
		write(t, l, 0)
		time.Sleep(settle)
		if err := l.Clear(t.Context(), time.Now(), always); err != nil {
			t.Error(err)
		}
		wantListed(t, listed(l))
	})
}

// Many clients: each finds its regions durable while it writes.
func TestConcurrentMarks(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	var clients, clearing sync.WaitGroup
	stop := make(chan struct{})
	clearing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			l.mu.Lock()
			clear(l.ended) // as if 5 s had passed
			l.mu.Unlock()
			if err := l.Clear(context.Background(), time.Now(), always); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 4 {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		clients.Go(func() {
			for range 50 {
				off := random.Int64N(fourRegions.Size)
				n := random.Int64N(min(2*minRegion, fourRegions.Size-off)) + 1
				if err := l.Mark(context.Background(), off, n); err != nil {
					t.Error(err)
					return
				}
				found := listedAfter(t, files.AfterPowerCut(memfs.NothingSurvives), fourRegions)
				for r := off / minRegion; r <= (off+n-1)/minRegion; r++ {
					if !slices.Contains(found, int(r)) {
						t.Errorf("%d bytes at %d: listed are %v", n, off, found)
					}
				}
				l.Done(off, n)
			}
		})
	}
	clients.Wait()
	close(stop)
	clearing.Wait()
}
