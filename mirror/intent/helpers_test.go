package intent

import (
	"context"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/internal/fsys"
	"xapi-nbd/internal/fsys/memfs"
)

const statePath = "/var/lib/mirror"

// fourRegions is a mirror with four regions, of which the last is short.
var fourRegions = Mirror{Size: 3*minRegion + 512, Primary: "primary", Secondary: "secondary"}

// newFiles returns a file system with the folder of the log.
func newFiles() *memfs.FS {
	files := memfs.New()
	files.WriteDurably("/var/lib/other", "")
	return files
}

// mustOpen opens a log, which the test closes at its end.
func mustOpen(t *testing.T, files fsys.FS, m Mirror) *Log {
	t.Helper()
	l, err := open(files, statePath, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// listed returns the numbers of the regions that a log lists.
func listed(l *Log) (all []int) {
	for off, n := range l.Dirty() {
		for at := off; at < off+n; at += minRegion {
			all = append(all, int(at/minRegion))
		}
	}
	return all
}

// listedAfter returns the regions that the next process finds.
func listedAfter(t *testing.T, files *memfs.FS, m Mirror) []int {
	t.Helper()
	l, err := open(files, statePath, m)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return listed(l)
}

// write marks a region as written.
func write(t *testing.T, l *Log, region int) {
	t.Helper()
	mark(t, l, region)
	l.Done(int64(region)*minRegion, 512)
}

func mark(t *testing.T, l *Log, region int) {
	t.Helper()
	if err := l.Mark(context.Background(), int64(region)*minRegion, 512); err != nil {
		t.Fatal(err)
	}
}

// always is an argument of Clear.
func always(int64, int64) bool { return true }

func wantListed(t *testing.T, got []int, want ...int) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("listed regions: got %v, want %v", got, want)
	}
}

// counter counts the file operations whose names begin with a prefix.
func counter(files *memfs.FS, prefix string) *int {
	n := new(int)
	files.OnOp(func(op memfs.Op) error {
		if op.After && strings.HasPrefix(op.Name, prefix) {
			*n++
		}
		return nil
	})
	return n
}
