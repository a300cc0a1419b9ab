package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// hooked is a device that calls a function before each write.
type hooked struct {
	*nbdtest.RAM
	before func()
}

func (h hooked) WriteAt(p []byte, off int64) (int, error) {
	h.before()
	return h.RAM.WriteAt(p, off)
}

// wantWarning runs a copy that succeeds with one line of error output.
func wantWarning(t *testing.T, want string, args ...string) {
	t.Helper()
	r := tool(t, append([]string{"copy"}, args...)...)
	if r.code != exitOK || !strings.Contains(r.err, want) || strings.Count(r.err, "\n") != 1 {
		t.Errorf("exit code %d, error output %q, want only %q", r.code, r.err, want)
	}
}

// TestCopyWarnsOfAModifiedSource: a source that is written to while it is copied is no error, but
// is not passed over in silence.
func TestCopyWarnsOfAModifiedSource(t *testing.T) {
	want := content(1 << 20)
	src := writeFile(t, "src", want)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	at := time.Now()
	dst := serveOne(t, func() nbd.Device {
		return hooked{ram.Again(), func() {
			at = at.Add(time.Second)
			if err := os.Chtimes(src, time.Time{}, at); err != nil {
				t.Error(err)
			}
		}}
	})
	wantWarning(t, src+" was written to during the copy", "--connections=1", "--requests=1", src, dst)
	sameBytes(t, "the copy", ram.Content(), want)
}

// withoutFlush is a device that does not promise to put anything on stable storage.
type withoutFlush struct {
	nbd.Device
	ram *nbdtest.RAM
}

func (w withoutFlush) WriteAt(p []byte, off int64) (int, error) { return w.ram.WriteAt(p, off) }

// TestCopyWarnsWithoutFlush: to a server without FLUSH a copy may be lost after its end.
func TestCopyWarnsWithoutFlush(t *testing.T) {
	want := content(1 << 20)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	dst := serveOne(t, func() nbd.Device { d := ram.Again(); return withoutFlush{nbd.ReadOnly(d), d} })
	wantWarning(t, "the server does not offer to flush", writeFile(t, "src", want), dst)
	sameBytes(t, "the copy", ram.Content(), want)
}
