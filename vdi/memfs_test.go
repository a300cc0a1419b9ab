package vdi

import (
	"path/filepath"
	"slices"
	"strings"

	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/xapi"
)

// MemFS is a file system in memory with the state folder of one process.
type MemFS struct{ *memfs.FS }

// NewMemFS returns an empty file system.
func NewMemFS() *MemFS { return &MemFS{memfs.New()} }

// AfterPowerCut returns the file system that the next boot finds.
func (m *MemFS) AfterPowerCut(s memfs.Survival) *MemFS { return &MemFS{m.FS.AfterPowerCut(s)} }

// AfterKill returns the file system of the next process if this one was killed.
func (m *MemFS) AfterKill() *MemFS { return &MemFS{m.FS.AfterKill()} }

// Journal returns the uuids in the current journal of a state folder.
func (m *MemFS) Journal(dir string) []string {
	text, _ := m.Content(filepath.Join(dir, journalName))
	return slices.DeleteFunc(strings.Fields(text), func(s string) bool { return !xapi.IsUUID(s) })
}

// DurableJournal returns the uuids that are in the journal after every kind of power cut.
func (m *MemFS) DurableJournal(dir string) []string {
	return m.inAll(m.Journal(dir), func(left *MemFS) []string { return left.Journal(dir) })
}

// Creates returns the nonces of the pending calls of VBD.create, durable or not.
func (m *MemFS) Creates(dir string) (nonces []string) {
	text, _ := m.Content(filepath.Join(dir, createsName))
	for line := range strings.Lines(text) {
		nonce, _, _ := strings.Cut(line, " ")
		nonces = append(nonces, nonce)
	}
	return nonces
}

// DurableCreates returns those of Creates that survive every power cut.
func (m *MemFS) DurableCreates(dir string) []string {
	return m.inAll(m.Creates(dir), func(left *MemFS) []string { return left.Creates(dir) })
}

// inAll returns those of current that list returns after every kind of power cut.
func (m *MemFS) inAll(current []string, list func(left *MemFS) []string) []string {
	for _, s := range memfs.Survivals {
		left := list(m.AfterPowerCut(s))
		current = slices.DeleteFunc(current, func(name string) bool { return !slices.Contains(left, name) })
	}
	return current
}

// AgeCreates makes the pending calls of VBD.create so old that they are not
// expected to be executed any more.
func (m *MemFS) AgeCreates(dir string) {
	path := filepath.Join(dir, createsName)
	text, ok := m.Content(path)
	if !ok {
		return
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) == 3 {
			b.WriteString(fields[0] + " 0 " + fields[2] + "\n")
		}
	}
	m.WriteDurably(path, b.String())
}
