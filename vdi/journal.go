package vdi

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"xapi-nbd/internal/fsys"
	"xapi-nbd/xapi"
)

// The files of the state folder.
const (
	journalName = "VBDs_to_clean_up"    // name and format of the original xapi-nbd
	createsName = "VBD_creates_pending" // only this service has it
	lockName    = "lock"
	// journalLockName is locked by a process while it rewrites one of the lists.
	journalLockName = "journal.lock"
)

// journal keeps two lists in the state folder for the next process: the VBDs that have to
// be removed, and the calls of VBD.create that xapi may still execute.
//
// The first has one uuid per line, newest first, as the original service wrote
// it, so that an upgrade and a downgrade clean up after each other. The second
// has one call per line: its nonce, its time in seconds since 1970, and the uuid
// of its VDI.
//
// Both have about max_vbds lines, so each change rewrites the whole file: temporary file,
// fsync, rename, fsync of the folder. A crash leaves the old or the new list, never a part
// of one. During an upgrade two processes change the lists: each change reads the list again
// under the lock of journalLockName. The methods may be called concurrently. Make one with
// newJournal.
type journal struct {
	fs  fsys.FS
	dir string
	log *slog.Logger

	// changing holds a token while this process changes a list, and guards the next two
	// fields. It is no mutex, so that tests in fake time can wait for it.
	changing chan struct{}
	unlocked time.Time // when this process has unlocked journalLockName; zero before
	warned   bool      // the log says that another process has locked it

	mu        sync.Mutex      // guards the following fields
	inherited io.Closer       // the lock that an earlier process has passed; nil: none
	lock      io.Closer       // nil until open succeeds
	closed    bool            // the lock was released: another process may use the folder
	added     map[string]bool // uuids and nonces of this process that are listed
}

func newJournal(files fsys.FS, dir string, log *slog.Logger) *journal {
	return &journal{fs: files, dir: dir, log: log, changing: make(chan struct{}, 1)}
}

// pendingCreate is a call of VBD.create that xapi may execute, now or later.
type pendingCreate struct {
	nonce string
	since time.Time
	vdi   string // uuid
}

// PendingCreate is a call of VBD.create to which no response has come and which xapi may
// still execute.
type PendingCreate struct {
	VDI   string    // uuid
	Since time.Time // when the call was made
}

