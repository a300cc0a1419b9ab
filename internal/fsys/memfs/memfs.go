// Package memfs is a file system in memory for tests of what is left after a power cut. It
// behaves as a disk with a volatile cache: the data of a file is durable after Sync of that
// file, a name after SyncDir of the folder that holds it.
package memfs

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// FS is a file system of one process: Cut ends that process, and AfterPowerCut or AfterKill
// returns the file system of the next one. It implements fsys.FS. Its methods may be called
// concurrently.
type FS struct {
	mu     sync.Mutex
	root   *memDir
	ops    int
	onOp   func(Op) error
	cut    bool
	locked map[*memFile]bool
}

// Op is the beginning or the end of one file operation.
type Op struct {
	N     int    // of the operation, from 1
	Name  string // "rename VBDs_to_clean_up"
	After bool   // the operation was executed, but has not returned yet
}

// memDir has the current and the durable entries of a folder.
type memDir struct{ entries, durable map[string]memNode }

type memNode interface{ copy(c copying) memNode }

// ErrPowerCut is the error of every operation after the power was cut.
var ErrPowerCut = errors.New("the power was cut")

// New returns an empty file system.
func New() *FS { return newFS(newMemDir()) }

func newFS(root *memDir) *FS {
	return &FS{root: root, locked: make(map[*memFile]bool)}
}

func newMemDir() *memDir {
	return &memDir{entries: make(map[string]memNode), durable: make(map[string]memNode)}
}

// Survival is the part of the unsynced changes that survives a power cut. A disk may write
// its cache at any time and in any order, so a program must recover from each of them.
type Survival int

// The parts that survive.
const (
	NothingSurvives    Survival = iota // only synced data
	OnlyNamesSurvive                   // a renamed file exists, but is empty
	OnlyDataSurvives                   // files are complete, under their old names
	EverythingSurvives                 // as if the cache had just been written
)

// Survivals are all of them.
var Survivals = []Survival{NothingSurvives, OnlyNamesSurvive, OnlyDataSurvives, EverythingSurvives}

func (s Survival) String() string {
	return [...]string{"nothing survives", "only names survive", "only data survives", "everything survives"}[s]
}

// AfterPowerCut returns the file system that the next boot finds.
func (m *FS) AfterPowerCut(s Survival) *FS {
	all := func(int) bool { return s == OnlyDataSurvives || s == EverythingSurvives }
	return m.next(copying{names: s == OnlyNamesSurvive || s == EverythingSurvives, survives: all})
}

// AfterTornWrites returns the file system that the next boot finds if all names survive, and
// of the unsynced data the bytes at those offsets of a file for which survives returns true.
func (m *FS) AfterTornWrites(survives func(off int) bool) *FS {
	return m.next(copying{names: true, survives: survives})
}

// AfterKill returns the file system of the next process if this one was killed: the unsynced
// changes are there, and still not durable.
func (m *FS) AfterKill() *FS { return m.next(copying{cache: make(map[memNode]memNode)}) }

func (m *FS) next(c copying) *FS {
	m.mu.Lock()
	defer m.mu.Unlock()
	return newFS(m.root.copy(c).(*memDir))
}

// copying selects the content of a copy: the durable or the current names and data, or both
// with cache, where one file may have two names.
type copying struct {
	names    bool
	survives func(off int) bool
	cache    map[memNode]memNode // from the original to its copy
}

func (d *memDir) copy(c copying) memNode {
	if done, ok := c.cache[d]; ok {
		return done
	}
	n := newMemDir()
	if c.cache != nil {
		c.cache[d] = n
		for name, e := range d.durable {
			n.durable[name] = e.copy(c)
		}
		for name, e := range d.entries {
			n.entries[name] = e.copy(c)
		}
		return n
	}
	from := d.durable
	if c.names {
		from = d.entries
	}
	for name, e := range from {
		n.durable[name] = e.copy(c)
	}
	n.entries = maps.Clone(n.durable)
	return n
}

