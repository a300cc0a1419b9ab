package allocation

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
)

// stillWorld is a chain of three images that nobody changes: the leaf, base1 and base2,
// with one block each.
func stillWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, files: map[string]*node{}, target: modelDir + "/" + leafName}
	base2 := w.create("base2.vhd", nil, modelBlocks, true)
	base1 := w.create("base1.vhd", base2, modelBlocks, true)
	w.leaf = w.create(leafName, base1, modelBlocks, false)
	for i, n := range []*node{w.leaf, base1, base2} {
		w.check(n.writer.AddBlock(int64(i), []byte{1}, func() {}))
		w.data[i] = true
	}
	return w
}

// damagedFiles is a world with a fault in one file.
type damagedFiles struct {
	*world
	name string
	read func(p []byte, off int64) (int, error)
}

type damagedFile struct {
	file
	read func(p []byte, off int64) (int, error)
}

func (f damagedFile) ReadAt(p []byte, off int64) (int, error) {
	if n, err := f.read(p, off); err != nil {
		return n, err
	}
	return f.file.ReadAt(p, off)
}

func (d damagedFiles) open(path string) (file, error) {
	f, err := d.world.open(path)
	if err == nil && filepath.Base(path) == d.name {
		f = damagedFile{f, d.read}
	}
	return f, err
}

// TestEveryDoubt has one reason for doubt in each row: Read returns no set, and the reason.
func TestEveryDoubt(t *testing.T) {
	images := []string{leafName, "base1.vhd", "base2.vhd"}
	type row struct {
		name   string
		reason string
		spoil  func(w *world) fileSystem
	}
	spoil := func(f func(w *world)) func(w *world) fileSystem {
		return func(w *world) fileSystem { f(w); return w }
	}
	put := func(name string, at int64, b ...byte) func(w *world) fileSystem {
		return spoil(func(w *world) { _, err := w.files[name].storage.WriteAt(b, at); w.check(err) })
	}
	rows := []row{
		{"no link", "no_link", spoil(func(w *world) { w.target = "" })},
		{"link to nothing", "image", spoil(func(w *world) { delete(w.files, leafName) })},
		{"link to a raw file", "not_vhd", spoil(func(w *world) { w.target = modelDir + "/vdi.raw" })},
		{"link to a raw volume", "not_vhd", spoil(func(w *world) { w.target = "/dev/VG_XenStorage-sr/LV-vdi" })},
		{"link to a qcow2 volume", "not_vhd", spoil(func(w *world) { w.target = "/dev/VG_XenStorage-sr/QCOW2-vdi" })},
		{"link to another VDI", "not_vhd", spoil(func(w *world) { w.target = modelDir + "/base1.vhd" })},
		{"leaf without a footer", "not_vhd", put(leafName, 0, 0)},
		{"a fixed image whose disk begins with an image", "not_vhd", put(leafName, modelBlocks*vhd.BlockSize, fixedFooter()...)},
		{"hidden leaf", "hidden", spoil(func(w *world) { w.check(w.leaf.writer.SetHidden(true)) })},
		{"leaf smaller than the VDI", "size", spoil(func(w *world) { w.check(w.leaf.writer.SetSize(2 * vhd.BlockSize)) })},
		{"parent with another uuid", "image", spoil(func(w *world) { w.create("base1.vhd", nil, modelBlocks, true) })},
		{"raw parent", "raw_parent", spoil(func(w *world) {
			w.check(w.files["base1.vhd"].writer.SetParent([16]byte{}, "base.raw", func() {}))
		})},
		{"absolute locator", "image", put("base1.vhd", 1536, []byte("file:///sr/base2.vhd")...)},
		{"locator to another folder", "image", put("base1.vhd", 1536, []byte("file://../base2.vhd")...)},
		{"locator longer than any path", "image", spoil(func(w *world) {
			base1 := w.files["base1.vhd"]
			w.check(base1.writer.SetParent(base1.parent.uuid, strings.Repeat("x", 5000), func() {}))
		})},
		{"loop", "too_many_images", spoil(func(w *world) {
			base1 := w.files["base1.vhd"]
			w.check(base1.writer.SetParent(base1.uuid, base1.name, func() {}))
		})},
		{"chain of 65", "too_many_images", spoil(func(w *world) { deepen(w, 62) })},
		{"table too short for the disk", "image", spoil(func(w *world) {
			w.check(w.files["base1.vhd"].writer.SetSize((modelBlocks + 1) * vhd.BlockSize))
		})},
	}
	for _, name := range images[1:] {
		rows = append(rows,
			row{name + " is missing", "image", spoil(func(w *world) { delete(w.files, name) })},
			row{name + " is no VHD", "image", put(name, 0, 0)})
	}
	for _, name := range images {
		rows = append(rows,
			row{name + " is encrypted", "encrypted", put(name, 3072+29, 1)},
			row{name + ": wrong checksum of the footer", "image", put(name, 40, 0xff)},
			row{name + ": wrong checksum of the header", "image", put(name, 512+48, 0xff)},
			row{name + ": the table cannot be read", "image", func(w *world) fileSystem {
				return damagedFiles{w, name, func(_ []byte, off int64) (int, error) {
					if off >= 2560 {
						return 0, &fs.PathError{Op: "read", Path: name, Err: errors.New("input/output error")}
					}
					return 0, nil
				}}
			}},
			row{name + ": the table ends early", "image", func(w *world) fileSystem {
				return damagedFiles{w, name, func(_ []byte, off int64) (int, error) {
					if off >= 2560 {
						return 16, io.EOF
					}
					return 0, nil
				}}
			}})
	}
	for _, tt := range rows {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				set, err := read(t.Context(), tt.spoil(stillWorld(t)), modelSource())
				if !errors.Is(err, ErrUnknown) || set != nil {
					t.Fatalf("got %v, %v, want ErrUnknown", set, err)
				}
				if got := Reason(err); got != tt.reason || !slices.Contains(Reasons, got) {
					t.Errorf("got the reason %q, want %q: %v", got, tt.reason, err)
				}
			})
		})
	}
}

