package main

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
)

// A file and the loop device on it have the same content, which would be lost if one were
// emptied for a copy of the other.
func TestCopyLoopDeviceOntoItsFile(t *testing.T) {
	requires.LoopDevices(t)
	want := content(1 << 20)
	file := writeFile(t, "disk", want)
	loop := attachLoop(t, file)
	other := attachLoop(t, file)
	behind := attachLoop(t, loop)
	copied := writeFile(t, "copied", nil)
	for _, pair := range [][2]string{{loop, file}, {file, loop}, {loop, loop}, {behind, loop}, {loop, behind}} {
		fail(t, exitUsage, []string{"both source and destination"}, "copy", pair[0], pair[1])
	}
	sameBytes(t, "the file, after all that", readFile(t, file), want)
	succeed(t, "copy", loop, copied)
	sameBytes(t, "another file", readFile(t, copied), want)
	succeed(t, "copy", loop, other) // they could be different parts of the file
}

// Block devices are copied from and to like files.
func TestCopyBlockDevices(t *testing.T) {
	requires.LoopDevices(t)
	want := content(3 << 20)
	clear(want[1<<20 : 2<<20])
	old := bytes.Repeat([]byte{0xee}, len(want))
	file := writeFile(t, "disk", old)
	loop := attachLoop(t, file)
	succeed(t, "copy", "--verify", serveRAM(t, nbdtest.NewRAM(want)), loop)
	sameBytes(t, "from an export", readFile(t, file), want)
	ram := nbdtest.NewRAM(old)
	succeed(t, "copy", "--verify", loop, serveRAM(t, ram))
	sameBytes(t, "to an export", ram.Stable(), want)
	small := attachLoop(t, writeFile(t, "small", old[:1<<20]))
	fail(t, exitFailed, []string{"is too small"}, "copy", loop, small)
	fail(t, exitFailed, []string{"--larger-destination accepts that"}, "copy", small, loop)
}

func attachLoop(t *testing.T, path string) (device string) {
	t.Helper()
	losetup := requires.Tool(t, "losetup")
	out, err := exec.Command(losetup, "--find", "--show", path).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	device = filepath.Clean(strings.TrimSpace(string(out)))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach: %v, %s", err, out)
		}
	})
	return device
}
