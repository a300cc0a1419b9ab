package main

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

const (
	changedUnit = 64 << 10
	baseName    = "5a9e4b21-6f7c-4f55-9a11-0c3f5e8f7d10"
)

// changedDevice is a device that has a context for the blocks that have changed since a base.
type changedDevice struct {
	nbd.Device
	contexts []string
	state    []uint64 // of each block, as in extents.UnchangedContext
	read     *atomic.Int64
	err      error // of ContextExtents
	readErr  error // of ReadAt
}

func (d changedDevice) Contexts() []string { return d.contexts }

func (d changedDevice) ReadAt(p []byte, off int64) (int, error) {
	d.read.Add(int64(len(p)))
	if d.readErr != nil {
		return 0, d.readErr
	}
	return d.Device.ReadAt(p, off)
}

func (d changedDevice) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	var answer []wire.Extent
	for at := off; at < off+n; {
		end := min((at/changedUnit+1)*changedUnit, d.Size())
		state := d.state[at/changedUnit]
		if strings.HasPrefix(name, extents.DirtyContext) {
			state = extents.StateDirty &^ state
		}
		answer = append(answer, wire.Extent{Length: uint64(end - at), Status: state})
		at = end
	}
	return answer, d.err
}

// changedDisk is a disk, its earlier content, and its changed blocks.
type changedDisk struct {
	base, now []byte
	state     []uint64
	data      int64 // bytes of changed blocks that are not known to be zero
	read      atomic.Int64
	err       error // of the contexts
	readErr   error
}

// newChangedDisk has 64 blocks and a short one. Block 3 and 4 have changed, 10 is zero and
// known to be, 20 is zero, and the last one has changed.
func newChangedDisk() *changedDisk {
	const size = 64*changedUnit + 5000
	d := &changedDisk{base: bytes.Repeat([]byte("base"), size/4), state: make([]uint64, 65)}
	d.now = bytes.Clone(d.base)
	for i := range d.state {
		d.state[i] = extents.StateUnchanged
	}
	block := func(i int) []byte { return d.now[i*changedUnit : min((i+1)*changedUnit, size)] }
	for _, i := range []int{3, 4, 64} {
		d.state[i] = 0
		copy(block(i), bytes.Repeat([]byte("new!"), len(block(i))/4))
	}
	clear(block(10))
	d.state[10] = extents.StateZeroNow
	clear(block(20))
	d.state[20] = 0
	d.data = 3*changedUnit + 5000
	return d
}

// serve serves the disk with the contexts.
func (d *changedDisk) serve(t *testing.T, contexts ...string) (uri string) {
	return serve(t, exporterFunc(func(string) (nbd.Device, error) {
		r := nbdtest.NewRAM(d.now)
		return changedDevice{r, contexts, d.state, &d.read, d.err, d.readErr}, nil
	})) + "disk"
}

// TestCopyChangedSince brings a full copy up to date with each of the contexts, and reads
// nothing else.
func TestCopyChangedSince(t *testing.T) {
	tests := []struct {
		name     string
		contexts []string
		known    int64 // bytes that are known to be zero
	}{
		{"unchanged", []string{extents.UnchangedContext + baseName}, changedUnit},
		{"dirty", []string{extents.DirtyContext + baseName}, 0},
		{"both", []string{extents.DirtyContext + baseName, extents.UnchangedContext + baseName}, changedUnit},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newChangedDisk()
			uri, path := d.serve(t, tt.contexts...), writeFile(t, "copy", d.base)
			succeed(t, "copy", "--changed-since", baseName, uri, path)
			sameBytes(t, "the copy", readFile(t, path), d.now)
			if got, want := d.read.Load(), d.data+changedUnit-tt.known; got != want {
				t.Errorf("%d bytes were read, want %d", got, want)
			}
			succeed(t, "copy", "--verify", "--changed-since", baseName, uri, path)
			sameBytes(t, "the copy", readFile(t, path), d.now)
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if saved := st.Size - st.Blocks*512; saved < 2*changedUnit-4096 {
				t.Errorf("blocks that are zero take up space: %d bytes of %d are saved", saved, st.Size)
			}
		})
	}
}

