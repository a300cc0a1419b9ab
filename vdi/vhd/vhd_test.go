package vhd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"xapi-nbd/test/vhdimages"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
)

// TestImagesOfOthers reads images that other programs made.
func TestImagesOfOthers(t *testing.T) {
	tests := map[string]struct {
		hidden bool
		parent string
		raw    bool
		blocks []int64 // nil: those of expected.json
	}{
		"dynamic/leaf.vhd":      {},
		"odd-size/leaf.vhd":     {},
		"qemu-dynamic/leaf.vhd": {},
		"chain/leaf.vhd":        {parent: "base2.vhd", blocks: []int64{}},
		"chain/active.vhd":      {parent: "base2.vhd", blocks: []int64{}},
		"chain/base2.vhd":       {hidden: true, parent: "base1.vhd", blocks: []int64{0, 16}},
		"chain/base1.vhd":       {hidden: true, blocks: []int64{0, 3, 8}},
		"raw-parent/leaf.vhd":   {raw: true, blocks: []int64{1}},
	}
	for dir, expected := range vhdimages.Unpack(t, "testdata/images.tar.gz") {
		images, err := filepath.Glob(filepath.Join(dir, "*.vhd"))
		if err != nil || len(images) == 0 {
			t.Fatalf("%s: no image, %v", dir, err)
		}
		for _, path := range images {
			name := filepath.Base(dir) + "/" + filepath.Base(path)
			if filepath.Base(dir) == "fixed" {
				if _, err := parseFile(t, path); !errors.Is(err, vhd.ErrNotVHD) {
					t.Errorf("%s: got %v, want ErrNotVHD", name, err)
				}
				continue
			}
			want, ok := tests[name]
			if !ok {
				t.Errorf("%s: not in the table", name)
			}
			delete(tests, name)
			if want.blocks == nil {
				want.blocks = expected.Blocks
			}
			img, err := parseFile(t, path)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if img.Size() != expected.Size || img.IsHidden() != want.hidden || img.ParentName() != want.parent || img.HasRawParent() != want.raw {
				t.Errorf("%s: got size %d, hidden %t, parent %q, raw parent %t", name, img.Size(), img.IsHidden(), img.ParentName(), img.HasRawParent())
			}
			if got := blocksOf(t, img, path); !slices.Equal(got, want.blocks) {
				t.Errorf("%s: got blocks %d, want %d", name, got, want.blocks)
			}
		}
	}
	for name := range tests {
		t.Errorf("%s: not in the archive", name)
	}
}

func parseFile(t *testing.T, path string) (*vhd.Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return vhd.Parse(f)
}

// blocksOf returns the blocks that an image has.
func blocksOf(t *testing.T, img *vhd.Image, path string) []int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	set := vhd.NewBlockSet(img.Size())
	if err := img.AddBlocks(t.Context(), f, set); err != nil {
		t.Fatal(err)
	}
	return blocks(set)
}

// blocks lists a set by asking for runs of it.
func blocks(set *vhd.BlockSet) []int64 {
	found := []int64{}
	for off := int64(0); off < set.Size(); {
		in, n := set.Run(off, 1<<62)
		for b := off / vhd.BlockSize; in && b*vhd.BlockSize < off+n; b++ {
			found = append(found, b)
		}
		off += n
	}
	return found
}

// differencing returns an image of 5 blocks with a parent.
func differencing(t *testing.T) []byte {
	t.Helper()
	m := &vhdtest.Memory{}
	_, err := vhdtest.Create(m, vhdtest.Options{
		Size: 5 * vhdtest.BlockSize, UUID: [16]byte{1}, Differencing: true, ParentUUID: [16]byte{2}, ParentName: "parent.vhd",
	})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, m.Size())
	if _, err := m.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDamage damages each field that is used. It corrects the checksum afterwards, so that
