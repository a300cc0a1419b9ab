package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// toolEnv makes the test program run as nbd-tool.
const toolEnv = "NBD_TOOL_TEST_RUN"

// runAsTool is nbd-tool in place of the tests.
func runAsTool() int {
	return runProcess()
}

// blocking is a device whose reads from an offset on send to reached, and do not return
// before released is closed.
type blocking struct {
	*nbdtest.Mem
	at       int64
	reached  chan<- struct{}
	released <-chan struct{}
}

func (b *blocking) ReadAt(p []byte, off int64) (int, error) {
	if off >= b.at {
		b.reached <- struct{}{}
		<-b.released
	}
	return b.Mem.ReadAt(p, off)
}

// recording records the lowest offset that is read.
type recording struct {
	*nbdtest.Mem
	lowest *atomic.Int64
}

func (r recording) ReadAt(p []byte, off int64) (int, error) {
	for {
		lowest := r.lowest.Load()
		if off >= lowest || r.lowest.CompareAndSwap(lowest, off) {
			return r.Mem.ReadAt(p, off)
		}
	}
}

// TestResumeAfterKill kills the tool in the middle, and runs it again with another session: it
// goes on behind the last flush. All later writes are lost with the destination's machine.
func TestResumeAfterKill(t *testing.T) {
	const size, at = 8 << 20, 6 << 20
	want := content(size)
	const vdi = "/0e0fba52-7b2e-4b1e-8d3b-5d3a1f1c2b3a%3Fsession_id=OpaqueRef:"
	for _, to := range []string{"export", "file"} {
		t.Run(to, func(t *testing.T) {
			reached, released := make(chan struct{}, 1000), make(chan struct{})
			var lowest atomic.Int64
			lowest.Store(size)
			resumed := false
			src := serveOne(t, func() nbd.Device {
				if resumed {
					return recording{nbdtest.MemOf(want), &lowest}
				}
				return &blocking{nbdtest.MemOf(want), at, reached, released}
			})
			src = strings.TrimSuffix(src, "ram") + vdi
			ram := nbdtest.NewRAM(bytes.Repeat([]byte{0xee}, size))
			dst := serveOne(t, func() nbd.Device { return ram.Again() })
			state := filepath.Join(t.TempDir(), "state")
			if to == "file" {
				dst = filepath.Join(t.TempDir(), "dst")
			}
			args := []string{"copy", "--connections=1", "--requests=1", "--resume", state}
			cmd := exec.Command(os.Args[0], append(args, src+"5e55-10n", dst)...)
			cmd.Env = append(os.Environ(), toolEnv+"=1")
			var output bytes.Buffer
			cmd.Stdout, cmd.Stderr = &output, &output
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case <-reached:
			case err := <-ended:
				t.Fatalf("the tool ended: %v: %s", err, output.String())
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			<-ended
			close(released)
			s, err := copying.LoadState(state)
			if err != nil || s == nil || s.Done < at/2 || s.Done > at {
				t.Fatalf("after the kill: state %+v, error %v", s, err)
			}
			if text := readFile(t, state); bytes.Contains(text, []byte("5e55-10n")) {
				t.Errorf("the state has the session: %s", text)
			}
			// Writes that were not flushed are lost.
			if to == "file" {
				f, err := os.OpenFile(dst, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				_, err = f.WriteAt(bytes.Repeat([]byte{0xdd}, int(size-s.Done)), s.Done)
				if err := errors.Join(err, f.Close()); err != nil {
					t.Fatal(err)
				}
			} else {
				ram = nbdtest.NewRAM(ram.Stable())
			}
			resumed = true
			succeed(t, append(args, src+"an0ther-0ne", dst)...)
			got := ram.Stable()
			if to == "file" {
				got = readFile(t, dst)
			}
			sameBytes(t, "the copy", got, want)
			if lowest.Load() < s.Done {
				t.Errorf("read again from %d on, want from %d", lowest.Load(), s.Done)
			}
			if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the state is left: %v", err)
			}
		})
	}
}

