package intent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/fsys/memfs"
)

// A simulated mirror of fourRegions: for each region a number that each write increases.
type simulation struct {
	t     *testing.T
	files *memfs.FS
	log   *Log // nil until it was opened
	ended bool // the process: the power was cut

	primary, secondary, flushed [4]int
	opened                      bool // by any process
	completing, completed       bool
}

// The steps of a simulation do nothing after a power cut. After another error a write is not
// begun.

func (s *simulation) open() {
	l, err := open(s.files, statePath, fourRegions)
	if err != nil {
		return
	}
	s.log, s.opened = l, true
}

func (s *simulation) begin(region int) (begun bool) {
	if s.log == nil || s.log.Mark(context.Background(), int64(region)*minRegion, 512) != nil {
		return false
	}
	s.completing = false // taken back
	s.primary[region]++
	return true
}

func (s *simulation) end(region int) { s.log.Done(int64(region)*minRegion, 512) }

func (s *simulation) write(region int) {
	if s.begin(region) {
		s.end(region)
	}
}

// copy copies the primary to the secondary, flushes it, and clears what may be cleared.
func (s *simulation) copy() {
	if !s.ended {
		s.secondary = s.primary
		s.flush()
	}
}

func (s *simulation) flush() {
	if s.ended {
		return
	}
	began := time.Now()
	s.flushed = s.secondary
	if s.log != nil {
		_ = s.log.Clear(context.Background(), began, func(off, _ int64) bool {
			return s.primary[off/minRegion] == s.flushed[off/minRegion]
		})
	}
}

func (s *simulation) complete(pivot bool) {
	s.copy()
	if s.log == nil {
		return
	}
	s.completing = true
	s.completed = s.log.Complete(context.Background(), pivot) == nil
}

// firstProcess and secondProcess make the same file operations each time.
func firstProcess(s *simulation) {
	s.open()
	s.write(1)
	s.copy() // clears all but 1
	begun := s.begin(2)
	s.write(0)
	time.Sleep(settle)
	s.copy() // clears 0 and 1
	if begun {
		s.end(2)
	}
	s.write(3)
	s.flush() // of a secondary without the write
	time.Sleep(settle)
	s.flush() // clears 2
	s.write(0)
	s.write(2)
	time.Sleep(settle)
	s.copy() // clears all
	s.write(1)
}

func secondProcess(s *simulation) {
	s.open()
	s.write(2)
	s.copy()
	time.Sleep(settle)
	s.copy() // clears all
	s.write(3)
	s.complete(true)
	if !s.completed {
		s.write(3) // is listed
		if !s.ended {
			s.checkAll("after a failed end")
		}
		s.complete(false)
	}
}

// check opens the log as the process after a crash does. Each region that has a write which
// the secondary has not flushed has to be listed.
func (s *simulation) check(what string, files *memfs.FS) {
	s.t.Helper()
	l, err := open(files, statePath, fourRegions)
	switch {
	case errors.Is(err, ErrCompleted) && s.completing:
		return
	case errors.Is(err, ErrInvalid) && !s.opened:
		return // nothing was written yet, neither to the log nor to the primary
	case err != nil:
		s.t.Errorf("%s: %v", what, err)
		return
	case s.completed:
		s.t.Errorf("%s: a completed mirror was resumed", what)
	}
	defer l.Close()
	found := newBitmap(4)
	for _, region := range listed(l) {
		found.set(region)
	}
	for region := range s.primary {
		if s.primary[region] != s.flushed[region] && !found.has(region) {
			s.t.Errorf("%s: region %d was written and is not listed; listed are %v", what, region, listed(l))
		}
	}
}

// opening is the number of file operations of open, if the log exists.
const opening = 10

// torn are the bytes that survive a torn write.
var torn = map[string]func(off int) bool{
	"the checksum":         inSlot(func(at int) bool { return at < versionAt }),
	"the generation":       inSlot(func(at int) bool { return at < descriptionAt }),
	"the header":           inSlot(func(at int) bool { return at < bitsAt }),
	"the bits":             inSlot(func(at int) bool { return at >= bitsAt }),
	"all but the checksum": inSlot(func(at int) bool { return at >= versionAt }),
	"half of the checksum": inSlot(func(at int) bool { return at < versionAt-10 }),
	"each second byte":     func(off int) bool { return off%2 == 0 },
	"the first slot":       func(off int) bool { return off < slotStride },
	"the last slot":        func(off int) bool { return off >= 2*slotStride },
	"half of the file":     func(off int) bool { return off < slotStride+bitsAt },
}

