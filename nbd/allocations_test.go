//go:build linux && !race

// The race detector allocates by itself.

package nbd

import (
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// twoLooks is the time after which the stall monitor has certainly started another reader.
var twoLooks = unix.NsecToTimespec(2 * stallTime.Nanoseconds())

// waitingDevice is a device without a file, too slow to be served by the reader of requests.
type waitingDevice struct{ cheapDevice }

func (d waitingDevice) ReadAt(p []byte, off int64) (int, error) {
	ts := twoLooks // of its own: the kernel may write to it
	_ = unix.Nanosleep(&ts, nil)
	return d.cheapDevice.ReadAt(p, off)
}

// TestNoAllocationsPerRead: reads allocate no memory, short and long ones, one at a time and
// many, apart from a few allocations after a garbage collection has emptied the pools.
func TestNoAllocationsPerRead(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(patternOf(0, 16<<20)); err != nil {
		t.Fatal(err)
	}
	devices := map[string]Device{"file": fileOf{f}, "memory": cheapDevice(16 << 20), "slow": waitingDevice{16 << 20}}
	for name, device := range devices {
		for _, length := range []int{4 << 10, 64 << 10, 1 << 20} {
			for _, depth := range []int{1, 16} {
				if name == "slow" && depth == 1 {
					continue // takes long, and shows nothing new
				}
				t.Run(name+"/"+sizeName(length)+"/"+map[int]string{1: "alone", 16: "16 at once"}[depth], func(t *testing.T) {
					nc := rawReader(t, device)
					readRaw(t, nc, 4*depth, depth, length) // fills the pools
					const reads = 800
					least := uint64(math.MaxUint64)
					for try := 0; try < 5 && least > reads/4; try++ {
						var before, after runtime.MemStats
						runtime.ReadMemStats(&before)
						readRaw(t, nc, reads, depth, length)
						runtime.ReadMemStats(&after)
						least = min(least, after.Mallocs-before.Mallocs)
					}
					if least > reads/4 {
						t.Errorf("%d allocations in %d reads at best", least, reads)
					}
				})
			}
		}
	}
}

func sizeName(n int) string {
	return map[int]string{4 << 10: "4 KiB", 64 << 10: "64 KiB", 1 << 20: "1 MiB"}[n]
}

// rawReader connects to a server of a device by EXPORT_NAME, with nothing
// between the caller and the bytes.
func rawReader(t *testing.T, d Device) net.Conn {
	t.Helper()
	l := listen(t, "tcp")
	serveOn(t, &Server{Exporter: oneDevice{d}}, l)
	return rawDial(t, l)
}
