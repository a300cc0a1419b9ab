package nbdfile

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
)

// TestDataIsRemembered: devices of one file that is written to share what they know of data in
// it, until one of them makes a hole.
func TestDataIsRemembered(t *testing.T) {
	const k, size = 64 << 10, 1 << 20
	path := makeSparse(t, size, [2]int64{0, size})
	one, other := open(t, path, Options{}), open(t, path, Options{})
	defer one.Close()
	defer other.Close()
	wantExtents(t, one, "D1048576")

	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), punchHole, 0, k); err != nil {
		t.Skipf("no holes can be made here: %v", err)
	}
	wantExtents(t, other, "D1048576") // without asking the file system, which knows of the hole
	if err := other.(nbd.Trimmer).Trim(2*k, k); err != nil {
		t.Fatal(err)
	}
	wantExtents(t, one, "H65536 D65536 H65536 D851968")
	if err := one.(nbd.ZeroWriter).WriteZeroes(0, size, false, false); err != nil {
		t.Fatal(err)
	}
	wantExtents(t, other, "H1048576")
}

func wantExtents(t *testing.T, d nbd.Device, want string) {
	t.Helper()
	got, err := d.(nbd.Extenter).Extents(0, d.Size())
	if err != nil || names(got) != want {
		t.Errorf("got %q and error %v, want %q", names(got), err, want)
	}
}

// TestSharedStateEndsWithTheLastDevice: nothing is kept of files that are not open.
func TestSharedStateEndsWithTheLastDevice(t *testing.T) {
	path := makeSparse(t, 4096)
	one, other := open(t, path, Options{}), open(t, path, Options{ReadOnly: true})
	state := one.(writeFile).shared
	if other.(readFile).shared != state {
		t.Error("two devices of one file share nothing")
	}
	check := func(want int) {
		t.Helper()
		files.mu.Lock()
		defer files.mu.Unlock()
		if kept := files.byID[state.id] == state; state.users != want || kept != (want > 0) {
			t.Errorf("%d devices, kept %v; want %d devices", state.users, kept, want)
		}
	}
	check(2)
	one.Close()
	one.Close() // does nothing
	check(1)
	other.Close()
	check(0)
}
