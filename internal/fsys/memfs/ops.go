package memfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"xapi-nbd/internal/fsys"
)

// do executes op with m.mu held, unless the power is cut or the function of OnOp returns an
// error.
func (m *FS) do(name string, op func() error) error {
	at, ask := m.begin(name)
	if err := ask(at); err != nil {
		return err
	}
	err := m.execute(op)
	at.After = true
	if objection := ask(at); objection != nil {
		return objection
	}
	return err
}

// begin counts an operation, and returns a function that calls the function of OnOp.
func (m *FS) begin(name string) (Op, func(Op) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops++
	onOp := m.onOp
	return Op{N: m.ops, Name: name}, func(at Op) error {
		if onOp != nil && !m.isCut() {
			if err := onOp(at); err != nil {
				return err
			}
		}
		if m.isCut() { // f may have cut the power
			return ErrPowerCut
		}
		return nil
	}
}

func (m *FS) isCut() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cut
}

func (m *FS) execute(op func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cut {
		return ErrPowerCut
	}
	return op()
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// find returns the file or folder at path, or nil. It returns an error if the parent folder
// is missing. m.mu is held.
func (m *FS) find(path string) (memNode, error) {
	d, name, err := m.folderOf(path)
	if err != nil {
		return nil, err
	}
	if name == "" {
		return d, nil
	}
	return d.entries[name], nil
}

// folderOf returns the folder that holds path, and its name there. m.mu is held.
func (m *FS) folderOf(path string) (*memDir, string, error) {
	names := split(path)
	if len(names) == 0 {
		return m.root, "", nil
	}
	d := m.root
	for _, name := range names[:len(names)-1] {
		next, ok := d.entries[name].(*memDir)
		if !ok {
			return nil, "", &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		d = next
	}
	return d, names[len(names)-1], nil
}

// Mkdir implements fsys.FS.
func (m *FS) Mkdir(path string) error {
	return m.do("mkdir "+filepath.Base(path), func() error {
		d, name, err := m.folderOf(path)
		if err != nil {
			return err
		}
		if name == "" || d.entries[name] != nil {
			return &fs.PathError{Op: "mkdir", Path: path, Err: fs.ErrExist}
		}
		d.entries[name] = newMemDir()
		return nil
	})
}

// openFile returns the file at path, which it makes if necessary. m.mu is held.
func (m *FS) openFile(path string) (*memFile, error) {
	d, name, err := m.folderOf(path)
	if err != nil {
		return nil, err
	}
	f, ok := d.entries[name].(*memFile)
	if !ok {
		f = &memFile{}
		d.entries[name] = f
	}
	return f, nil
}

// Lock implements fsys.FS.
func (m *FS) Lock(path string) (fsys.File, error) {
	var h *memHandle
	err := m.do("lock", func() error {
		f, err := m.openFile(path)
		if err != nil {
			return err
		}
		if m.locked[f] {
			return fsys.ErrLocked
		}
		m.locked[f] = true
		h = &memHandle{m: m, f: f, name: filepath.Base(path), locked: true}
		return nil
	})
	if err != nil {
		if h != nil { // refused after it was taken
			h.Close()
		}
		return nil, err
	}
	return h, nil
}

// IsLocked implements fsys.FS.
func (m *FS) IsLocked(path string) (locked bool, err error) {
	err = m.do("look at lock", func() error {
		n, err := m.find(path)
		f, ok := n.(*memFile)
		locked = ok && m.locked[f]
		return err
	})
	return locked, err
}

// Names implements fsys.FS.
func (m *FS) Names(path string) (names []string, err error) {
	err = m.do("list "+filepath.Base(path), func() error {
		n, err := m.find(path)
		if err != nil {
			return err
		}
		d, ok := n.(*memDir)
		if !ok {
			return &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		names = slices.Sorted(maps.Keys(d.entries))
		return nil
	})
	return names, err
}

// Remove implements fsys.FS.
func (m *FS) Remove(path string) error {
	// Without the name, which may have a random part: the nth operation of a run has to have
	// the same name each time.
	return m.do("remove", func() error {
		d, name, err := m.folderOf(path)
		if err != nil {
			return err
		}
		if d.entries[name] == nil {
			return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrNotExist}
		}
		delete(d.entries, name)
		return nil
	})
}

// ReadFile implements fsys.FS.
func (m *FS) ReadFile(path string) (data []byte, err error) {
	err = m.do("read "+filepath.Base(path), func() error {
		n, err := m.find(path)
		if err != nil {
			return err
		}
		f, ok := n.(*memFile)
		if !ok {
			return &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		data = bytes.Clone(f.data)
		return nil
	})
	return data, err
}

// Create implements fsys.FS.
func (m *FS) Create(path string) (fsys.File, error) {
	var h *memHandle
	err := m.do("create "+filepath.Base(path), func() error {
		f, err := m.openFile(path)
		if err != nil {
			return err
		}
		f.resize(0)
		h = &memHandle{m: m, f: f, name: filepath.Base(path)}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// Rename implements fsys.FS.
func (m *FS) Rename(from, to string) error {
	return m.do("rename "+filepath.Base(from), func() error {
		d, name, err := m.folderOf(from)
		if err != nil {
			return err
		}
		target, newName, err := m.folderOf(to)
		if err != nil {
			return err
		}
		if d.entries[name] == nil {
			return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
		}
		target.entries[newName] = d.entries[name]
		delete(d.entries, name)
		return nil
	})
}

// SyncDir implements fsys.FS.
func (m *FS) SyncDir(path string) error {
	return m.do("syncDir "+filepath.Base(path), func() error {
		n, err := m.find(path)
		if err != nil {
			return err
		}
		d, ok := n.(*memDir)
		if !ok {
			return &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		d.durable = maps.Clone(d.entries)
		return nil
	})
}

// memHandle is an open file.
type memHandle struct {
	m      *FS
	f      *memFile
	name   string
	locked bool
	off    int // of the next Write
}

func (h *memHandle) Write(p []byte) (n int, err error) {
	n, err = h.WriteAt(p, int64(h.off))
	h.off += n
	return n, err
}

func (h *memHandle) WriteAt(p []byte, off int64) (n int, err error) {
	err = h.m.do("write "+h.name, func() error {
		h.f.writeAt(p, int(off))
		n = len(p)
		return nil
	})
	return n, err
}

func (h *memHandle) ReadAt(p []byte, off int64) (n int, err error) {
	err = h.m.do("read "+h.name, func() error {
		n = copy(p, h.f.data[min(int(off), len(h.f.data)):])
		if n < len(p) {
			return io.EOF
		}
		return nil
	})
	return n, err
}

// Sync makes the data durable. As on Linux, the next Sync does not write again the data of
// one that has failed.
func (h *memHandle) Sync() error {
	err := h.m.do("sync "+h.name, func() error {
		h.f.sync()
		return nil
	})
	if err != nil && !errors.Is(err, ErrPowerCut) {
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		clear(h.f.dirty)
	}
	return err
}

// Close unlocks a locked file. That is no operation, as it changes nothing on the disk.
func (h *memHandle) Close() error {
	if !h.locked {
		return h.m.do("close "+h.name, func() error { return nil })
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	delete(h.m.locked, h.f)
	return nil
}
