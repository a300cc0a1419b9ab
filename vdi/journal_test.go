package vdi

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/internal/fsys"
)

const (
	uuidA = "aaaaaaaa-0000-0000-0000-000000000001"
	uuidB = "bbbbbbbb-0000-0000-0000-000000000002"
)

func openTestJournal(t *testing.T, dir string) *journal {
	t.Helper()
	j := newJournal(fsys.OS{}, dir, slog.New(slog.DiscardHandler))
	if err := j.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.close() })
	return j
}

func wantList(t *testing.T, j *journal, want ...string) {
	t.Helper()
	got, err := j.list()
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("list: got %q, %v, want %q", got, err, want)
	}
}

func TestJournal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "on demand")
	j := openTestJournal(t, dir)
	wantList(t, j)
	for _, uuid := range []string{uuidA, uuidB} {
		if err := j.add(uuid); err != nil {
			t.Fatal(err)
		}
	}
	wantList(t, j, uuidB, uuidA)
	data, err := os.ReadFile(filepath.Join(dir, "VBDs_to_clean_up"))
	if want := uuidB + "\n" + uuidA + "\n"; err != nil || string(data) != want {
		t.Errorf("file: got %q, %v, want the original's format %q", data, err, want)
	}
	if err := j.forget(uuidB); err != nil {
		t.Fatal(err)
	}
	wantList(t, j, uuidA)
	if err := j.forget("not there"); err != nil {
		t.Error(err)
	}
	if leftovers, _ := filepath.Glob(filepath.Join(dir, "*.new")); leftovers != nil {
		t.Errorf("temporary files left: %q", leftovers)
	}
}

// The journal may have lines that the original service or a crash of it has left.
func TestJournalReadsDamage(t *testing.T) {
	dir := t.TempDir()
	text := "\n" + uuidA + "\r\n  " + uuidB + "\n" + uuidA + "\ngarbage\n\x00\x00\n" + uuidB[:20]
	if err := os.WriteFile(filepath.Join(dir, journalName), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	j := openTestJournal(t, dir)
	wantList(t, j, uuidA, uuidB)
	if err := j.forget(uuidA); err != nil {
		t.Fatal(err)
	}
	wantList(t, j, uuidB)
}

func TestJournalCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, journalName), 0o700); err != nil {
		t.Fatal(err)
	}
	if j := newJournal(fsys.OS{}, dir, slog.New(slog.DiscardHandler)); j.open() == nil {
		j.close()
		t.Error("a folder was accepted as a journal")
	}
}

// Another process locks the journal and is stopped: a change fails after a while, the lists can
// be read meanwhile, the log has one line, and when that process goes on changes succeed.
func TestJournalStaysLocked(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		j := newJournal(fsys.OS{}, dir, slog.New(slog.NewTextHandler(&text, nil)))
		must(t, j.open())
		must(t, j.add(uuidA))
		other, err := fsys.OS{}.Lock(filepath.Join(dir, journalLockName))
		must(t, err)
		changed := make(chan error, 1)
		begin := time.Now()
		go func() { changed <- j.add(uuidB) }()
		synctest.Wait()
		wantList(t, j, uuidA)
		if err := <-changed; !errors.Is(err, ErrJournalLocked) || time.Since(begin) > maxJournalWait+time.Second {
			t.Errorf("after %v: got %v, want ErrJournalLocked", time.Since(begin), err)
		}
		if err := j.forget(uuidA); !errors.Is(err, ErrJournalLocked) {
			t.Errorf("the next change: got %v, want ErrJournalLocked", err)
		}
		if n := strings.Count(text.String(), "the journal is locked by another process"); n != 1 {
			t.Errorf("got %d lines, want 1:\n%s", n, &text)
		}
		go func() { changed <- j.add(uuidB) }()
		time.Sleep(time.Second)
		must(t, other.Close())
		must(t, <-changed)
		wantList(t, j, uuidB, uuidA)
		must(t, j.close())
	})
}

// close does not wait for another process that has locked the journal.
func TestJournalIsClosedWhileLocked(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := openTestJournal(t, dir)
		other, err := fsys.OS{}.Lock(filepath.Join(dir, journalLockName))
		must(t, err)
		defer other.Close()
		var changing sync.WaitGroup
		for _, uuid := range []string{uuidA, uuidB} {
			changing.Go(func() {
				if err := j.add(uuid); !errors.Is(err, ErrClosed) {
					t.Errorf("got %v, want ErrClosed", err)
				}
			})
		}
		synctest.Wait()
		begin := time.Now()
		must(t, j.close())
		changing.Wait()
		if took := time.Since(begin); took > time.Second {
			t.Errorf("close took %v", took)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