// only the check of the field itself can find the damage.
func TestDamage(t *testing.T) {
	if _, err := vhd.Parse(bytes.NewReader(differencing(t))); err != nil {
		t.Fatalf("the image without damage: %v", err)
	}
	const footer, header, locator = 0, 512, 1536
	tests := []struct {
		name   string
		at     int
		put    []byte
		notVHD bool
	}{
		{name: "footer cookie", at: footer, put: []byte("x"), notVHD: true},
		{name: "footer version", at: footer + 12, put: []byte{0, 2}},
		{name: "header behind the largest disk", at: footer + 16, put: []byte{0xff}},
		{name: "header inside the footer", at: footer + 16, put: make([]byte, 8)},
		{name: "size 0", at: footer + 48, put: make([]byte, 8)},
		{name: "size above 2 TiB", at: footer + 48, put: []byte{0, 0, 3}},
		{name: "size that is no multiple of a sector", at: footer + 55, put: []byte{1}},
		{name: "type fixed", at: footer + 63, put: []byte{2}, notVHD: true},
		{name: "header cookie", at: header, put: []byte("x")},
		{name: "header version", at: header + 24, put: []byte{0, 2}},
		{name: "too few entries", at: header + 28, put: []byte{0, 0, 0, 4}},
		{name: "block size no power of 2", at: header + 32, put: []byte{0, 0x18, 0, 0}},
		{name: "block size 4 MiB", at: header + 32, put: []byte{0, 0x40, 0, 0}},
		{name: "block size 512", at: header + 32, put: []byte{0, 0, 2, 0}},
		{name: "table behind the largest disk", at: header + 16, put: []byte{0xff}},
		{name: "table inside the footer", at: header + 16, put: make([]byte, 8)},
		{name: "no locator that is understood", at: header + 576, put: []byte("W2ku")},
		{name: "locator of no length", at: header + 576 + 8, put: make([]byte, 4)},
		{name: "locator longer than any path", at: header + 576 + 8, put: []byte{0, 0, 0x20, 0}},
		{name: "locator behind the end", at: header + 576 + 16, put: []byte{0, 0, 0, 1}},
		{name: "locator that is no URL", at: locator, put: []byte("feil")},
		{name: "absolute path", at: locator, put: []byte("file:///etc/passwd")},
		{name: "path to a folder above", at: locator, put: []byte("file://../p.vhd\x00\x00")},
		{name: "path to a folder below", at: locator, put: []byte("file://./a/b.vhd")},
		{name: "path to the folder", at: locator, put: []byte("file://.\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")},
		{name: "path with a NUL inside", at: locator, put: []byte("file://./a\x00b.vhd")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := differencing(t)
			copy(b[tt.at:], tt.put)
			if tt.at < locator && !tt.notVHD {
				if _, err := vhd.Parse(bytes.NewReader(b)); err == nil {
					t.Error("a wrong checksum is accepted")
				}
			}
			seal(b[footer:footer+512], 64)
			seal(b[header:header+1024], 36)
			_, err := vhd.Parse(bytes.NewReader(b))
			if err == nil || errors.Is(err, vhd.ErrNotVHD) != tt.notVHD {
				t.Errorf("got %v, want an error, ErrNotVHD: %t", err, tt.notVHD)
			}
		})
	}
}

func seal(b []byte, at int) {
	copy(b[at:], make([]byte, 4))
	var sum uint32
	for _, v := range b {
		sum += uint32(v)
	}
	binary.BigEndian.PutUint32(b[at:], ^sum)
}

// TestFixedImage: the disk of a fixed image may begin with the bytes of an image, as a guest
// can write one to its disk.
func TestFixedImage(t *testing.T) {
	b := differencing(t)
	fixed := append(b, make([]byte, 5*vhd.BlockSize-len(b)+512)...)
	footer := fixed[5*vhd.BlockSize:]
	copy(footer, b[:512])
	if _, err := vhd.Parse(bytes.NewReader(fixed)); err != nil {
		t.Errorf("a footer that is not of a fixed image: %v", err)
	}
	footer[63] = 2
	if _, err := vhd.Parse(bytes.NewReader(fixed)); !errors.Is(err, vhd.ErrNotVHD) {
		t.Errorf("got %v, want ErrNotVHD", err)
	}
}

func TestIsEncrypted(t *testing.T) {
	b := differencing(t)
	batmap := bytes.Index(b, []byte("tdbatmap"))
	for _, key := range []byte{0, 1} {
		b[batmap+29] = key
		img, err := vhd.Parse(bytes.NewReader(b))
		if err != nil || img.IsEncrypted() != (key != 0) {
			t.Errorf("key %d: got %t and %v", key, err == nil && img.IsEncrypted(), err)
		}
	}
}

func TestEveryPrefixFails(t *testing.T) {
	whole := differencing(t)
	for n := range 1536 + len("file://./parent.vhd") {
		if _, err := vhd.Parse(bytes.NewReader(whole[:n])); err == nil {
			t.Fatalf("the first %d bytes are taken for an image", n)
		}
	}
}

