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

// TestSeveralRangesAreRemembered: clients that read different ranges of data do not make each other
// search again.
func TestSeveralRangesAreRemembered(t *testing.T) {
	const k, size = 64 << 10, 1 << 20
	d := open(t, makeSparse(t, size, [2]int64{0, k}, [2]int64{8 * k, 9 * k}), Options{}).(writeFile)
	for _, off := range []int64{0, 8 * k, 0} {
		if _, err := d.Extents(off, 512); err != nil {
			t.Fatal(err)
		}
	}
	for _, off := range []int64{0, 8 * k} {
		if end, found := d.shared.dataAt(off); !found || end != off+k {
			t.Errorf("at %d: known %v, up to %d; want %d", off, found, end, off+k)
		}
	}
	known := d.shared.data.Load()
	d.shared.forget()
	d.shared.remember(known, span{0, size}) // the result of a search that began before
	if _, found := d.shared.dataAt(0); found {
		t.Error("a search has replaced what was forgotten while it was made")
	}
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
