package vdi_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// upgrade makes a manager with the locks of f.manager, as the new process of an upgrade has
// it; f.manager gives them up.
func (f *fixture) upgrade() (next *vdi.Manager) {
	f.t.Helper()
	return f.successor(f.manager, f.cfg.Inventory)
}

func (f *fixture) generationFiles() (names []string) {
	f.t.Helper()
	paths, err := filepath.Glob(filepath.Join(f.stateDir, "gen.*"))
	do(f.t, err)
	for _, path := range paths {
		number, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), "gen."), ".")
		names = append(names, number)
	}
	return names
}

// After an upgrade two managers have a VBD of the same VDI each. Neither removes that of the
// other one, and each counts its own entries in the journal.
func TestTwoGenerations(t *testing.T) {
	f := newFixture(t)
	old := f.attach(f.session(xapitest.RoleVMAdmin))
	next := f.upgrade()
	if a, b := f.manager.Generation(), next.Generation(); a != 1 || b != 2 {
		t.Errorf("generations: got %d and %d, want 1 and 2", a, b)
	}
	d, err := next.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	do(t, err)
	if n := len(f.host.VBDs()); n != 2 {
		t.Errorf("VBDs: got %d, want one of each", n)
	}
	for i, m := range []*vdi.Manager{f.manager, next} {
		got, err := m.Recover(t.Context())
		if err != nil || len(got.Removed)+len(got.Left) > 0 || len(m.Leftovers()) > 0 {
			t.Errorf("recovery by %d: got %+v, %v and leftovers %+v", i+1, got, err, m.Leftovers())
		}
		if uuids, err := m.Journal(); err != nil || len(uuids) != 1 || uuids[0] != m.Status()[0].VBD {
			t.Errorf("journal of %d: got %q, %v", i+1, uuids, err)
		}
	}
	if others, err := next.OtherGenerations(); err != nil || !slices.Equal(others, []int{1}) {
		t.Errorf("others of 2: got %v, %v", others, err)
	}
	readsAll(t, f, old)
	readsAll(t, f, d)
	leave(old)
	f.closeManager()
	if n := len(f.host.VBDs()); n != 1 {
		t.Errorf("VBDs after the end of 1: got %d, want that of 2", n)
	}
	leave(d)
	do(t, next.Close(t.Context()))
	f.wantClean()
	if files := f.generationFiles(); len(files) > 0 {
		t.Errorf("left in the state folder: generations %v", files)
	}
}

// A client of the new process does not read what one of the old process writes: the guard of
// the writer would end it. After its end the VDI may be read.
func TestReaderBesideTheWriterOfTheOldProcess(t *testing.T) {
	f := newFixture(t)
	old := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	next := f.upgrade()
	before := f.count("VBD.create")
	_, err := next.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	wantRule(t, err, "being_written")
	if n := f.count("VBD.create") - before; n != 0 {
		t.Errorf("VBD.create: got %d calls, want none", n)
	}
	if _, err := old.WriteAt([]byte("goes on"), 0); err != nil {
		t.Error(err)
	}
	old.CloseWithError(nil)
	f.wait("the VBD to go", noVBDs)
	d, err := next.Attach(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	do(t, err)
	leave(d)
	f.closeManager()
	do(t, next.Close(t.Context()))
	f.wantClean()
}

// A client that wants to write is refused while the old process serves one that writes or reads,
// also with the same session, and reads why and for how long. Nothing is plugged, the old client
// goes on, and after its end the VDI may be written.
func TestWriterBesideTheOldProcess(t *testing.T) {
	for _, rule := range []string{"being_written", "being_read"} {
		f := newFixture(t)
		s := f.session(xapitest.RoleVMAdmin)
		var old *vdi.Disk
		if rule == "being_written" {
			old = f.attachWritable(s).Disk
		} else {
			old = f.attach(s)
		}
		next := f.upgrade()
		before := f.count("VBD.create")
		_, err := next.AttachWritable(t.Context(), s, f.vdi)
		wantRule(t, err, rule)
		if want := "until all its connections have ended"; err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("the refusal does not say %q: %v", want, err)
		}
		if n := f.count("VBD.create") - before; n != 0 {
			t.Errorf("VBD.create: got %d calls, want none", n)
		}
		readsAll(t, f, old)
		leave(old)
		f.wait("the VBD to go", noVBDs)
		d, err := next.AttachWritable(t.Context(), s, f.vdi)
		do(t, err)
		leave(d.Disk)
		f.closeManager()
		do(t, next.Close(t.Context()))
		f.wantClean()
	}
}

