package vdi

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"xapi-nbd/internal/fsys"
)

const (
	uuidA = "aaaaaaaa-0000-0000-0000-000000000001"
	uuidB = "bbbbbbbb-0000-0000-0000-000000000002"
)

func openTestJournal(t *testing.T, dir string) *journal {
	t.Helper()
	j := &journal{fs: fsys.OS{}, dir: dir}
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
	if j := (&journal{fs: fsys.OS{}, dir: dir}); j.open() == nil {
		j.close()
		t.Error("a folder was accepted as a journal")
	}
}
