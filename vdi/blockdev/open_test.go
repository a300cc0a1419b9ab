package blockdev

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

func TestOpenFile(t *testing.T) {
	tests := []struct {
		size     int
		minBlock uint32
	}{{512, 512}, {1 << 20, 512}, {1, 1}, {513, 1}, {4096 + 511, 1}}
	for _, tt := range tests {
		path := filepath.Join(t.TempDir(), "image")
		data := bytes.Repeat([]byte("0123456"), tt.size/7+1)[:tt.size]
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := Open(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if d.Size() != int64(tt.size) || d.MinBlock() != tt.minBlock {
			t.Errorf("size %d, minimum block %d; want %d, %d", d.Size(), d.MinBlock(), tt.size, tt.minBlock)
		}
		got, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("content of %d bytes differs (%v)", tt.size, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(t.Context(), dir, Options{}); err == nil {
		t.Error("a folder was opened")
	}
	if _, err := Open(t.Context(), os.DevNull, Options{}); err == nil {
		t.Error("a character device was opened")
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{empty: errEmpty, filepath.Join(dir, "missing"): os.ErrNotExist} {
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, want) {
				t.Errorf("%s: got %v, want %v", path, err, want)
			}
			if waited := time.Since(begin); waited != openTimeout {
				t.Errorf("%s: waited %v, want %v", path, waited, openTimeout)
			}
		})
	}
}

// udev is late: the node appears while Open waits for it.
func TestOpenWaitsForTheNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	synctest.Test(t, func(t *testing.T) {
		opened := make(chan error)
		go func() {
			d, err := Open(t.Context(), path, Options{})
			if err == nil {
				err = d.Close()
			}
			opened <- err
		}()
		synctest.Wait() // it has looked, and sleeps
		if err := os.WriteFile(path, make([]byte, 512), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := <-opened; err != nil {
			t.Error(err)
		}
	})
}
