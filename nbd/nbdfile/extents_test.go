package nbdfile

import (
	"os"
	"testing"

	"xapi-nbd/nbd"
)

// TestExtents uses pieces of 64 KiB: no file system has larger blocks.
func TestExtents(t *testing.T) {
	const k, size = 64 << 10, 1 << 20
	tests := []struct {
		name   string
		data   [][2]int64
		off, n int64
		want   string
	}{
		{"all holes", nil, 0, size, "H1048576"},
		{"all data", [][2]int64{{0, size}}, 0, size, "D1048576"},
		{"data first", [][2]int64{{0, k}}, 0, size, "D65536 H983040"},
		{"data last", [][2]int64{{size - k, size}}, 0, size, "H983040 D65536"},
		{"in turns", [][2]int64{{k, 2 * k}, {3 * k, 4 * k}}, 0, size, "H65536 D65536 H65536 D65536 H786432"},
		{"from inside data", [][2]int64{{0, k}}, 100, k, "D65436 H983040"},
		{"from inside a hole", [][2]int64{{k, size}}, 100, k, "H65436 D983040"},
		{"no further than the range", [][2]int64{{k, 2 * k}}, 0, k, "H65536"},
		{"one byte", [][2]int64{{k, 2 * k}}, k + 1, 1, "D65535"},
		{"nothing", nil, 0, 0, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := open(t, makeSparse(t, size, tt.data...), Options{ReadOnly: true})
			defer d.Close()
			got, err := d.(nbd.Extenter).Extents(tt.off, tt.n)
			if err != nil || names(got) != tt.want {
				t.Errorf("got %q and error %v, want %q", names(got), err, tt.want)
			}
		})
	}
}

// TestExtentsOfALongerFile checks that bytes added to the file later are not in the device.
func TestExtentsOfALongerFile(t *testing.T) {
	path := makeSparse(t, 1<<20)
	d := open(t, path, Options{ReadOnly: true})
	defer d.Close()
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if got, err := d.(nbd.Extenter).Extents(0, 1<<20); err != nil || names(got) != "H1048576" {
		t.Errorf("got %q and error %v, want one hole", names(got), err)
	}
}

// TestExtentsOfAShorterFile checks that the truncated part, which cannot be read, is not
// reported as zeroes.
func TestExtentsOfAShorterFile(t *testing.T) {
	for name, data := range map[string][][2]int64{"data": {{0, 1 << 20}}, "holes": nil} {
		path := makeSparse(t, 1<<20, data...)
		d := open(t, path, Options{ReadOnly: true})
		defer d.Close()
		if err := os.Truncate(path, 1<<19); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"data": "D1048576", "holes": "H524288 D524288"}[name]
		if got, err := d.(nbd.Extenter).Extents(0, 1<<20); err != nil || names(got) != want {
			t.Errorf("%s: got %q and error %v, want %q", name, names(got), err, want)
		}
	}
}

// TestExtentsBounded: a file in many pieces is described bit by bit.
func TestExtentsBounded(t *testing.T) {
	const pieces = maxExtents + 100
	var data [][2]int64
	for i := range int64(pieces) {
		data = append(data, [2]int64{i << 17, i<<17 + 1})
	}
	d := open(t, makeSparse(t, pieces<<17, data...), Options{ReadOnly: true})
	defer d.Close()
	got, err := d.(nbd.Extenter).Extents(0, d.Size())
	if err != nil || len(got) != maxExtents {
		t.Errorf("got %d extents and error %v, want %d", len(got), err, maxExtents)
	}
}
