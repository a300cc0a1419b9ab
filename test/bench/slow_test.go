package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestSlowFile: a read waits at least as long as it should, and reads wait side
// by side: together less than one after the other.
func TestSlowFile(t *testing.T) {
	const delay, readers = 20 * time.Millisecond, 50
	path := filepath.Join(t.TempDir(), "image")
	want := make([]byte, 1<<16)
	if _, err := randomBytes().Read(want); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := openSlow(path, delay)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.Size() != int64(len(want)) {
		t.Errorf("got size %d, want %d", d.Size(), len(want))
	}
	// A machine that does something else meanwhile gets another chance: one after
	// the other they take as long every time.
	quickest := time.Hour
	for try := 0; try < 5 && quickest >= readers*delay; try++ {
		var all sync.WaitGroup
		begin := time.Now()
		for range readers {
			all.Go(func() {
				p := make([]byte, 512)
				begin := time.Now()
				if _, err := d.ReadAt(p, 1024); err != nil || !bytes.Equal(p, want[1024:1536]) {
					t.Errorf("error %v, or other bytes", err)
				}
				if took := time.Since(begin); took < delay {
					t.Errorf("took %v, less than %v", took, delay)
				}
			})
		}
		all.Wait()
		quickest = min(quickest, time.Since(begin))
	}
	if quickest >= readers*delay {
		t.Errorf("%d reads took %v at best: one after the other", readers, quickest)
	}
}

// TestImageOfZeros: about as many zeroes as it says, all of them written.
func TestImageOfZeros(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	const size = 32 << 20
	if err := writeZeros(t.Context(), path, size); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil || len(content) != size {
		t.Fatalf("got %d bytes, error %v", len(content), err)
	}
	zero, none := 0, make([]byte, zeroPiece)
	for p := content; len(p) > 0; p = p[zeroPiece:] {
		if bytes.Equal(p[:zeroPiece], none) {
			zero++
		}
	}
	if share := float64(zero) / (size / float64(zeroPiece)); share < 0.85 || share > 0.95 {
		t.Errorf("%.2f of the pieces are zeroes, want about %.2f", share, zeroShare)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const seekHole = 4 // SEEK_HOLE
	if hole, err := f.Seek(0, seekHole); err != nil || hole != size {
		t.Errorf("got a hole at %d, error %v; want none", hole, err)
	}
}

// TestImageStops: making a large image does not hold up an interrupt.
func TestImageStops(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errEnough)
	if err := writeRandom(ctx, filepath.Join(t.TempDir(), "image"), 1<<40); !errors.Is(err, errEnough) {
		t.Errorf("got error %v, want %v", err, errEnough)
	}
}

// TestCPUTime: the clock of a process is its own, and runs while it works.
func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := writeZeros(t.Context(), filepath.Join(t.TempDir(), "image"), 4<<20); err != nil {
		t.Fatal(err)
	}
	after, err := cpuTime(os.Getpid())
	if err != nil || after <= before {
		t.Errorf("got %v, then %v, error %v", before, after, err)
	}
	if _, err := cpuTime(1 << 22); err == nil {
		t.Error("a process beyond the highest number: got no error")
	}
}