// memFile has the current and the durable content of a file.
type memFile struct {
	data, durable []byte
	dirty         []bool // of each byte of data: the next sync makes it durable
}

func (f *memFile) copy(c copying) memNode {
	if done, ok := c.cache[f]; ok {
		return done
	}
	if c.cache != nil {
		n := &memFile{data: bytes.Clone(f.data), durable: bytes.Clone(f.durable), dirty: slices.Clone(f.dirty)}
		c.cache[f] = n
		return n
	}
	n := &memFile{data: bytes.Clone(f.durable)}
	if c.survives(len(f.data)) { // as if this were the offset of the length
		n.resize(len(f.data))
	}
	for i := 0; i < len(f.data); i++ {
		if i%block == 0 && bytes.Equal(part(f.data, i), part(f.durable, i)) {
			i += block - 1 // most of a large file
			continue
		}
		if (i >= len(f.durable) || f.data[i] != f.durable[i]) && c.survives(i) {
			n.resize(max(len(n.data), i+1))
			n.data[i] = f.data[i]
		}
	}
	n.durable, n.dirty = bytes.Clone(n.data), nil
	return n
}

// block is the length of a part of a file.
const block = 4096

// part returns the part of p that begins at off, which is shorter at the end.
func part(p []byte, off int) []byte {
	off = min(off, len(p))
	return p[off:min(off+block, len(p))]
}

// resize changes the length of the current content.
func (f *memFile) resize(n int) {
	f.data = append(f.data, make([]byte, max(n-len(f.data), 0))...)[:n]
	f.dirty = append(f.dirty, make([]bool, max(n-len(f.dirty), 0))...)[:n]
}

func (f *memFile) writeAt(p []byte, off int) {
	f.resize(max(len(f.data), off+len(p)))
	copy(f.data[off:], p)
	for i := range p {
		f.dirty[off+i] = true
	}
}

func (f *memFile) sync() {
	f.durable = append(f.durable, make([]byte, max(len(f.data)-len(f.durable), 0))...)[:len(f.data)]
	for i, dirty := range f.dirty {
		if dirty {
			f.durable[i] = f.data[i]
		}
	}
	clear(f.dirty)
}

// OnOp makes the file system call f before and after each later operation, without a lock. If
// f returns an error the operation fails with it; before the operation, it is not executed.
// Operations are counted from 1 again.
func (m *FS) OnOp(f func(Op) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops, m.onOp = 0, f
}

// Cut cuts the power: no operation is executed any more.
func (m *FS) Cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut = true
}

// WriteDurably writes a file and syncs it with its name and folders. It is no operation.
func (m *FS) WriteDurably(path, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.root
	names := split(path)
	for _, name := range names[:len(names)-1] {
		next, ok := d.entries[name].(*memDir)
		if !ok {
			next = newMemDir()
			d.entries[name], d.durable[name] = next, next
		}
		d = next
	}
	f := &memFile{}
	f.writeAt([]byte(text), 0)
	f.sync()
	d.entries[names[len(names)-1]], d.durable[names[len(names)-1]] = f, f
}

// Content returns the current content of a file, and whether it exists. It is no operation.
func (m *FS) Content(path string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, _ := m.find(path)
	f, ok := n.(*memFile)
	if !ok {
		return "", false
	}
	return string(f.data), true
}

// String lists folders and files with their data, so that two of the same
// content are equal.
func (m *FS) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	m.root.list(&b, "/")
	return b.String()
}

func (d *memDir) list(b *strings.Builder, path string) {
	for _, name := range slices.Sorted(maps.Keys(d.entries)) {
		switch n := d.entries[name].(type) {
		case *memDir:
			fmt.Fprintf(b, "%s%s/\n", path, name)
			n.list(b, path+name+"/")
		case *memFile:
			fmt.Fprintf(b, "%s%s: %q\n", path, name, n.data)
		}
	}
}
