package copying

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLockOfARemovedFile: the lock of a file that was removed after it had been opened excludes
// nobody, so it does not count, whether there is a new file or not.
func TestLockOfARemovedFile(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	mustLock := func() *StateLock {
		l, err := LockState(state)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	first := mustLock()
	late, err := os.Open(LockFile(state))
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	first.Unlock()
	if ours, err := lock(late); ours || err != nil {
		t.Errorf("there is no file: got %t, %v, want no lock and no error", ours, err)
	}
	second := mustLock()
	defer second.Unlock()
	if ours, err := lock(late); ours || err != nil {
		t.Errorf("there is another file: got %t, %v, want no lock and no error", ours, err)
	}
	if _, err := LockState(state); err == nil || !strings.Contains(err.Error(), state+": another process is copying") {
		t.Errorf("a second lock: got error %v", err)
	}
}
