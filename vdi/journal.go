package vdi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

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
	dir  string
	lock *os.File

	mu sync.Mutex // one rewrite at a time; guards what is in the file
}

// openJournal locks the state folder, which it makes if necessary.
func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
		}
		return nil, fmt.Errorf("state folder: %w", os.NewSyscallError("flock", err))
	}
	j := &journal{dir: dir, lock: lock}
	if _, err := j.list(); err != nil {
		lock.Close()
		return nil, err
	}
	return j, nil
}

// close gives the folder to the next instance.
func (j *journal) close() error { return j.lock.Close() }

func (j *journal) path() string { return filepath.Join(j.dir, journalName) }

// list returns the uuids, newest first. Blank and malformed lines, which a
// crash of the original can leave, and repeated ones are passed over.
func (j *journal) list() ([]string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.read()
}

func (j *journal) read() ([]string, error) {
	data, err := os.ReadFile(j.path())
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

// forget drops a VBD that is certainly gone.
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
	if err := writeSynced(tmp, b.String()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := os.Rename(tmp, j.path()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	// The rename is durable only when the folder is.
	if err := syncDir(j.dir); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

func writeSynced(path, text string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
