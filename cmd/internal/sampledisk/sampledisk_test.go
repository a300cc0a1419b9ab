package sampledisk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// readVolume reads a volume with code of its own: it takes every number from the disk, none
// from the code under test.
func readVolume(t *testing.T, disk io.ReaderAt) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	at := func(off, n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if _, err := disk.ReadAt(b, int64(off)); err != nil {
			t.Fatalf("read %d bytes at %d: %v", n, off, err)
		}
		return b
	}
	boot := at(0, 512)
	if boot[510] != 0x55 || boot[511] != 0xAA {
		t.Fatalf("got signature % x, want 55 aa", boot[510:])
	}
	sector, cluster := int(le.Uint16(boot[11:])), int(boot[13])
	fatStart, fatLen := int(le.Uint16(boot[14:]))*sector, int(le.Uint16(boot[22:]))*sector
	rootStart := fatStart + int(boot[16])*fatLen
	rootLen := int(le.Uint16(boot[17:])) * 32
	dataStart := rootStart + rootLen
	sectors := int(le.Uint16(boot[19:]))
	if sectors == 0 {
		sectors = int(le.Uint32(boot[32:]))
	}
	clusters := (sectors - dataStart/sector) / cluster
	if clusters < 4085 || clusters > 65524 {
		t.Fatalf("%d clusters make no FAT16", clusters)
	}
	if need := (clusters + 2) * 2; need > fatLen {
		t.Fatalf("a FAT of %d bytes cannot hold %d clusters", fatLen, clusters)
	}
	fat := at(fatStart, fatLen)
	if !bytes.Equal(fat, at(fatStart+fatLen, fatLen)) {
		t.Error("the two FATs differ")
	}

	files, owner := map[string][]byte{}, map[int]string{}
	for root := at(rootStart, rootLen); root[0] != 0; root = root[32:] {
		if root[11]&0x08 != 0 { // the label
			continue
		}
		name := strings.TrimRight(string(root[:8]), " ")
		if ext := strings.TrimRight(string(root[8:11]), " "); ext != "" {
			name += "." + ext
		}
		data := []byte{}
		c := int(le.Uint16(root[26:]))
		for ; c >= 2 && c < 0xFFF8; c = int(le.Uint16(fat[2*c:])) {
			if c >= clusters+2 || owner[c] != "" {
				t.Fatalf("%s: cluster %d is out of range or belongs to %q", name, c, owner[c])
			}
			owner[c] = name
			data = append(data, at(dataStart+(c-2)*cluster*sector, cluster*sector)...)
		}
		size := int(le.Uint32(root[28:]))
		if len(data)-size < 0 || len(data)-size >= cluster*sector {
			t.Fatalf("%s: %d bytes in its clusters, %d in its entry", name, len(data), size)
		}
		files[name] = data[:size]
	}
	return files
}

func keys(m map[string][]byte) []string { return slices.Sorted(maps.Keys(m)) }

func volume(t *testing.T, size int64, files []File) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := Write(f, size, files); err != nil {
		t.Fatalf("Write: %v", err)
	}
	return f
}

var sizes = []struct {
	name string
	size int64
}{
	{"smallest", (4085 + 1 + 2*17 + 32) * 512},
	{"16-bit count", 8 << 20},
	{"sample", SampleSize},
	{"no multiple of a sector", 100<<20 + 511},
	{"1 GiB", 1 << 30},
	{"largest", 2<<30 - 1<<20},
}

func TestWrite(t *testing.T) {
	files := []File{
		{"README.TXT", []byte("hello")},
		{"EMPTY.DAT", []byte{}},
		{"NOEXT", lines(512)}, // a whole cluster on the smallest volume
		{"A_B-1~2.X", lines(1<<20 + 1)},
	}
	want := map[string][]byte{}
	for _, f := range files {
		want[f.Name] = f.Data
	}
	for _, tt := range sizes {
		t.Run(tt.name, func(t *testing.T) {
			disk := volume(t, tt.size, files)
			if got := readVolume(t, disk); !maps.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("got files %v, want %v, or their contents differ", keys(got), keys(want))
			}
			if fi, err := disk.Stat(); err != nil || fi.Size() != tt.size {
				t.Errorf("the disk has %d bytes, want %d still (%v)", fi.Size(), tt.size, err)
			}
		})
	}
}

