package allocation

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/test/requires"
	"xapi-nbd/test/vhdimages"
	"xapi-nbd/vdi/vhd"
)

// TestImagesOfOthers reads the chains that other programs made from real files.
func TestImagesOfOthers(t *testing.T) {
	requires.DirectIO(t, t.TempDir())
	reasons := map[string]string{"raw-parent": "raw_parent", "fixed": "not_vhd"}
	seen := 0
	for dir, expected := range vhdimages.Unpack(t, "../vhd/testdata/images.tar.gz") {
		keys := []string{"leaf"}
		if filepath.Base(dir) == "chain" {
			keys = append(keys, "active")
		}
		for _, key := range keys {
			link := filepath.Join(t.TempDir(), "vdi")
			if err := os.Symlink(filepath.Join(dir, key+".vhd"), link); err != nil {
				t.Fatal(err)
			}
			seen++
			set, err := Read(t.Context(), Source{Link: link, Key: key, MapperDir: filepath.Join(dir, "none"), Size: expected.Size})
			if want := reasons[filepath.Base(dir)]; want != "" {
				if !errors.Is(err, ErrUnknown) || Reason(err) != want {
					t.Errorf("%s: got %v, want the reason %s", dir, err, want)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", dir, err)
				continue
			}
			var got []int64
			for b := int64(0); b*vhd.BlockSize < expected.Size; b++ {
				if in, _ := set.Run(b*vhd.BlockSize, 1); in {
					got = append(got, b)
				}
			}
			if !slices.Equal(got, expected.Blocks) {
				t.Errorf("%s/%s: got blocks %d, want %d", filepath.Base(dir), key, got, expected.Blocks)
			}
		}
	}
	if seen != 7 {
		t.Errorf("%d disks were read, want 7", seen)
	}
}

// TestNamedPipe has the link lead to a pipe, the opening of which must not block.
func TestNamedPipe(t *testing.T) {
	dir := t.TempDir()
	pipe, link := filepath.Join(dir, "vdi.vhd"), filepath.Join(dir, "link")
	if err := errors.Join(unix.Mkfifo(pipe, 0o600), os.Symlink(pipe, link)); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(t.Context(), Source{Link: link, Key: "vdi", Size: vhd.BlockSize}); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want ErrUnknown", err)
	}
}
