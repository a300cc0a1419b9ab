package fsys_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"xapi-nbd/internal/fsys"
)

// A file is locked once at a time, even if those that have locked it remove it: nobody gets the
// lock of a file that was removed meanwhile.
func TestLockOfARemovedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var holders, locked atomic.Int32
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 2000 {
				f, err := fsys.OS{}.Lock(path)
				if errors.Is(err, fsys.ErrLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				locked.Add(1)
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d have locked the file", n)
				}
				holders.Add(-1)
				if err := errors.Join(os.Remove(path), f.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if locked.Load() == 0 {
		t.Error("nobody has locked the file")
	}
}
