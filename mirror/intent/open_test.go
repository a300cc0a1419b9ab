package intent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"xapi-nbd/internal/fsys/memfs"
)

// The next process finds what this one has listed.
func TestResume(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	write(t, l, 3)
	write(t, l, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	next := mustOpen(t, files, fourRegions)
	wantListed(t, listed(next), 1, 3)
	if !next.Resumed() || next.DirtyBytes() != minRegion+512 {
		t.Errorf("resumed %v, %d dirty bytes, want %d", next.Resumed(), next.DirtyBytes(), minRegion+512)
	}
	if err := l.Mark(t.Context(), 0, 512); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Mark of a closed log: got %v, want ErrClosed", err)
	}
}

// Adjacent regions are one range, which ends at the end of the disk.
func TestDirtyJoins(t *testing.T) {
	l := clearAll(t, newFiles())
	for _, region := range []int{0, 2, 3} {
		write(t, l, region)
	}
	var got [][2]int64
	for off, n := range l.Dirty() {
		got = append(got, [2]int64{off, n})
	}
	if len(got) != 2 || got[0] != [2]int64{0, minRegion} || got[1] != [2]int64{2 * minRegion, minRegion + 512} {
		t.Errorf("ranges: %v", got)
	}
	for off := range l.Dirty() {
		if off != 0 {
			t.Errorf("first range at %d", off)
		}
		break
	}
}

// A completed mirror is never resumed, as its secondary may have newer data.
func TestCompleted(t *testing.T) {
	for _, tc := range []struct {
		pivot bool
		want  string
	}{
		{true, "(pivot, 20"},
		{false, "(stop, 20"},
	} {
		files := newFiles()
		l := clearAll(t, files)
		mark(t, l, 0)
		if err := l.Complete(t.Context(), tc.pivot); err == nil {
			t.Error("completed while a write was under way")
		}
		l.Done(0, 512)
		if err := l.Complete(t.Context(), tc.pivot); err != nil {
			t.Fatal(err)
		}
		for name, err := range map[string]error{
			"Mark": l.Mark(t.Context(), 0, 512), "Complete": l.Complete(t.Context(), tc.pivot),
			"Clear": l.Clear(t.Context(), time.Now(), always),
		} {
			if !errors.Is(err, ErrCompleted) {
				t.Errorf("%s afterwards: got %v, want ErrCompleted", name, err)
			}
		}
		for _, s := range memfs.Survivals {
			_, err := open(files.AfterPowerCut(s), statePath, fourRegions)
			if !errors.Is(err, ErrCompleted) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v: got %v, want ErrCompleted, %s", s, err, tc.want)
			}
		}
	}
}

// Logs of other mirrors are refused, and stay as they are.
func TestOtherMirror(t *testing.T) {
	files := newFiles()
	clearAll(t, files).Close()
	before := files.String()
	for _, tc := range []struct {
		other Mirror
		want  string
	}{
		{Mirror{fourRegions.Size - 512, "primary", "secondary"}, "the ends have 50331648 bytes, and had 50332160"},
		{Mirror{fourRegions.Size + 1<<30, "primary", "secondary"}, "the ends have"},
		{Mirror{fourRegions.Size, "b", "secondary"}, "the primary is b, and was primary"},
		{Mirror{fourRegions.Size, "primary", "c"}, "the secondary is c, and was secondary"},
		{Mirror{fourRegions.Size, "secondary", "primary"}, "the primary is secondary"},
	} {
		_, err := open(files, statePath, tc.other)
		if !errors.Is(err, ErrOther) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), statePath) {
			t.Errorf("%+v: got %v, want ErrOther, %q", tc.other, err, tc.want)
		}
	}
	if files.String() != before {
		t.Error("a refused log was changed")
	}
}

// Files that are no valid log are refused, and stay as they are.
func TestInvalid(t *testing.T) {
	files := newFiles()
	clearAll(t, files).Close()
	valid, _ := files.Content(statePath)
	damage := func(at int) string { return flip(valid, at, 0, 1, 2) }
	for _, tc := range []struct{ name, text, want string }{
		{"text", "something else\n", "it is no write-intent log"},
		{"zeroes", string(make([]byte, 1<<20)), "it is no write-intent log"},
		{"generations", damage(generationAt), "it is damaged"},
		{"descriptions", damage(descriptionAt), "it is damaged"},
		{"names", damage(descriptionAt + 50), "it is damaged"},
		{"bits", damage(bitsAt), "it is damaged"},
		{"versions", damage(versionAt + 3), "it has the format 0, and not 1"},
		{"lengths", damage(lengthAt), "it is damaged"},
		{"header only", valid[:bitsAt], "it is damaged"},
		{"part of a header", valid[:100], "it is damaged"},
		{"no bits of the second, and a damaged first", damage(bitsAt)[:slotStride+bitsAt], "it is damaged"},
	} {
		files := newFiles()
		files.WriteDurably(statePath, tc.text)
		before := files.String()
		_, err := open(files, statePath, fourRegions)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want ErrInvalid, %q", tc.name, err, tc.want)
		}
		if files.String() != before {
			t.Errorf("%s: the file was changed", tc.name)
		}
	}
}

