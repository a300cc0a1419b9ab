package intent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"xapi-nbd/internal/fsys"
)

// The errors of Open, for errors.Is. Their texts say what to do.
var (
	// ErrLocked means that another process has opened the log.
	ErrLocked = fsys.ErrLocked
	// ErrInvalid means that the file is no write-intent log, is damaged, or has an unknown
	// format. Open has not changed it.
	ErrInvalid = errors.New("cannot be used")
	// ErrOther means that the log belongs to a mirror of another size or between other ends.
	ErrOther = errors.New("belongs to another mirror")
	// ErrCompleted means that the mirror was completed.
	ErrCompleted = errors.New("the mirror was completed")
)

// Mirror identifies a mirror.
type Mirror struct {
	// Size is the size in bytes of both ends.
	Size int64
	// Primary and Secondary identify the ends. They must differ, must not contain secrets, and
	// must have less than about 4000 bytes in all.
	Primary, Secondary string
}

// Open opens the log of a mirror, to begin or to resume it, and locks the file until Close. If
// the file does not exist or is empty, Open makes a log that lists all regions. It changes
// nothing if it returns ErrLocked, ErrInvalid, ErrOther or ErrCompleted.
func Open(path string, m Mirror) (*Log, error) {
	// Devices such as /dev/null look like an empty file, but keep nothing.
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %w: it is no regular file", path, ErrInvalid)
	}
	return open(fsys.OS{}, path, m)
}

func open(files fsys.FS, path string, m Mirror) (*Log, error) {
	f, err := files.Lock(path)
	if errors.Is(err, ErrLocked) {
		return nil, fmt.Errorf("%s is %w", path, err)
	}
	if err != nil {
		return nil, err
	}
	l := &Log{file: f, path: path, writes: make(map[int]int), ended: make(map[int]time.Time)}
	err = l.load(m)
	if err == nil {
		// Also for a log that exists: the process that made it may have ended before this.
		err = files.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	l.durable = slices.Clone(l.now.bits)
	return l, nil
}

// load reads the file, or writes it if it is empty.
func (l *Log) load(m Mirror) error {
	damaged, empty, err := l.newest()
	switch {
	case err != nil:
		return err
	case empty:
		return l.create(m)
	}
	if err := l.now.check(m); err != nil {
		return fmt.Errorf("%s %w", l.path, err)
	}
	l.resumed = true
	// The process that wrote this slot may have been killed before the data was durable, or its
	// sync may have failed, after which the next one would not write the data again. Make it
	// durable before the other slots change. It keeps its bytes if this write is torn.
	if err := l.write(l.now, l.kept); err != nil {
		return err
	}
	if damaged > 1 {
		l.now.bits.setAll(l.now.regions())
	}
	l.now.generation++
	return l.writeOthers(l.now) // one of them may be damaged
}

// newest sets l.now to the valid slot with the highest generation and l.kept to its number. It
// returns the number of slots that are not valid.
func (l *Log) newest() (damaged int, empty bool, err error) {
	longest, reason := 0, errNoMagic
	b := make([]byte, slotStride)
	for i := range slots {
		n, err := l.file.ReadAt(b, int64(i)*slotStride)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, false, err
		}
		longest = max(longest, n)
		s, err := decodeSlot(b[:n])
		switch {
		case err != nil:
			damaged++
			if !errors.Is(err, errNoMagic) {
				reason = err
			}
		case i == damaged || s.generation > l.now.generation: // the first valid one, or a newer one
			l.kept, l.now = i, s
		}
	}
	if damaged == slots && longest > 0 {
		return 0, false, fmt.Errorf("%s %w: %w; remove it to copy everything, if the secondary has no newer data", l.path, ErrInvalid, reason)
	}
	return damaged, longest == 0, nil
}

// create writes a log that lists all regions.
func (l *Log) create(m Mirror) error {
	l.now = slot{generation: 1, description: describe(m)}
	l.now.bits = newBitmap(l.now.regions())
	l.now.bits.setAll(l.now.regions())
	// The end of the mirror makes the description longer.
	ended := l.now
	ended.Ended, ended.EndedAt = endedPivot, &time.Time{}
	if _, err := ended.encode(); err != nil {
		return err
	}
	return l.write(l.now, 0, 1, 2) // so that no later change needs more space
}

// write writes slots and makes them durable. If it fails their content is unknown.
func (l *Log) write(s slot, numbers ...int) error {
	b, err := s.encode()
	if err != nil {
		return err
	}
	for _, number := range numbers {
		if _, err := l.file.WriteAt(b, int64(number)*slotStride); err != nil {
			return err
		}
	}
	return l.file.Sync()
}

// writeOthers writes the slots other than l.kept, one of which is kept in the next change.
func (l *Log) writeOthers(s slot) error {
	first := (l.kept + 1) % slots
	if err := l.write(s, first, (l.kept+2)%slots); err != nil {
		return err
	}
	l.kept = first
	return nil
}

// check returns an error unless the mirror m may be resumed with the log.
func (s slot) check(m Mirror) error {
	const again = "remove the file to copy everything"
	switch {
	case s.Size != m.Size:
		return fmt.Errorf("%w: the ends have %d bytes, and had %d; %s", ErrOther, m.Size, s.Size, again)
	case s.Primary != m.Primary:
		return fmt.Errorf("%w: the primary is %s, and was %s; %s", ErrOther, m.Primary, s.Primary, again)
	case s.Secondary != m.Secondary:
		return fmt.Errorf("%w: the secondary is %s, and was %s; %s", ErrOther, m.Secondary, s.Secondary, again)
	case s.Region != describe(m).Region:
		return fmt.Errorf("%w: its regions have %d bytes", ErrInvalid, s.Region)
	case s.Ended != "":
		at := "at an unknown time"
		if s.EndedAt != nil {
			at = s.EndedAt.UTC().Format(time.RFC3339)
		}
		after := "the secondary may have newer data"
		if s.Ended == endedPivot {
			after = "the secondary has had all writes since then"
		}
		return fmt.Errorf("cannot be resumed: %w (%s, %s): %s; remove the file to overwrite the secondary", ErrCompleted, s.Ended, at, after)
	}
	return nil
}