// inSlot makes a function of the offset in the file of one of the offset in a slot.
func inSlot(survives func(at int) bool) func(off int) bool {
	return func(off int) bool { return survives(off % slotStride) }
}

// checkAll checks everything that a power cut at this moment can leave.
func (s *simulation) checkAll(what string) {
	s.t.Helper()
	left := map[string]*memfs.FS{}
	for _, survival := range memfs.Survivals {
		left[survival.String()] = s.files.AfterPowerCut(survival)
	}
	for name, survives := range torn {
		left["of the data "+name+" survives"] = s.files.AfterTornWrites(survives)
	}
	checked := map[string]bool{}
	for name, files := range left {
		text, _ := files.Content(statePath)
		if !checked[text] {
			checked[text] = true
			s.check(what+", "+name, files)
		}
	}
}

// disturb runs a process in which do is called before or after the nth file operation, and
// reports whether that operation exists.
func (s *simulation) disturb(process func(*simulation), n int, after bool, do func() error) (reached bool) {
	s.log, s.ended = nil, false
	s.files.OnOp(func(op memfs.Op) error {
		if op.N == n && op.After == after {
			reached = true
			return do()
		}
		return nil
	})
	process(s)
	s.files.OnOp(nil)
	if s.log != nil {
		s.log.Close()
	}
	return reached
}

// cut cuts the power.
func (s *simulation) cut() error {
	s.files.Cut()
	s.ended = true
	return nil
}

func newSimulation(t *testing.T) *simulation { return &simulation{t: t, files: newFiles()} }

// TestPowerLoss cuts the power at every file operation of a process.
func TestPowerLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		points := 0
		for n, more := 1, true; more; n++ {
			for _, after := range []bool{false, true} {
				s := newSimulation(t)
				more = s.disturb(firstProcess, n, after, s.cut)
				s.checkAll(fmt.Sprintf("power cut at operation %d, after it: %v", n, after))
				points++
			}
		}
		t.Logf("%d points", points)
	})
}

// TestPowerLossAfterKill kills a process at every file operation, and cuts the power at every
// one of the next process.
func TestPowerLossAfterKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		points := 0
		for first, more := 1, true; more && !t.Failed(); first++ {
			for second, more2 := 1+first%stride(), true; more2; second += stride() {
				s := newSimulation(t)
				more = s.disturb(firstProcess, first, true, s.cut)
				s.files = s.files.AfterKill()
				more2 = s.disturb(secondProcess, second, true, s.cut)
				s.checkAll(fmt.Sprintf("killed after operation %d, power cut after operation %d", first, second))
				points++
			}
		}
		t.Logf("%d points", points)
	})
}

// stride is which part of the pairs of two points is tried: one of so many, and all of them in
// make soak.
func stride() int {
	if os.Getenv("SOAK_STEPS") != "" {
		return 1
	}
	return 14
}

// TestFileErrors makes every file operation fail, before or after it was executed, and then
// kills the process. The next one loses the power while it opens the log.
func TestFileErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, after := range []bool{false, true} {
			for first, more := 1, true; more && !t.Failed(); first++ {
				for second := first % stride(); second < opening; second += stride() {
					what := fmt.Sprintf("operation %d fails, after it: %v", first, after)
					s := newSimulation(t)
					more = s.disturb(firstProcess, first, after, func() error { return syscall.EIO })
					if second < stride() {
						s.checkAll(what)
					}
					s.files = s.files.AfterKill()
					s.disturb(secondProcess, second+1, true, s.cut)
					s.checkAll(fmt.Sprintf("%s, power cut after operation %d of the next process", what, second+1))
				}
			}
		}
	})
}

// TestErrorsAtTheEnd makes every file operation fail of a process that completes a mirror.
func TestErrorsAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, after := range []bool{false, true} {
			for n, more := 1, true; more; n++ {
				s := newSimulation(t)
				s.disturb(firstProcess, 0, false, nil)
				more = s.disturb(secondProcess, n, after, func() error { return syscall.EIO })
				s.checkAll(fmt.Sprintf("operation %d fails, after it: %v", n, after))
			}
		}
	})
}