func TestWriteOnDirtyDisk(t *testing.T) {
	disk := &memory{bytes.Repeat([]byte{0xA5}, 8<<20)}
	if err := Write(disk, 8<<20, []File{{"A", []byte("a")}}); err != nil {
		t.Fatal(err)
	}
	if got := readVolume(t, bytes.NewReader(disk.b)); len(got) != 1 || string(got["A"]) != "a" {
		t.Errorf("got files %v, want A alone", got)
	}
}

func TestFsck(t *testing.T) {
	fsck := requires.Tool(t, "fsck.fat")
	for _, tt := range sizes {
		t.Run(tt.name, func(t *testing.T) {
			disk := volume(t, tt.size, Sample()[:1])
			out, err := exec.Command(fsck, "-n", "-v", disk.Name()).CombinedOutput()
			if err != nil || !bytes.Contains(out, []byte("16 bits per FAT entry")) && !bytes.Contains(out, []byte("16 bit entries")) {
				t.Errorf("fsck.fat -n -v: %v\n%s", err, out)
			}
		})
	}
	t.Run("all samples", func(t *testing.T) {
		disk := volume(t, SampleSize, Sample())
		if out, err := exec.Command(fsck, "-n", disk.Name()).CombinedOutput(); err != nil {
			t.Errorf("fsck.fat -n: %v\n%s", err, out)
		}
	})
}

func TestWriteErrors(t *testing.T) {
	const size = 8 << 20
	broken := errors.New("disk broken")
	many := make([]File, 512)
	for i := range many {
		many[i].Name = fmt.Sprintf("F%d", i)
	}
	tests := []struct {
		name  string
		size  int64
		files []File
		want  error
	}{
		{"negative", -1, nil, ErrSize},
		{"too small", 2 << 20, nil, ErrSize},
		{"too large", 2<<30 + 1<<20, nil, ErrSize},
		{"file too large", size, []File{{"A", make([]byte, size)}}, ErrFull},
		{"second file too large", size, []File{{"A", make([]byte, size/2)}, {"B", make([]byte, size/2)}}, ErrFull},
		{"too many files", size, many, ErrFull},
		{"no name", size, []File{{Name: ""}}, ErrName},
		{"long base", size, []File{{Name: "NINECHARS.TXT"}}, ErrName},
		{"long extension", size, []File{{Name: "A.JSON"}}, ErrName},
		{"lower case", size, []File{{Name: "readme.txt"}}, ErrName},
		{"two dots", size, []File{{Name: "A.B.C"}}, ErrName},
		{"final dot", size, []File{{Name: "A."}}, ErrName},
		{"path", size, []File{{Name: "A/B"}}, ErrName},
		{"broken disk", size, nil, broken},
		{"broken disk, with a file", size, []File{{"A", []byte("a")}}, broken},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var disk io.WriterAt = &memory{make([]byte, size)}
			if errors.Is(tt.want, broken) {
				disk = failing{broken}
			}
			if err := Write(disk, tt.size, tt.files); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if err := Write(&memory{make([]byte, size)}, size, []File{{Name: "A"}, {Name: "A"}}); err == nil {
		t.Error("got no error for a name used twice")
	}
}

func TestSample(t *testing.T) {
	files := Sample()
	for i, f := range Sample() {
		if f.Name != files[i].Name || !bytes.Equal(f.Data, files[i].Data) {
			t.Errorf("%s differs between two calls", f.Name)
		}
	}
	readme := string(files[0].Data)
	for _, f := range files[1:] {
		if line := fmt.Sprintf("%x  %s\r\n", sha256.Sum256(f.Data), f.Name); !strings.Contains(readme, line) {
			t.Errorf("README.TXT lacks %q", line)
		}
	}
	if got := string(files[1].Data[4096:4112]); got != "offset    4096\r\n" {
		t.Errorf("got line %q at offset 4096", got)
	}
	got := readVolume(t, volume(t, SampleSize, files))
	for _, f := range files {
		if !bytes.Equal(got[f.Name], f.Data) {
			t.Errorf("%s differs on the volume", f.Name)
		}
	}
}

type memory struct{ b []byte }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > int64(len(m.b)) {
		return 0, io.ErrShortWrite
	}
	return copy(m.b[off:], p), nil
}

type failing struct{ err error }

func (f failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }
