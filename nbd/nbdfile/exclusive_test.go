package nbdfile

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/test/requires"
)

// TestExclusive: a file or device that is opened exclusively cannot be opened so a second time
// before it is closed. Other openers are not affected.
func TestExclusive(t *testing.T) {
	for name, tt := range map[string]struct {
		path func(t *testing.T) string
		want unix.Errno
	}{
		"file":         {func(t *testing.T) string { return makeFile(t, make([]byte, 4096)) }, unix.EAGAIN},
		"block device": {func(t *testing.T) string { return requires.Loop(t, makeFile(t, make([]byte, 1<<20))) }, unix.EBUSY},
	} {
		t.Run(name, func(t *testing.T) {
			path := tt.path(t)
			first := open(t, path, Options{Exclusive: true})
			for _, opts := range []Options{{Exclusive: true}, {Exclusive: true, ReadOnly: true}} {
				if d, err := Open(path, opts); !errors.Is(err, tt.want) {
					t.Errorf("%+v: got %v, %v, want %v", opts, d, err, tt.want)
				}
			}
			open(t, path, Options{}).Close()
			first.Close()
			open(t, path, Options{Exclusive: true}).Close()
		})
	}
}

// TestExclusiveAmongRecordLocks: locks of fcntl(2), which QEMU has on single bytes of its images,
// count too.
func TestExclusiveAmongRecordLocks(t *testing.T) {
	path := makeFile(t, make([]byte, 4096))
	qemu, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	set := func(kind int16) error {
		return unix.FcntlFlock(qemu.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: 100, Len: 1})
	}
	if err := set(unix.F_RDLCK); err != nil {
		t.Fatal(err)
	}
	if d, err := Open(path, Options{Exclusive: true}); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a file that is locked: got %v, %v, want EAGAIN", d, err)
	}
	if err := set(unix.F_UNLCK); err != nil {
		t.Fatal(err)
	}
	open(t, path, Options{Exclusive: true})
	if err := set(unix.F_RDLCK); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("locking a file that is open exclusively: got error %v, want EAGAIN", err)
	}
}

// TestShared: a file that is opened as shared can be opened so again, but not exclusively, and the
// other way round.
func TestShared(t *testing.T) {
	path := makeFile(t, make([]byte, 4096))
	for _, other := range []Options{{Exclusive: true}, {Shared: true}} {
		first := open(t, path, Options{Shared: !other.Shared, Exclusive: other.Shared})
		if d, err := Open(path, other); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%+v: got %v, %v, want EAGAIN", other, d, err)
		}
		first.Close()
	}
	open(t, path, Options{Shared: true})
	open(t, path, Options{Shared: true})
}