// A VM that runs is the reason that is given, also if the old process has the VDI attached.
func TestWriterBesideTheOldProcessAndAVM(t *testing.T) {
	f := newFixture(t)
	old := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	next := f.upgrade()
	f.startVM()
	_, err := next.AttachWritable(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
	wantRule(t, err, "attached")
	leave(old.Disk)
	f.closeManager()
	do(t, next.Close(t.Context()))
	f.wantClean()
}

// readsAll reads the whole disk.
func readsAll(t *testing.T, f *fixture, d *vdi.Disk) {
	t.Helper()
	b := make([]byte, len(f.content))
	if _, err := d.ReadAt(b, 0); err != nil || !slices.Equal(b, f.content) {
		t.Errorf("reading: %v, or wrong data", err)
	}
}

// What a process has left behind is removed as soon as its lock is free, and what it has in
// use is not, wherever it is listed: in the journal, in xapi only, or as a VBD.create without
// a response.
func TestRecoverAfterTheLockIsFree(t *testing.T) {
	f := newFixture(t)
	next := f.upgrade()
	release := f.block("VBD.create")
	attached := make(chan *vdi.Disk)
	go func() { attached <- f.attach(f.session(xapitest.RoleVMAdmin)) }()
	f.wait("VBD.create", f.called("VBD.create", 1))
	wantLeftAlone := func(when string) {
		t.Helper()
		if got, err := next.Recover(t.Context()); err != nil || len(got.Removed)+len(got.Left) > 0 {
			t.Errorf("%s: got %+v, %v, want it left alone", when, got, err)
		}
		if err := next.Close(canceled()); errors.Is(err, vdi.ErrLeft) {
			t.Errorf("%s: the entry counts as left by the other process", when)
		}
		next = f.again(next)
	}
	wantLeftAlone("during VBD.create")
	release()
	d := <-attached
	wantLeftAlone("attached")
	journal := f.journal()
	f.writeJournal("")
	wantLeftAlone("found by its tag only")
	f.writeJournal(journal)
	leave(d)
	f.wait("the detach", noVBDs)
	f.closeManager()
	do(t, next.Close(t.Context()))
	f.wantClean()
}

// again opens a manager after m was closed: the state folder is free then, as it is after a
// crash of the new process.
func (f *fixture) again(m *vdi.Manager) *vdi.Manager {
	f.t.Helper()
	m.Kill()
	return f.open()
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// The number of a process that has ended is given again, and its VBDs are removed all the
// same: the lock belongs to the process, not to the number.
func TestGenerationGivenAgain(t *testing.T) {
	f := newFixture(t)
	f.closeManager()
	uuid, err := f.host.AddForeignVBD(f.vdi, map[string]string{"xapi-nbd": f.host.InstallationUUID() + " 1.AAAA.BBBB 1.AAAA"})
	do(t, err)
	do(t, os.WriteFile(filepath.Join(f.stateDir, "gen.1.AAAA"), nil, 0o600)) // of a killed process
	f.manager = f.open()
	if n := f.manager.Generation(); n != 1 {
		t.Errorf("generation: got %d, want 1", n)
	}
	if got, err := f.manager.Recover(t.Context()); err != nil || !slices.Equal(got.Removed, []string{uuid}) {
		t.Errorf("got %+v, %v, want the VBD removed", got, err)
	}
	if files := f.generationFiles(); !slices.Equal(files, []string{"1"}) {
		t.Errorf("generations in the state folder: got %v, want one", files)
	}
	f.closeManager()
}

// Owners from xapi become part of a path only if they are ours.
func TestOddOwners(t *testing.T) {
	for _, tt := range []struct {
		owner string
		want  int
	}{
		{"1.AAAA", 1}, {"20.Z234567", 20}, {"", 0}, {"1", 0}, {"1.", 0}, {"0.AAAA", 0}, {"1.owner", 0},
		{"1./../x", 0}, {"../1.A", 0}, {"1.A\n", 0}, {"99999999999.A", 0},
	} {
		if got := vdi.GenerationOf(tt.owner); got != tt.want {
			t.Errorf("%q: got %d, want %d", tt.owner, got, tt.want)
		}
	}
	for nonce, want := range map[string]string{"1.AAAA.BBBB": "1.AAAA", "BBBB": "", "1.AAAA": "", "..": "", "x.y.z": ""} {
		if got := vdi.OwnerOfNonce(nonce); got != want {
			t.Errorf("nonce %q: got owner %q, want %q", nonce, got, want)
		}
	}
}

// Two processes change the journal at the same time, and no entry is lost.
func TestJournalOfTwoProcesses(t *testing.T) {
	f := newFixture(t)
	next := f.upgrade()
	var changing sync.WaitGroup
	for i, m := range []*vdi.Manager{f.manager, next} {
		changing.Go(func() {
			for n := range 40 {
				uuid := journalUUID(i, n)
				if err := m.AddToJournal(uuid); err != nil {
					t.Error(err)
				}
				if n%2 == 0 {
					if err := m.ForgetInJournal(uuid); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	changing.Wait()
	journal := f.journal()
	for i := range 2 {
		for n := range 40 {
			if got, want := strings.Contains(journal, journalUUID(i, n)), n%2 == 1; got != want {
				t.Errorf("%s in the journal: got %v, want %v", journalUUID(i, n), got, want)
			}
		}
	}
	f.writeJournal("")
	f.closeManager()
	do(t, next.Close(t.Context()))
}

func journalUUID(process, n int) string {
	return "00000000-0000-0000-000" + string(rune('0'+process)) + "-0000000000" + string(rune('0'+n/10)) + string(rune('0'+n%10))
}
