package main

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"xapi-nbd/nbd"
)

// TestSlowFile: a read waits at least for the delay, and concurrent reads together take less
// time than they would one after the other.
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
	d, err := fileExporter{path: path, delay: delay}.Open(t.Context(), nbd.Peer{}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.Size() != int64(len(want)) {
		t.Errorf("got size %d, want %d", d.Size(), len(want))
	}
	// A busy machine gets five attempts: reads one after the other would fail them all.
	quickest := time.Hour
	for try := 0; try < 5 && quickest >= readers*delay; try++ {
		var all sync.WaitGroup
		begin := time.Now()
		for range readers {
			all.Go(func() {
				p := make([]byte, 512)
				begin := time.Now()
				if _, err := d.ReadAt(p, 1024); err != nil || !bytes.Equal(p, want[1024:1536]) {
					t.Errorf("error %v, or wrong bytes", err)
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

// TestImageOfZeros: the share of zero pieces is zeroShare, and none is a hole.
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
