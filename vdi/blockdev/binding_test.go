package blockdev

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
)

// node is a device nbd3 with the files that describe its binding.
type node struct {
	t         *testing.T
	path      string
	roots     Roots
	pid, json string
}

func newNode(t *testing.T, pid, json bool) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{
		t: t, path: filepath.Join(dir, "nbd3"), roots: Roots{Sys: dir, NBD: dir},
		pid: filepath.Join(dir, "block", "nbd3", "pid"), json: filepath.Join(dir, "3"),
	}
	n.write(n.path, string(make([]byte, 4096)))
	if pid {
		n.write(n.pid, "4711\n")
	}
	if json {
		n.write(n.json, `{"path": "/a", "exportname": "a"}`)
	}
	return n
}

func (n *node) write(path, text string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// replace puts another file in the place of one.
func (n *node) replace(path, text string) {
	n.t.Helper()
	n.write(path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) remove(path string) {
	n.t.Helper()
	if err := os.Remove(path); err != nil {
		n.t.Fatal(err)
	}
}

func TestBinding(t *testing.T) {
	tests := []struct {
		name      string
		pid, json bool
		change    func(*node)
		binding   bool // noticed after every read already
	}{
		{"another pid", true, true, func(n *node) { n.write(n.pid, "4712\n") }, true},
		{"another pid, no record", true, false, func(n *node) { n.write(n.pid, "4712\n") }, true},
		{"pid empty", true, false, func(n *node) { n.write(n.pid, "") }, true},
		{"record removed", true, true, func(n *node) { n.remove(n.json) }, true},
		{"record replaced by its like", false, true, func(n *node) { n.replace(n.json, `{"path": "/a", "exportname": "a"}`) }, true},
		{"record rewritten in place", false, true, func(n *node) { n.write(n.json, `{"path": "/b", "exportname": "longer"}`) }, true},
		{"node removed", true, true, func(n *node) { n.remove(n.path) }, false},
		{"node replaced", true, true, func(n *node) { n.replace(n.path, string(make([]byte, 4096))) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, tt.pid, tt.json)
			d, err := Open(t.Context(), n.path, Options{Roots: n.roots})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if err := errors.Join(d.CheckBinding(), d.Check()); err != nil {
				t.Fatalf("nothing has changed yet: %v", err)
			}
			tt.change(n)
			if err := d.CheckBinding(); errors.Is(err, ErrReplaced) != tt.binding {
				t.Errorf("CheckBinding: got %v, want it to notice: %t", err, tt.binding)
			}
			if err := d.Check(); !errors.Is(err, ErrReplaced) {
				t.Errorf("Check: got %v, want ErrReplaced", err)
			}
		})
	}
}

// A VDI that is resized is the same VDI.
func TestResizedDeviceIsTheSame(t *testing.T) {
	n := newNode(t, true, true)
	d, err := Open(t.Context(), n.path, Options{Roots: n.roots})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	n.write(n.path, string(make([]byte, 8192)))
	if err := d.Check(); err != nil {
		t.Error(err)
	}
	if size, err := d.CurrentSize(); size != 8192 || err != nil || d.Size() != 4096 {
		t.Errorf("size: got %d now (%v) and %d at first, want 8192 and 4096", size, err, d.Size())
	}
}

// A node without a file that describes its binding is refused.
func TestNodeWithoutMarks(t *testing.T) {
	n := newNode(t, false, false)
	link := filepath.Join(t.TempDir(), "sm-name")
	if err := os.Symlink(n.path, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{n.path, link} {
		synctest.Test(t, func(t *testing.T) { // it may get its marks a little later
			if _, err := Open(t.Context(), path, Options{Roots: n.roots}); !errors.Is(err, errUnbound) {
				t.Errorf("%s: got %v, want errUnbound", path, err)
			}
		})
	}
}

func BenchmarkCheckBinding(b *testing.B) {
	dir := b.TempDir()
	for path, text := range map[string]string{"nbd3": "x", "block/nbd3/pid": "1\n", "3": "{}"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o700); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	d, err := Open(b.Context(), filepath.Join(dir, "nbd3"), Options{Roots: Roots{Sys: dir, NBD: dir}})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	for b.Loop() {
		if err := d.CheckBinding(); err != nil {
			b.Fatal(err)
		}
	}
}
