package nbd

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Each READ of a file counts once, on every path to its data: copied from the page
// cache or spliced, and from storage by the reader of requests or by a goroutine of its
// own.
func TestReadLatencyOfFiles(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(patternOf(0, 16<<20)); err != nil {
		t.Fatal(err)
	}
	for name, device := range map[string]Device{"page cache": fileOf{f}, "storage": newStorageDevice(t)} {
		for _, length := range []int{4 << 10, spliceMin} {
			for _, depth := range []int{1, 16} {
				if name == "storage" && length == spliceMin {
					continue // its file is empty, so that nothing can be spliced
				}
				t.Run(name+"/"+sizeText(length)+"/"+map[int]string{1: "alone", 16: "16 at once"}[depth], func(t *testing.T) {
					s := &Server{Exporter: oneDevice{device}}
					l := listen(t, "unix")
					serveOn(t, s, l)
					nc := rawDial(t, l)
					const reads = 64
					readRaw(t, nc, reads, depth, length)
					// A read is counted before its reply is sent.
					got := s.Totals().ReadLatency
					var n int64
					for _, count := range got.Counts {
						n += count
					}
					if n != reads || got.Sum <= 0 || got.Sum > time.Hour {
						t.Errorf("%d reads in %v are counted, want %d", n, got.Sum, reads)
					}
					if stall := s.Conns()[0].ReadStall; stall != 0 {
						t.Errorf("a stall of %v while nothing is read", stall)
					}
				})
			}
		}
	}
}

func sizeText(n int) string {
	if n == spliceMin {
		return "spliced"
	}
	return "short"
}
