package nbdfile

import (
	"errors"
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
