package memfs_test

import (
	"syscall"
	"testing"

	"xapi-nbd/internal/fsys/memfs"
)

// content returns the content of the file "f", or "none".
func content(m *memfs.FS) string {
	text, ok := m.Content("/f")
	if !ok {
		return "none"
	}
	return text
}

// Unsynced data and names survive a power cut or not.
func TestAfterPowerCut(t *testing.T) {
	m := memfs.New()
	m.WriteDurably("/f", "old!")
	f, err := m.Lock("/f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Rename("/f", "/g"); err != nil {
		t.Fatal(err)
	}
	if err := m.Rename("/g", "/f"); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"nothing survives": "old!", "only names survive": "old!", "only data survives": "new!", "everything survives": "new!",
	}
	for _, s := range memfs.Survivals {
		if got := content(m.AfterPowerCut(s)); got != want[s.String()] {
			t.Errorf("%v: got %q, want %q", s, got, want[s.String()])
		}
	}
	if got := content(m.AfterTornWrites(func(off int) bool { return off == 1 })); got != "oed!" {
		t.Errorf("the second byte survives: got %q", got)
	}
	killed := m.AfterKill()
	if got := content(killed); got != "new!" {
		t.Errorf("after a kill: got %q", got)
	}
	if got := content(killed.AfterPowerCut(memfs.NothingSurvives)); got != "old!" {
		t.Errorf("after a kill and a power cut: got %q", got)
	}
}

// A new file survives when its data and its name are synced.
func TestNewFile(t *testing.T) {
	m := memfs.New()
	f, err := m.Create("/f")
	if err != nil {
		t.Fatal(err)
	}
	left := func() [2]string {
		return [2]string{content(m.AfterPowerCut(memfs.NothingSurvives)), content(m.AfterPowerCut(memfs.OnlyNamesSurvive))}
	}
	if _, err := f.Write([]byte("text")); err != nil {
		t.Fatal(err)
	}
	if got := left(); got != [2]string{"none", ""} {
		t.Errorf("unsynced: got %q", got)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := left(); got != [2]string{"none", "text"} {
		t.Errorf("synced without its name: got %q", got)
	}
	if err := m.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	if got := left(); got != [2]string{"text", "text"} {
		t.Errorf("synced: got %q", got)
	}
}

// After a failed Sync, the next one makes only newer writes durable.
func TestFailedSync(t *testing.T) {
	m := memfs.New()
	m.WriteDurably("/f", "old")
	f, err := m.Lock("/f")
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string, off int64) {
		if _, err := f.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	write("NE", 0)
	m.OnOp(func(memfs.Op) error { return syscall.EIO })
	if err := f.Sync(); err == nil {
		t.Error("Sync: no error")
	}
	m.OnOp(nil)
	write("W", 2)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := content(m.AfterPowerCut(memfs.NothingSurvives)); got != "olW" {
		t.Errorf("durable is %q, want %q", got, "olW")
	}
	if got := content(m); got != "NEW" {
		t.Errorf("current is %q, want %q", got, "NEW")
	}
}