// flip changes one bit of some slots.
func flip(text string, at int, slots ...int) string {
	b := []byte(text)
	for _, slot := range slots {
		b[slot*slotStride+at] ^= 1
	}
	return string(b)
}

// damages are what can happen to a file, with the number of slots that are lost.
func damages(text string) map[string]int {
	all := map[string]int{text[:2*slotStride]: 1, text[:slotStride]: 2, text[:slotStride+bitsAt]: 2}
	for _, at := range []int{0, sumAt, versionAt + 3, lengthAt + 3, generationAt + 7, descriptionAt, descriptionAt + 20, bitsAt - 1, bitsAt} {
		for slot := range slots {
			all[flip(text, at, slot)] = 1
			all[flip(text, at, (slot+1)%slots, (slot+2)%slots)] = 2
		}
	}
	return all
}

// One damaged slot loses nothing. Two, which a torn write can leave, make all regions listed.
func TestDamagedSlots(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	write(t, l, 1)
	l.Close()
	text, _ := files.Content(statePath)
	for damaged, lost := range damages(text) {
		files := newFiles()
		files.WriteDurably(statePath, damaged)
		want := []int{1}
		if lost == 2 {
			want = []int{0, 1, 2, 3}
		}
		wantListed(t, listedAfter(t, files, fourRegions), want...)
		wantListed(t, listedAfter(t, files, fourRegions), want...) // mended
		if mended, _ := files.Content(statePath); len(mended) != len(text) {
			t.Errorf("the mended file has %d bytes, want %d", len(mended), len(text))
		}
	}
}

// No damage makes a completed mirror look as if it went on.
func TestDamagedAfterTheEnd(t *testing.T) {
	files := newFiles()
	l := clearAll(t, files)
	if err := l.Complete(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	text, _ := files.Content(statePath)
	for damaged := range damages(text) {
		files := newFiles()
		files.WriteDurably(statePath, damaged)
		if _, err := open(files, statePath, fourRegions); !errors.Is(err, ErrCompleted) {
			t.Errorf("got %v, want ErrCompleted", err)
		}
	}
}

// One process uses a log at a time. An empty file is a new log.
func TestFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mirror")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := Open(path, fourRegions)
	if err != nil {
		t.Fatal(err)
	}
	write(t, l, 0)
	if _, err := Open(path, fourRegions); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("a second process: got %v, want ErrLocked", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, err = Open(path, fourRegions)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wantListed(t, listed(l), 0, 1, 2, 3)
	if _, err := Open("/dev/null", fourRegions); !errors.Is(err, ErrInvalid) {
		t.Errorf("/dev/null: got %v, want ErrInvalid", err)
	}
	if _, err := Open(filepath.Join(path, "mirror"), fourRegions); err == nil {
		t.Error("below a file: no error")
	}
}

// The regions of huge disks are larger, so that a change stays small.
func TestRegionSizes(t *testing.T) {
	for _, tc := range []struct {
		size, region int64
		regions      int
	}{
		{0, minRegion, 0},
		{1, minRegion, 1},
		{minRegion, minRegion, 1},
		{minRegion + 1, minRegion, 2},
		{16 << 40, minRegion, maxRegions},
		{16<<40 + 1, 2 * minRegion, maxRegions/2 + 1},
		{1<<63 - 1, 1 << 43, maxRegions},
	} {
		d := describe(Mirror{Size: tc.size})
		if d.Region != tc.region || d.regions() != tc.regions {
			t.Errorf("%d bytes: %d regions of %d, want %d of %d", tc.size, d.regions(), d.Region, tc.regions, tc.region)
		}
	}
	huge := Mirror{Size: 1<<63 - 1, Primary: "a", Secondary: "b"}
	files := newFiles()
	l := mustOpen(t, files, huge)
	if err := l.Clear(t.Context(), time.Now(), always); err != nil {
		t.Fatal(err)
	}
	if err := l.Mark(t.Context(), huge.Size-1, 1); err != nil {
		t.Fatal(err)
	}
	l.Close()
	for off, n := range mustOpen(t, files, huge).Dirty() {
		if off != 1<<63-1<<43 || n != 1<<43-1 {
			t.Errorf("the last region: %d bytes at %d", n, off)
		}
	}
}

// Names that do not fit are refused before anything is written.
func TestLongNames(t *testing.T) {
	files := newFiles()
	long := Mirror{Size: 1, Primary: strings.Repeat("x", 2000), Secondary: strings.Repeat("y", 1800)}
	mustOpen(t, files, long).Close()
	next := newFiles()
	long.Secondary += strings.Repeat("y", 200)
	if _, err := open(next, statePath, long); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v, want an error about the length", err)
	}
	if text, _ := next.Content(statePath); text != "" {
		t.Errorf("%d bytes were written", len(text))
	}
}