// ReadPendingCreates reads the list of such calls from a state folder, newest first. It
// takes no lock. If the folder or the list does not exist it returns none.
func ReadPendingCreates(stateDir string) ([]PendingCreate, error) {
	data, err := os.ReadFile(filepath.Join(stateDir, createsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var all []PendingCreate
	for _, c := range parseCreates(lines(data)) {
		all = append(all, PendingCreate{VDI: c.vdi, Since: c.since})
	}
	return all, err
}

// JournalPath returns the path of the journal in a state folder.
func JournalPath(stateDir string) string { return filepath.Join(stateDir, journalName) }

// LockPath returns the path of the file in a state folder that the process which uses the
// folder has locked with flock(2).
func LockPath(stateDir string) string { return filepath.Join(stateDir, lockName) }

// ReadJournal returns the uuids that the journal of a state folder lists, newest first, and
// the number of malformed lines. It takes no lock; a folder or a journal that does not
// exist lists none.
func ReadJournal(stateDir string) (uuids []string, malformed int, err error) {
	data, err := os.ReadFile(JournalPath(stateDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	uuids, malformed = parseVBDs(lines(data))
	return uuids, malformed, err
}

// open makes the state folder if it is missing, locks it, unless the lock is inherited, and
// reads the lists once. After an error it may be called again.
func (j *journal) open() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := makeDir(j.fs, filepath.Clean(j.dir)); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	lock, err := j.inherited, error(nil)
	if j.inherited == nil {
		lock, err = j.fs.Lock(filepath.Join(j.dir, lockName))
	}
	j.inherited = nil
	if errors.Is(err, ErrLocked) {
		return &LockedError{StateDir: j.dir}
	}
	if err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	j.lock = lock
	_, err = j.readVBDs()
	if err == nil {
		_, err = j.readCreates()
	}
	if err != nil {
		j.lock = nil
		return errors.Join(err, lock.Close())
	}
	return nil
}

// release unlocks the folder after open; open may be called again.
func (j *journal) release() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	lock := j.lock
	j.lock = nil
	return lock.Close()
}

// makeDir makes a folder and its missing parents. A folder is durable only after its
// parent was synced: without that a power cut would remove the folder with the journal.
// An earlier process may have made the folder and failed to sync, so makeDir syncs the
// parents at every start.
func makeDir(files fsys.FS, dir string) error {
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil // the root
	}
	if err := makeDir(files, parent); err != nil {
		return err
	}
	if err := files.Mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	err := files.SyncDir(parent)
	if errors.Is(err, fs.ErrPermission) {
		return nil // without permission this service has made no folder in it
	}
	return err
}

// close unlocks the folder, after a change in progress. All methods fail with ErrClosed as soon
// as it is called.
func (j *journal) close() error {
	lock := j.setClosed()
	if lock == nil {
		return nil
	}
	j.changing <- struct{}{}
	defer func() { <-j.changing }()
	return lock.Close()
}

// setClosed makes all methods fail. It returns the lock of the folder, or nil if there is none
// or close was called before.
func (j *journal) setClosed() io.Closer {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed || j.lock == nil {
		return nil
	}
	j.closed = true
	return j.lock
}

// list returns the uuids of the listed VBDs, newest first. It skips repeated lines, and the
// blank and malformed ones that a crash of the original service can leave.
func (j *journal) list() ([]string, error) {
	if err := j.usable(); err != nil {
		return nil, err
	}
	return j.readVBDs()
}

// creates returns the listed calls of VBD.create, newest first.
func (j *journal) creates() ([]pendingCreate, error) {
	if err := j.usable(); err != nil {
		return nil, err
	}
	return j.readCreates()
}

func (j *journal) readVBDs() ([]string, error) {
	lines, err := j.read(journalName)
	uuids, _ := parseVBDs(lines)
	return uuids, err
}

// parseVBDs returns the uuids of a journal, each once, and the number of other lines that
// are not blank.
func parseVBDs(lines []string) (uuids []string, malformed int) {
	for _, line := range lines {
		switch {
		case !xapi.IsUUID(line):
			if line != "" {
				malformed++
			}
		case !slices.Contains(uuids, line):
			uuids = append(uuids, line)
		}
	}
	return uuids, malformed
}

func (j *journal) readCreates() ([]pendingCreate, error) {
	lines, err := j.read(createsName)
	return parseCreates(lines), err
}

func parseCreates(lines []string) (all []pendingCreate) {
	for _, line := range lines {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		seconds, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue
		}
		all = append(all, pendingCreate{fields[0], time.Unix(seconds, 0), fields[2]})
	}
	return all
}

// usable returns an error if the journal is not open.
func (j *journal) usable() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.closed:
		return ErrClosed
	case j.lock == nil:
		return ErrNotLocked
	}
	return nil
}

