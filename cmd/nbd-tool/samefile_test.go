package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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
