package intent

import (
	"context"
	"errors"
	"fmt"
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

// torn are the bytes of a slot that survive a torn write.
var torn = map[string]func(at int) bool{
	"the checksum":         func(at int) bool { return at < versionAt },
	"the generation":       func(at int) bool { return at < descriptionAt },
	"the header":           func(at int) bool { return at < bitsAt },
	"the bits":             func(at int) bool { return at >= bitsAt },
	"all but the checksum": func(at int) bool { return at >= versionAt },
	"half of the checksum": func(at int) bool { return at < versionAt-10 },
	"each second byte":     func(at int) bool { return at%2 == 0 },
	"all but one byte":     func(at int) bool { return at != generationAt+7 },
}

// checkAll checks everything that a power cut at this moment can leave.
func (s *simulation) checkAll(what string) {
	s.t.Helper()
	for _, survival := range memfs.Survivals {
		s.check(fmt.Sprintf("%s, %v", what, survival), s.files.AfterPowerCut(survival))
	}
	for name, survives := range torn {
		s.check(fmt.Sprintf("%s, of the data %s survives", what, name),
			s.files.AfterTornWrites(func(off int) bool { return survives(off % slotStride) }))
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
			for second, more2 := 1, true; more2; second++ {
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

// TestFileErrors makes every file operation fail, before or after it was executed, and then
// kills the process. The next one loses the power at every operation, or goes on.
func TestFileErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, after := range []bool{false, true} {
			for first, more := 1, true; more && !t.Failed(); first++ {
				for second, more2 := 1, true; more2; second++ {
					what := fmt.Sprintf("operation %d fails, after it: %v", first, after)
					s := newSimulation(t)
					more = s.disturb(firstProcess, first, after, func() error { return syscall.EIO })
					if second == 1 {
						s.checkAll(what)
					}
					s.files = s.files.AfterKill()
					more2 = s.disturb(secondProcess, second, true, s.cut)
					s.checkAll(fmt.Sprintf("%s, power cut after operation %d of the next process", what, second))
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
