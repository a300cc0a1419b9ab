package copying

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

// openEnds returns a source of size bytes and a destination, which are files.
func openEnds(t *testing.T, size int) (src, dst End) {
	t.Helper()
	dir := t.TempDir()
	open := func(name string, content []byte, readOnly bool) End {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		e, err := OpenFile(path, readOnly)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		return e
	}
	return open("src", nbdtest.Bytes(size, 0, 1), true), open("dst", make([]byte, size), false)
}

// TestCopyNoticesChangesOfFiles: a copy fails if one of the files has not its size any more at
// the end, or if the destination's path leads to another file.
func TestCopyNoticesChangesOfFiles(t *testing.T) {
	const size = 3*chunkSize + 777
	for _, tt := range []struct {
		name, file, want string
		change           func(path string) error
	}{
		{"source grows", "src", "src: its size has changed from 787209 to 791305 bytes", func(path string) error { return os.Truncate(path, size+4096) }},
		{"source shrinks", "src", "src: it", func(path string) error { return os.Truncate(path, size-4096) }},
		{"destination grows", "dst", "dst: its size has changed", func(path string) error { return os.Truncate(path, size+1) }},
		{"destination shrinks", "dst", "dst: its size has changed", func(path string) error { return os.Truncate(path, 1) }},
		{"destination is removed", "dst", "dst: no such file", func(path string) error {
			if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		}},
		{"destination is replaced", "dst", "dst: it was replaced", func(path string) error {
			return errors.Join(os.WriteFile(path+".new", make([]byte, size), 0o600), os.Rename(path+".new", path))
		}},
		{"nothing", "", "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src, dst := openEnds(t, size)
			change := func(int64) {
				if tt.change == nil {
					return
				}
				if err := tt.change(filepath.Join(filepath.Dir(src.Name()), tt.file)); err != nil {
					t.Error(err)
				}
			}
			err := New(src, dst, Options{Requests: 1, Count: change}).Copy(t.Context())
			if got := errorText(err); !strings.Contains(got, tt.want) || (err != nil) != (tt.want != "") {
				t.Errorf("copy: got error %q, want %q", got, tt.want)
			}
			if tt.file == "dst" {
				return
			}
			if err := os.Truncate(src.Name(), size); err != nil {
				t.Fatal(err)
			}
			err = New(src, nil, Options{Requests: 1, Count: change}).Stream(t.Context(), io.Discard)
			if got := errorText(err); !strings.Contains(got, tt.want) || (err != nil) != (tt.want != "") {
				t.Errorf("stream: got error %q, want %q", got, tt.want)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
