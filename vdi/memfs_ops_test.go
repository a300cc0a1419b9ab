package vdi

import (
	"bytes"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// do executes op with m.mu held, unless the power is cut or the function of OnOp returns an
// error.
func (m *MemFS) do(name string, op func() error) error {
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
func (m *MemFS) begin(name string) (FileOp, func(FileOp) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops++
	onOp := m.onOp
	return FileOp{N: m.ops, Name: name}, func(at FileOp) error {
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

func (m *MemFS) isCut() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cut
}

func (m *MemFS) execute(op func() error) error {
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
func (m *MemFS) find(path string) (memNode, error) {
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
func (m *MemFS) folderOf(path string) (*memDir, string, error) {
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

func (m *MemFS) mkdir(path string) error {
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
func (m *MemFS) openFile(path string) (*memFile, error) {
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

func (m *MemFS) lock(path string) (io.Closer, error) {
	var l *memLock
	err := m.do("lock", func() error {
		f, err := m.openFile(path)
		if err != nil {
			return err
		}
		if m.locked[f] {
			return ErrLocked
		}
		m.locked[f] = true
		l = &memLock{m, f}
		return nil
	})
	if err != nil {
		if l != nil { // refused after it was taken
			l.Close()
		}
		return nil, err
	}
	return l, nil
}

// lockWait is lock: there is one process, whose calls do not overlap.
func (m *MemFS) lockWait(path string) (io.Closer, error) { return m.lock(path) }

func (m *MemFS) isLocked(path string) (locked bool, err error) {
	err = m.do("look at lock", func() error {
		n, err := m.find(path)
		f, ok := n.(*memFile)
		locked = ok && m.locked[f]
		return err
	})
	return locked, err
}

func (m *MemFS) names(path string) (names []string, err error) {
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

func (m *MemFS) remove(path string) error {
	// Only files of generations are removed, and their names have a random part.
	return m.do("remove a generation", func() error {
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

type memLock struct {
	m *MemFS
	f *memFile
}

// Close is not counted: it changes nothing on the disk.
func (l *memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	delete(l.m.locked, l.f)
	return nil
}

func (m *MemFS) readFile(path string) (data []byte, err error) {
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

func (m *MemFS) create(path string) (syncedFile, error) {
	var h *memHandle
	err := m.do("create "+filepath.Base(path), func() error {
		f, err := m.openFile(path)
		if err != nil {
			return err
		}
		f.data = nil
		h = &memHandle{m, f, filepath.Base(path)}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

func (m *MemFS) rename(from, to string) error {
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

func (m *MemFS) syncDir(path string) error {
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

// memHandle is a file that is open for writing.
type memHandle struct {
	m    *MemFS
	f    *memFile
	name string
}

func (h *memHandle) Write(p []byte) (n int, err error) {
	err = h.m.do("write "+h.name, func() error {
		h.f.data = append(h.f.data, p...)
		n = len(p)
		return nil
	})
	return n, err
}

func (h *memHandle) Sync() error {
	return h.m.do("sync "+h.name, func() error {
		h.f.durable = bytes.Clone(h.f.data)
		return nil
	})
}

func (h *memHandle) Close() error {
	return h.m.do("close "+h.name, func() error { return nil })
}