// deepen puts n images under the chain.
func deepen(w *world, n int) {
	last := w.files["base2.vhd"]
	for i := range n {
		below := w.create(fmt.Sprintf("deep%d.vhd", i), nil, modelBlocks, true)
		// The image becomes a differencing one: the same, made anew.
		o := vhdtest.Options{
			Size: modelBlocks * vhd.BlockSize, UUID: last.uuid, Hidden: true,
			Differencing: true, ParentUUID: below.uuid, ParentName: below.name,
		}
		var err error
		last.writer, err = vhdtest.Create(last.storage, o)
		w.check(err)
		last = below
	}
}

// TestLongestChain reads a chain as long as SM makes them, and one that is longer.
func TestLongestChain(t *testing.T) {
	w := stillWorld(t)
	deepen(w, 28)
	if _, err := read(t.Context(), w, modelSource()); err != nil {
		t.Error(err)
	}
}

// TestDeviceMapper has the link lead to the folder of a volume group and the parents to
// device-mapper's.
func TestDeviceMapper(t *testing.T) {
	w := stillWorld(t)
	w.target = "/dev/VG_XenStorage-sr/VHD-vdi"
	set, err := read(t.Context(), volumes{w}, modelSource())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := set.Bytes(), int64(3*vhd.BlockSize); got != want {
		t.Errorf("got %d bytes, want %d", got, want)
	}
}

// volumes shows the files of a world as LVM would.
type volumes struct{ *world }

func (v volumes) open(path string) (file, error) {
	switch {
	case path == "/dev/VG_XenStorage-sr/VHD-vdi":
		return v.world.open(modelDir + "/" + leafName)
	case filepath.Dir(path) == mapperDir:
		return v.world.open(modelDir + "/" + filepath.Base(path))
	}
	return nil, fs.ErrNotExist
}

// TestImagesChangeBeforeEachRecheck changes an image before each recheck.
func TestImagesChangeBeforeEachRecheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, err := read(t.Context(), renaming{stillWorld(t)}, modelSource())
		if got := Reason(err); !errors.Is(err, ErrUnknown) || got != "changing" {
			t.Errorf("got %v with the reason %q, want changing", err, got)
		}
	})
}

// renaming gives the last image of the chain another inode each time that it is opened.
type renaming struct{ *world }

func (r renaming) open(path string) (file, error) {
	f, err := r.world.open(path)
	if m, ok := f.(*modelFile); ok && filepath.Base(path) == "base2.vhd" {
		m.n = &node{storage: m.n.storage, ino: r.nextID + 1}
		r.nextID++
	}
	return f, err
}

// fixedFooter returns the footer behind the disk of a fixed image.
func fixedFooter() []byte {
	b := make([]byte, 512)
	copy(b, "conectix")
	b[63] = 2
	return b
}