// TestCopyChangedSinceOfAGrownDisk has a base that ended in the middle.
func TestCopyChangedSinceOfAGrownDisk(t *testing.T) {
	d := newChangedDisk()
	const size = 40 * changedUnit
	clear(d.now[size:]) // the new part of a disk that has grown reads as zeroes unless it was written
	d.state[64] = extents.StateUnchanged
	path := writeFile(t, "copy", d.base[:size])
	succeed(t, "copy", "--verify", "--changed-since", baseName, d.serve(t, extents.UnchangedContext+baseName), path)
	sameBytes(t, "the copy", readFile(t, path), d.now)
}

// TestCopyChangedSinceIntoAShortFile has a copy that lacks its end, and a server that calls
// that end unchanged. The copy fails.
func TestCopyChangedSinceIntoAShortFile(t *testing.T) {
	for _, name := range []string{extents.UnchangedContext, extents.DirtyContext} {
		for _, length := range []int{40 * changedUnit, 3*changedUnit + 777, 0} {
			d := newChangedDisk()
			uri, path := d.serve(t, name+baseName), writeFile(t, "copy", d.base[:length])
			succeed(t, "copy", "--verify", "--changed-since", baseName, uri, path)
			sameBytes(t, "the copy", readFile(t, path), d.now)
		}
	}
	d := newChangedDisk()
	d.readErr = errors.New("broken")
	path := writeFile(t, "copy", d.base[:40*changedUnit])
	fail(t, exitFailed, []string{"reading"}, "copy", "--changed-since", baseName, d.serve(t, extents.UnchangedContext+baseName), path)
	if got := len(readFile(t, path)); got != 40*changedUnit {
		t.Errorf("after a failure the copy has %d bytes, want as many as before", got)
	}
}

func TestCopyChangedSinceRefuses(t *testing.T) {
	d := newChangedDisk()
	uri, path := d.serve(t, extents.UnchangedContext+baseName), writeFile(t, "copy", d.base)
	since := func(args ...string) []string { return append([]string{"copy", "--changed-since", baseName}, args...) }
	fail(t, exitUsage, []string{"existing copy"}, since(uri, "-")...)
	fail(t, exitUsage, []string{"export as SRC"}, since(path, path+"2")...)
	fail(t, exitUsage, []string{"does not read as zeroes"}, since("--destination-is-zero", uri, path)...)
	fail(t, exitFailed, []string{"does not exist", "full copy"}, since(uri, path+"2")...)
	fail(t, exitFailed, []string{"neither a file nor"}, since(uri, filepath.Dir(path))...)
	fail(t, exitFailed, []string{"no copy of the base"}, since(uri, writeFile(t, "copy", append(d.base, 0)))...)
	fail(t, exitFailed, []string{"does not know which blocks have changed since", "log has the reason"}, since(d.serve(t), path)...)
	sameBytes(t, "the copy", readFile(t, path), d.base)

	d.err = errors.New("broken")
	fail(t, exitFailed, []string{"changed blocks"}, since(uri, path)...)
	sameBytes(t, "the copy", readFile(t, path), d.base)
}

func TestMapOfContexts(t *testing.T) {
	d := newChangedDisk()
	uri := d.serve(t, extents.UnchangedContext+baseName, extents.DirtyContext+"b", "x-test:age")
	tests := map[string]string{
		extents.UnchangedContext + baseName: `               0           196608  unchanged
          196608           131072  changed
          327680           327680  unchanged
          655360            65536  changed,zero
          720896           589824  unchanged
         1310720            65536  changed
         1376256          2818048  unchanged
         4194304             5000  changed
           total           201608  changed, 4.8 %
           total          3932160  unchanged, 93.6 %
           total            65536  changed,zero, 1.6 %
`,
		extents.DirtyContext + "b": `               0           196608  clean
          196608           131072  dirty
          327680           327680  clean
          655360            65536  dirty
          720896           589824  clean
         1310720            65536  dirty
         1376256          2818048  clean
         4194304             5000  dirty
           total          3932160  clean, 93.6 %
           total           267144  dirty, 6.4 %
`,
	}
	for name, want := range tests {
		if got := succeed(t, "map", "--context", name, uri); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
		}
	}
	got := succeed(t, "map", "--json", "--context", "x-test:age", uri)
	for _, want := range []string{`"context": "x-test:age"`, `{"offset":0,"length":196608,"status":1,"state":"1"}`, `"totals": {"0":201608,"1":3932160,"2":65536}`} {
		if !strings.Contains(got, want) {
			t.Errorf("got %s, want it to contain %s", got, want)
		}
	}
	fail(t, exitFailed, []string{"does not provide the metadata context x-test:other"}, "map", "--context", "x-test:other", uri)
}
