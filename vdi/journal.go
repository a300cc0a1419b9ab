package vdi

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"xapi-nbd/xapi"
)

// The files of the state folder.
const (
	journalName = "VBDs_to_clean_up" // the original's name and format
	lockName    = "lock"
)

// journal is the durable list of VBDs that must be gone some day: one uuid per
// line, newest first, as the original service wrote it, so that an upgrade and
// a downgrade clean up after each other.
//
// It is short (as long as max_vbds), so it is rewritten whole: temporary file,
// fsync, rename, fsync of the folder. At any moment a crash leaves the old or
// the new list, never half of one. Its methods may be called concurrently.
type journal struct {
	fs  fsys
	dir string

	mu     sync.Mutex // one rewrite at a time; guards the file and the rest
	lock   io.Closer  // nil until open succeeds
	closed bool       // somebody else may have the folder now
}

// open makes the state folder if it is missing, locks it and reads the journal
// once. After an error it may be called again.
func (j *journal) open() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := makeDir(j.fs, filepath.Clean(j.dir)); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	lock, err := j.fs.lock(filepath.Join(j.dir, lockName))
	if errors.Is(err, ErrLocked) {
		return fmt.Errorf("%w: %s", ErrLocked, j.dir)
	}
	if err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	j.lock = lock
	if _, err := j.read(); err != nil {
		j.lock = nil
		return errors.Join(err, lock.Close())
	}
	return nil
}

// makeDir makes a folder and those above it that are missing. A folder is
// durable when the one above it has been synced: without that a power cut would
// take a new journal away together with its folder. Whether an earlier process
// made it and failed to sync cannot be seen, so it is done at every start.
func makeDir(files fsys, dir string) error {
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil // the root
	}
	if err := makeDir(files, parent); err != nil {
		return err
	}
	if err := files.mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	err := files.syncDir(parent)
	if errors.Is(err, fs.ErrPermission) {
		return nil // nothing of ours can be in it
	}
	return err
}

// close gives the folder to the next instance; nothing is written after it.
func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed || j.lock == nil {
		return nil
	}
	j.closed = true
	return j.lock.Close()
}

func (j *journal) path() string { return filepath.Join(j.dir, journalName) }

// list returns the uuids, newest first. Blank and malformed lines, which a
// crash of the original can leave, and repeated ones are passed over.
func (j *journal) list() ([]string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.read()
}

func (j *journal) read() ([]string, error) {
	switch {
	case j.closed:
		return nil, ErrClosed
	case j.lock == nil:
		return nil, ErrNotLocked
	}
	data, err := j.fs.readFile(j.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var uuids []string
	for line := range strings.Lines(string(data)) {
		uuid := strings.TrimSpace(line)
		if xapi.IsUUID(uuid) && !slices.Contains(uuids, uuid) {
			uuids = append(uuids, uuid)
		}
	}
	return uuids, nil
}

// add records a VBD. When it returns nil the entry survives a power cut.
func (j *journal) add(uuid string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	uuids, err := j.read()
	if err != nil {
		return err
	}
	return j.write(slices.Insert(uuids, 0, uuid))
}

// forget drops a VBD that is certainly gone; one that is not listed is fine.
func (j *journal) forget(uuid string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	uuids, err := j.read()
	if err != nil {
		return err
	}
	if !slices.Contains(uuids, uuid) {
		return nil
	}
	return j.write(slices.DeleteFunc(uuids, func(u string) bool { return u == uuid }))
}

func (j *journal) write(uuids []string) error {
	var b strings.Builder
	for _, uuid := range uuids {
		b.WriteString(uuid + "\n")
	}
	tmp := j.path() + ".new"
	if err := j.writeSynced(tmp, b.String()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := j.fs.rename(tmp, j.path()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	// The rename is durable only when the folder is.
	if err := j.fs.syncDir(j.dir); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

func (j *journal) writeSynced(path, text string) error {
	f, err := j.fs.create(path)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Sync(), f.Close())
}