// read returns the lines of a list. It takes no lock: write replaces a list by a rename.
func (j *journal) read(name string) ([]string, error) {
	data, err := j.fs.ReadFile(filepath.Join(j.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return lines(data), nil
}

// lines returns the lines of a list, without white space around them.
func lines(data []byte) (all []string) {
	for line := range strings.Lines(string(data)) {
		all = append(all, strings.TrimSpace(line))
	}
	return all
}

// add adds a VBD to the list. When it returns nil the entry survives a power cut.
func (j *journal) add(uuid string) error {
	return j.change(uuid, true, func() error {
		uuids, err := j.readVBDs()
		if err != nil {
			return err
		}
		return j.write(journalName, slices.Insert(uuids, 0, uuid))
	})
}

// change calls rewrite, which reads one of the lists and writes it again, while nobody else
// does so. key is the uuid or nonce that rewrite adds or removes.
func (j *journal) change(key string, add bool, rewrite func() error) error {
	j.changing <- struct{}{}
	defer func() { <-j.changing }()
	if err := j.usable(); err != nil {
		return err
	}
	if add { // also if rewrite fails: the entry may be there
		j.setAdded(key, true)
	}
	lock, err := j.lockLists()
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	err = errors.Join(rewrite(), lock.Close())
	j.unlocked = time.Now()
	if err == nil && !add {
		j.setAdded(key, false)
	}
	return err
}

// Another process locks journalLockName for some milliseconds. If that takes longer than
// maxJournalWait, the process was stopped, or its storage hangs. A process that has unlocked it
// waits for journalPause before it locks it again, so that another one, which tries every
// journalPoll, gets its turn.
const (
	maxJournalWait = 10 * time.Second
	journalPoll    = 2 * time.Millisecond
	journalPause   = 3 * time.Millisecond
)

// lockLists locks journalLockName. It returns ErrJournalLocked if another process keeps it
// locked, and ErrClosed after close.
func (j *journal) lockLists() (io.Closer, error) {
	path := filepath.Join(j.dir, journalLockName)
	if pause := journalPause - time.Since(j.unlocked); !j.unlocked.IsZero() && pause > 0 {
		time.Sleep(pause)
	}
	for begin := time.Now(); ; time.Sleep(journalPoll) {
		lock, err := j.fs.Lock(path)
		if !errors.Is(err, ErrLocked) {
			if err == nil {
				j.warned = false
			}
			return lock, err
		}
		if err := j.usable(); err != nil {
			return nil, err
		}
		if time.Since(begin) >= maxJournalWait {
			if !j.warned {
				j.warned = true
				j.log.Error("the journal is locked by another process", "path", path, "after", maxJournalWait.String())
			}
			return nil, fmt.Errorf("%w: %s", ErrJournalLocked, path)
		}
	}
}

// setAdded stores whether this process has added a uuid or nonce and not removed it.
func (j *journal) setAdded(key string, added bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.added == nil {
		j.added = make(map[string]bool)
	}
	if added {
		j.added[key] = true
	} else {
		delete(j.added, key)
	}
}

// isAdded reports whether this process has added a uuid or nonce and not removed it.
func (j *journal) isAdded(key string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.added[key]
}

// forget removes a VBD from the list, if it is there. The VBD must not exist any more.
func (j *journal) forget(uuid string) error {
	return j.change(uuid, false, func() error {
		uuids, err := j.readVBDs()
		if err != nil || !slices.Contains(uuids, uuid) {
			return err
		}
		return j.write(journalName, slices.DeleteFunc(uuids, func(u string) bool { return u == uuid }))
	})
}

// addCreate adds a call of VBD.create to the list, before the call is made. When it returns
// nil the entry survives a power cut.
func (j *journal) addCreate(c pendingCreate) error {
	return j.change(c.nonce, true, func() error {
		creates, err := j.readCreates()
		if err != nil {
			return err
		}
		return j.writeCreates(slices.Insert(creates, 0, c))
	})
}

// forgetCreate removes a call of VBD.create from the list, if it is there. The result of the
// call must be known.
func (j *journal) forgetCreate(nonce string) error {
	return j.change(nonce, false, func() error {
		creates, err := j.readCreates()
		if err != nil {
			return err
		}
		kept := slices.DeleteFunc(slices.Clone(creates), func(c pendingCreate) bool { return c.nonce == nonce })
		if len(kept) == len(creates) {
			return nil
		}
		return j.writeCreates(kept)
	})
}

func (j *journal) writeCreates(creates []pendingCreate) error {
	var lines []string
	for _, c := range creates {
		lines = append(lines, fmt.Sprintf("%s %d %s", c.nonce, c.since.Unix(), c.vdi))
	}
	return j.write(createsName, lines)
}

// write replaces a list. journalLockName is locked.
func (j *journal) write(name string, lines []string) error {
	var b strings.Builder
	for _, line := range lines {
		b.WriteString(line + "\n")
	}
	path := filepath.Join(j.dir, name)
	tmp := path + ".new"
	if err := j.writeSynced(tmp, b.String()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := j.fs.Rename(tmp, path); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	// The rename is durable only when the folder is.
	if err := j.fs.SyncDir(j.dir); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

func (j *journal) writeSynced(path, text string) error {
	f, err := j.fs.Create(path)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Sync(), f.Close())
}
