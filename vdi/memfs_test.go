package vdi

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"xapi-nbd/xapi"
)

// MemFS is a file system in memory that behaves as a disk with a volatile cache:
// the data of a file is durable after Sync of that file, a name after syncDir of
// the folder that holds it. A MemFS serves one process: Cut ends that process, and
// AfterPowerCut returns the file system of the next one. The methods may be called
// concurrently.
type MemFS struct {
	mu     sync.Mutex
	root   *memDir
	ops    int
	onOp   func(FileOp) error
	cut    bool
	locked map[*memFile]bool
}

// FileOp is the beginning or the end of one file operation.
type FileOp struct {
	N     int    // of the operation, from 1
	Name  string // "rename VBDs_to_clean_up"
	After bool   // the operation was executed, but has not returned yet
}

// memDir and memFile have the current and the durable content.
type memDir struct{ entries, durable map[string]memNode }

type memFile struct{ data, durable []byte }

type memNode interface{ copy(c copying) memNode }

// ErrPowerCut is the error of every operation after the power was cut.
var ErrPowerCut = errors.New("the power was cut")

// NewMemFS returns an empty file system.
func NewMemFS() *MemFS { return newMemFS(newMemDir()) }

func newMemFS(root *memDir) *MemFS {
	return &MemFS{root: root, locked: make(map[*memFile]bool)}
}

func newMemDir() *memDir {
	return &memDir{entries: make(map[string]memNode), durable: make(map[string]memNode)}
}

// Survival is the part of the unsynced changes that survives a power cut. A disk may write
// its cache at any time and in any order, so the service must recover from each of them.
type Survival int

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
func (m *MemFS) AfterPowerCut(s Survival) *MemFS {
	return m.next(copying{
		names: s == OnlyNamesSurvive || s == EverythingSurvives,
		data:  s == OnlyDataSurvives || s == EverythingSurvives,
	})
}

// AfterKill returns the file system of the next process if this one was killed: the unsynced
// changes are there, and still not durable.
func (m *MemFS) AfterKill() *MemFS { return m.next(copying{cache: make(map[memNode]memNode)}) }

func (m *MemFS) next(c copying) *MemFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	return newMemFS(m.root.copy(c).(*memDir))
}

// copying selects the content of a copy: the durable or the current names and data, or both
// with cache, where one file may have two names.
type copying struct {
	names, data bool
	cache       map[memNode]memNode // from the original to its copy
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

func (f *memFile) copy(c copying) memNode {
	if done, ok := c.cache[f]; ok {
		return done
	}
	n := &memFile{data: bytes.Clone(f.data), durable: bytes.Clone(f.durable)}
	switch {
	case c.cache != nil:
		c.cache[f] = n
	case c.data:
		n.durable = n.data
	default:
		n.data = n.durable
	}
	return n
}

// OnOp makes the file system call f before and after each later operation, without a lock. If
// f returns an error the operation fails with it; before the operation, it is not executed.
// Operations are counted from 1 again.
func (m *MemFS) OnOp(f func(FileOp) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops, m.onOp = 0, f
}

// Cut cuts the power: no operation is executed any more.
func (m *MemFS) Cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut = true
}

// WriteDurably writes a file and syncs it with its name and folders.
func (m *MemFS) WriteDurably(path, text string) {
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
	f := &memFile{data: []byte(text), durable: []byte(text)}
	d.entries[names[len(names)-1]], d.durable[names[len(names)-1]] = f, f
}

// Journal returns the uuids in the current journal of a state folder.
func (m *MemFS) Journal(dir string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, _ := m.find(filepath.Join(dir, journalName))
	f, ok := n.(*memFile)
	if !ok {
		return nil
	}
	return slices.DeleteFunc(strings.Fields(string(f.data)), func(s string) bool { return !xapi.IsUUID(s) })
}

// DurableJournal returns the uuids that are in the journal after every kind of power cut.
func (m *MemFS) DurableJournal(dir string) []string {
	durable := m.Journal(dir)
	for _, s := range Survivals {
		left := m.AfterPowerCut(s).Journal(dir)
		durable = slices.DeleteFunc(durable, func(uuid string) bool { return !slices.Contains(left, uuid) })
	}
	return durable
}

// String lists folders and files with their data, so that two of the same
// content are equal.
func (m *MemFS) String() string {
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
