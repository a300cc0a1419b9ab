package main

import (
	"os"
	"path/filepath"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// incrementOf serves a disk that has changed, and has grown since the base.
func incrementOf(t *testing.T, d *changedDisk) string {
	return serveOne(t, func() nbd.Device {
		return changedDevice{nbdtest.NewRAM(d.now), []string{extents.UnchangedContext + baseName}, d.state, &d.read, nil, nil}
	})
}

// TestResumeAfterTheFileWasLengthened: the process was killed after it had made the
// destination longer, and before it knew that from the state's file.
func TestResumeAfterTheFileWasLengthened(t *testing.T) {
	d := newChangedDisk()
	const length = 40 * changedUnit
	uri := incrementOf(t, d)
	long := make([]byte, len(d.now))
	copy(long, d.base[:length])
	path, state := writeFile(t, "copy", long), filepath.Join(t.TempDir(), "state")
	if err := (&copying.State{Before: length}).Save(state); err != nil {
		t.Fatal(err)
	}
	succeed(t, "copy", "--resume", state, "--changed-since", baseName, uri, path)
	sameBytes(t, "the copy", readFile(t, path), d.now)
}

// TestResumeStateHasTheSizeBefore: the size is in the file before the destination is changed.
func TestResumeStateHasTheSizeBefore(t *testing.T) {
	d := newChangedDisk()
	const length = 40 * changedUnit
	path, state := writeFile(t, "copy", d.base[:length]), filepath.Join(t.TempDir(), "state")
	j := &copyJob{o: &copyOptions{resume: state}, from: side{path: path}, to: side{path: path}, before: length}
	src, err := copying.OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	j.src = src
	if old, err := j.loadState(); err != nil || old != nil {
		t.Fatalf("got %+v, %v", old, err)
	}
	s, err := copying.LoadState(state)
	if err != nil || s == nil || s.Before != length {
		t.Errorf("got %+v, %v, want a size before of %d", s, err, length)
	}
}

// TestResumeAfterADifference: a destination that was found to differ is copied again.
func TestResumeAfterADifference(t *testing.T) {
	want := content(1 << 20)
	src, state := writeFile(t, "src", want), filepath.Join(t.TempDir(), "state")
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	lying := true
	dst := serveOne(t, func() nbd.Device {
		if lying {
			return readsZeroes{ram.Again()}
		}
		return ram.Again()
	})
	args := []string{"copy", "--connections=1", "--verify", "--resume", state, src, dst}
	fail(t, exitFailed, []string{"differs from the source at offset"}, args...)
	s, err := copying.LoadState(state)
	if err != nil || s == nil || s.Done != 0 {
		t.Fatalf("got %+v, %v, want a state that begins at 0", s, err)
	}
	lying = false
	if _, err := ram.WriteAt([]byte("other bytes"), 0); err != nil {
		t.Fatal(err)
	}
	succeed(t, args...)
}

// readsZeroes is a device whose reads return zeroes.
type readsZeroes struct{ *nbdtest.RAM }

func (readsZeroes) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// TestResumeFileIsNoEnd: the file of --resume must not be what is copied, nor the temporary
// file and the lock beside it.
func TestResumeFileIsNoEnd(t *testing.T) {
	dir := t.TempDir()
	src := writeFile(t, "src", content(1<<16))
	const says = "--resume needs a file of its own"
	dst := filepath.Join(dir, "dst")
	fail(t, exitUsage, []string{says}, "copy", "--resume", dst, src, dst)
	fail(t, exitUsage, []string{says}, "copy", "--resume", dst, src, dst+".new")
	fail(t, exitUsage, []string{says}, "copy", "--resume", dst, src, dst+".lock")
	fail(t, exitUsage, []string{says}, "copy", "--resume", src, src, dst)
	if err := os.Symlink(src, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	fail(t, exitUsage, []string{says}, "copy", "--resume", filepath.Join(dir, "link"), src, dst)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the link alone", entries, err)
	}
}

// TestResumeFileIsLocked: a second copy with the same file is refused while the first one
// works, and changes nothing. Afterwards nothing is left of the lock.
func TestResumeFileIsLocked(t *testing.T) {
	want := content(4 << 20)
	reached, released := make(chan struct{}, 1000), make(chan struct{})
	// It waits at the first read, as the state changes with each segment.
	src := serveOne(t, func() nbd.Device { return &blocking{nbdtest.MemOf(want), 0, reached, released} })
	dir := t.TempDir()
	state, dst := filepath.Join(dir, "state"), filepath.Join(dir, "dst")
	args := []string{"copy", "--connections=1", "--requests=1", "--resume", state, src, dst}
	first := make(chan result, 1)
	go func() { first <- tool(t, args...) }()
	<-reached
	before := readFile(t, state)
	fail(t, exitFailed, []string{state + ": another process is copying with this file"},
		"copy", "--resume", state, writeFile(t, "other", want), filepath.Join(t.TempDir(), "dst"))
	if got := readFile(t, state); string(got) != string(before) {
		t.Errorf("the refused copy has changed the state:\n%s", got)
	}
	close(released)
	if r := <-first; r.code != exitOK {
		t.Errorf("the first copy: exit code %d, error output %q", r.code, r.err)
	}
	sameBytes(t, "the copy", readFile(t, dst), want)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the copy alone", entries, err)
	}
}
