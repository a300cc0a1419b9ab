package requires

import (
	"os/exec"
	"strings"
)

// CleanTB is a TB that calls functions at its end.
type CleanTB interface {
	TB
	Cleanup(f func())
	Errorf(format string, args ...any)
}

// Loop makes a loop device of a file, with further arguments of losetup, until the end of the
// test. It ends the test where there are none.
func Loop(tb CleanTB, image string, args ...string) (path string) {
	tb.Helper()
	LoopDevices(tb)
	losetup := Tool(tb, "losetup")
	out, err := exec.Command(losetup, append(args, "--find", "--show", image)...).CombinedOutput()
	if err != nil {
		tb.Fatalf("losetup: %v: %s", err, out)
	}
	path = strings.TrimSpace(string(out))
	tb.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", path).CombinedOutput(); err != nil {
			tb.Errorf("losetup --detach: %v: %s", err, out)
		}
	})
	return path
}
