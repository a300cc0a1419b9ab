// Package vhdimages unpacks VHD images of other programs for tests.
package vhdimages

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// Expected describes the data that a guest reads from the disk of an unpacked image.
type Expected struct {
	Size   int64      `json:"size"`
	Blocks []int64    `json:"blocks_of_2MiB_with_data"`
	Data   [][2]int64 `json:"nonzero"` // offset and length in bytes
}

// Unpack unpacks an archive of folders with images, such as vdi/vhd/testdata/images.tar.gz,
// and returns the folders with the expected results of each.
func Unpack(t testing.TB, archive string) map[string]Expected {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	found := make(map[string]Expected)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		b, err := io.ReadAll(r)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o700)
		}
		if err == nil {
			err = os.WriteFile(path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(path) == "expected.json" {
			var e Expected
			if err := json.Unmarshal(b, &e); err != nil {
				t.Fatal(err)
			}
			found[filepath.Dir(path)] = e
		}
	}
}
