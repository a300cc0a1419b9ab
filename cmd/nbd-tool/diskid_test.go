package main

import (
	"errors"
	"os"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/test/requires"
)

// TestIdentityOfBlockDevices: a block device is identified by the disk behind it, and not by its
// name, which another disk may have later.
func TestIdentityOfBlockDevices(t *testing.T) {
	requires.LoopDevices(t)
	identity := func(image string, args ...string) string {
		t.Helper()
		path := requires.Loop(t, image, args...)
		e, err := copying.OpenFile(path, true)
		if err != nil {
			t.Fatal(err)
		}
		id, err := identify(side{path: path}, e, false)
		if err := errors.Join(err, e.Close()); err != nil {
			t.Fatal(err)
		}
		return id.Name
	}
	remade := func(path string) string {
		t.Helper()
		if err := errors.Join(os.Remove(path), os.WriteFile(path, make([]byte, 1<<20), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	image := writeFile(t, "image", make([]byte, 1<<20))
	first := identity(image)
	if again := identity(image); again != first {
		t.Errorf("another device of the same file: got %q, want %q", again, first)
	}
	for name, id := range map[string]string{
		"another file":         identity(writeFile(t, "image", make([]byte, 1<<20))),
		"another part of it":   identity(image, "--offset", "4096"),
		"a file made in place": identity(remade(image)),
	} {
		if id == first {
			t.Errorf("%s: got the same identity %q", name, id)
		}
	}
}