// TestAddBlocks covers tables that are longer than one read, and disks of other sizes
// than the set.
func TestAddBlocks(t *testing.T) {
	const blocksInImage = 200_000
	m := &vhdtest.Memory{}
	w, err := vhdtest.Create(m, vhdtest.Options{Size: blocksInImage * vhd.BlockSize, OriginalSize: vhd.BlockSize, ReservedEntries: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	want := []int64{0, 63, 64, 65535, 65536, 131071, 131072, blocksInImage - 1}
	for _, b := range want {
		if err := w.AddBlock(b, nil, func() {}); err != nil {
			t.Fatal(err)
		}
	}
	img, err := vhd.Parse(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{blocksInImage * vhd.BlockSize, blocksInImage*vhd.BlockSize - 512, 65536 * vhd.BlockSize, vhd.BlockSize / 2} {
		set := vhd.NewBlockSet(size)
		if err := img.AddBlocks(t.Context(), m, set); err != nil {
			t.Fatal(err)
		}
		fits := slices.DeleteFunc(slices.Clone(want), func(b int64) bool { return b*vhd.BlockSize >= size })
		if got := blocks(set); !slices.Equal(got, fits) {
			t.Errorf("size %d: got blocks %d, want %d", size, got, fits)
		}
		var bytes int64
		for _, b := range fits {
			bytes += min(vhd.BlockSize, size-b*vhd.BlockSize)
		}
		if got := set.Bytes(); got != bytes {
			t.Errorf("size %d: got %d bytes, want %d", size, got, bytes)
		}
	}
}

func TestAddBlocksErrors(t *testing.T) {
	b := differencing(t)
	img, err := vhd.Parse(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	set := vhd.NewBlockSet(img.Size())
	if err := img.AddBlocks(t.Context(), bytes.NewReader(b[:2560+16]), set); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a short table: got %v, want io.ErrUnexpectedEOF", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := img.AddBlocks(ctx, bytes.NewReader(b), set); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// TestRun compares runs with the set, block by block, from odd offsets.
func TestRun(t *testing.T) {
	const size = 300*vhd.BlockSize - 4096
	m := &vhdtest.Memory{}
	w, err := vhdtest.Create(m, vhdtest.Options{Size: 300 * vhd.BlockSize})
	if err != nil {
		t.Fatal(err)
	}
	has := func(b int64) bool { return b < 3 || b >= 60 && b < 140 || b == 200 || b == 299 }
	for b := range int64(300) {
		if has(b) {
			if err := w.AddBlock(b, nil, func() {}); err != nil {
				t.Fatal(err)
			}
		}
	}
	img, err := vhd.Parse(m)
	if err != nil {
		t.Fatal(err)
	}
	set := vhd.NewBlockSet(size)
	if err := img.AddBlocks(t.Context(), m, set); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int64{1, 4096, vhd.BlockSize, 100*vhd.BlockSize + 1, 1 << 62} {
		for off := int64(0); off < size; off += vhd.BlockSize/2 + 512 {
			end := off
			for end < size && has(end/vhd.BlockSize) == has(off/vhd.BlockSize) {
				end = min((end/vhd.BlockSize+1)*vhd.BlockSize, size)
			}
			in, n := set.Run(off, limit)
			if in != has(off/vhd.BlockSize) || n != min(limit, end-off) {
				t.Fatalf("Run(%d, %d): got %t, %d, want %t, %d", off, limit, in, n, has(off/vhd.BlockSize), min(limit, end-off))
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	m := &vhdtest.Memory{}
	if _, err := vhdtest.Create(m, vhdtest.Options{Size: 3 * vhd.BlockSize, Differencing: true, ParentUUID: [16]byte{1}, ParentName: "p.vhd"}); err != nil {
		f.Fatal(err)
	}
	b := make([]byte, m.Size())
	if _, err := m.ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 1536 { // so that not every damage ends at a checksum
			b = bytes.Clone(b)
			seal(b[:512], 64)
			seal(b[512:1536], 36)
		}
		img, err := vhd.Parse(bytes.NewReader(b))
		if err != nil {
			return
		}
		set := vhd.NewBlockSet(min(img.Size(), 1<<30))
		_ = img.AddBlocks(t.Context(), bytes.NewReader(b), set)
		if set.Bytes() > set.Size() {
			t.Errorf("%d bytes of %d are in blocks", set.Bytes(), set.Size())
		}
	})
}