// TestResumeChecksBothEnds has a copy that failed, and then tries to go on with something
// else.
func TestResumeChecksBothEnds(t *testing.T) {
	const size = 8 << 20
	want := nbdtest.Bytes(size, 0, 1)
	src, other := writeFile(t, "src", want), writeFile(t, "other", want)
	full := true
	ram := nbdtest.NewRAM(make([]byte, size))
	dst := serveOne(t, func() nbd.Device {
		f := nbdtest.NewFaultyRAM(ram.Again())
		if full {
			f.Fail(6<<20, 1, syscall.ENOSPC)
		}
		return f
	})
	otherDst := serveRAM(t, nbdtest.NewRAM(make([]byte, size)))
	state := filepath.Join(t.TempDir(), "state")
	resume := func(args ...string) []string {
		return append([]string{"copy", "--connections=1", "--requests=1", "--resume", state}, args...)
	}
	fail(t, exitFailed, []string{"NBD_ENOSPC", "the same command goes on from byte "}, resume(src, dst)...)
	before := readFile(t, state)
	bitmap := writeFile(t, "bitmap", []byte(base64.StdEncoding.EncodeToString(make([]byte, 16))))

	fail(t, exitFailed, []string{state, "the source is not the one of the interrupted copy", other, src}, resume(other, dst)...)
	fail(t, exitFailed, []string{"the destination is not the one of the interrupted copy"}, resume(src, otherDst)...)
	fail(t, exitFailed, []string{"was of everything, and not of the blocks of a bitmap"}, resume("--bitmap", bitmap, src, dst)...)
	fail(t, exitUsage, []string{"--resume cannot go on with what went to standard output"}, resume(src, "-")...)
	st, err := os.Stat(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(src, time.Time{}, st.ModTime().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	fail(t, exitFailed, []string{"the source is not the one", "modified "}, resume(src, dst)...)
	if err := os.Chtimes(src, time.Time{}, st.ModTime()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readFile(t, state), before) {
		t.Error("the refusals changed the state")
	}
	full = false
	succeed(t, resume("--verify", src, dst)...)
	sameBytes(t, "the copy", ram.Stable(), want)

	for _, text := range []string{"", "{}", `{"version": 2}`, "\x00"} {
		if err := os.WriteFile(state, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		fail(t, exitFailed, []string{"no record of a copy by this version"}, resume(src, dst)...)
	}
	fail(t, exitFailed, []string{"no such file"}, "copy", "--resume=/no/such/folder/state", src, filepath.Join(t.TempDir(), "dst"))
}

// TestResumeBeforeTheBeginning: a copy that failed before anything was written leaves no
// state.
func TestResumeBeforeTheBeginning(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	small := serveRAM(t, nbdtest.NewRAM(make([]byte, 512)))
	src := writeFile(t, "src", make([]byte, 1024))
	fail(t, exitFailed, []string{"too small"}, "copy", "--resume", state, src, small)
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state is left: %v", err)
	}
	succeed(t, "copy", "--resume", state, src, filepath.Join(t.TempDir(), "dst"))
}

// failingBehind is a device that cannot be read from an offset on.
type failingBehind struct {
	changedDevice
	at int64
}

func (f failingBehind) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.at {
		return 0, errors.New("broken")
	}
	return f.changedDevice.ReadAt(p, off)
}

// TestResumeOfAnIncrementIntoAShortFile: the part that the file lacked at first is copied,
// although the file has its full length when the copy goes on.
func TestResumeOfAnIncrementIntoAShortFile(t *testing.T) {
	d := newChangedDisk()
	const length = 40 * changedUnit
	failing := true
	uri := serveOne(t, func() nbd.Device {
		dev := changedDevice{nbdtest.NewRAM(d.now), []string{extents.UnchangedContext + baseName}, d.state, &d.read, nil, nil}
		if failing {
			return failingBehind{dev, 60 * changedUnit}
		}
		return dev
	})
	path, state := writeFile(t, "copy", d.base[:length]), filepath.Join(t.TempDir(), "state")
	args := []string{"copy", "--resume", state, "--changed-since", baseName, uri, path}
	fail(t, exitFailed, []string{"reading", "goes on from byte"}, args...)
	s, err := copying.LoadState(state)
	if err != nil || s == nil || s.Done >= 60*changedUnit {
		t.Fatalf("state %+v, error %v", s, err)
	}
	// Writes that were not flushed are lost.
	if err := errors.Join(os.Truncate(path, max(s.Done, length)), os.Truncate(path, int64(len(d.now)))); err != nil {
		t.Fatal(err)
	}
	failing = false
	succeed(t, args...)
	sameBytes(t, "the copy", readFile(t, path), d.now)
}
