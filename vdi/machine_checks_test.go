package vdi_test

import (
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

func (m *machine) isDisturbed(d *modelDisk) (disturbed bool) {
	m.spy.with(func() { disturbed = m.spy.disturbed[d.uuid] })
	return disturbed
}

// undisturbed reports whether nobody has interfered with any disk.
func (m *machine) undisturbed() bool {
	return !slices.ContainsFunc(m.disks, m.isDisturbed)
}

// check verifies the invariants that hold when all goroutines are blocked.
func (m *machine) check(t *rapid.T) {
	m.spy.look("rest")
	m.spy.with(func() {
		if m.spy.wrong != "" {
			t.Fatal(m.spy.wrong)
		}
	})
	attachments := m.service.manager.Attachments()
	vbds := m.host.VBDs()
	m.checkForeign(t, vbds)
	m.checkOurs(t, vbds, attachments)
	m.checkAttachments(t, attachments)
	m.checkExclusive(t)
	m.checkSessions(t)
}

// checkForeign checks that VBDs of other tools were not changed.
func (m *machine) checkForeign(t *rapid.T, vbds []xapitest.VBD) {
	for _, f := range m.foreign {
		i := slices.IndexFunc(vbds, func(v xapitest.VBD) bool { return v.UUID == f.uuid })
		if i < 0 || vbds[i].CurrentlyAttached != f.plugged {
			t.Fatalf("foreign VBD %s, plugged: %t, was touched; VBDs: %+v", f.uuid, f.plugged, vbds)
		}
	}
}

// checkOurs checks that every VBD of this service is tagged and belongs to an attachment,
// unless a recovery is due, and that no attachment has two.
func (m *machine) checkOurs(t *rapid.T, vbds []xapitest.VBD, attachments []vdi.Attachment) {
	owners := make(map[string]string)
	for _, v := range vbds {
		if v.Foreign {
			continue
		}
		tag := strings.Fields(v.OtherConfig["xapi-nbd"])
		if len(tag) != 3 {
			t.Fatalf("VBD %s is not tagged: %v", v.UUID, v.OtherConfig)
		}
		installation, nonce := tag[0], tag[1]
		if installation != m.host.InstallationUUID() || nonce == "" {
			t.Fatalf("VBD %s is not tagged: %v", v.UUID, v.OtherConfig)
		}
		owned := slices.ContainsFunc(attachments, func(a vdi.Attachment) bool { return a.Nonce == nonce && a.VDI == v.VDI }) ||
			slices.Contains(m.service.manager.LeftNonces(), nonce)
		if !owned && !m.owed {
			t.Fatalf("VBD %+v belongs to no attachment, and is not being removed: %+v", v, attachments)
		}
		if owners[nonce] != "" {
			t.Fatalf("VBDs %s and %s are of one attachment", owners[nonce], v.UUID)
		}
		owners[nonce] = v.UUID
	}
}

// checkAttachments checks that each attachment has the right number of users, and a stage
// that is possible with them.
func (m *machine) checkAttachments(t *rapid.T, attachments []vdi.Attachment) {
	users := make(map[string]int)
	for _, c := range m.conns {
		users[c.model.uuid]++
	}
	for _, a := range attachments {
		n := users[a.VDI]
		delete(users, a.VDI)
		ok := false
		switch a.Stage {
		case "attached", "lost":
			ok = n > 0 && a.Users == n
		case "lingering":
			ok = n == 0 && a.Users == 0
		case "plugging", "detaching", "forgetting": // between two tries
			ok = n == 0
		}
		if !ok {
			t.Fatalf("with %d connections %+v is idle", n, a)
		}
	}
	if len(users) > 0 {
		t.Fatalf("connections without an attachment: %v", users)
	}
}

// checkExclusive checks that a disk that is written is used by one session, and not read by
// connections that cannot write.
func (m *machine) checkExclusive(t *rapid.T) {
	for _, w := range m.conns {
		for _, c := range m.conns {
			if w.writable != nil && c.model == w.model && (c.writable == nil || c.client != w.client) {
				t.Fatalf("VDI %s is used by %+v while %+v writes it", w.model.uuid, *c.client, *w.client)
			}
		}
	}
}

// checkSessions checks that only the kept local session exists, apart from those that could
// not be ended.
func (m *machine) checkSessions(t *rapid.T) {
	m.spy.mu.Lock()
	defer m.spy.mu.Unlock()
	if n := m.host.Sessions(); m.spy.known && n > 1+m.spy.excused {
		t.Fatalf("local sessions: got %d, want at most 1 and %d that could not be ended", n, m.spy.excused)
	}
}

// finish ends the sequence. When xapi runs and there are no more events, no VBD and no entry
// of this service is left.
func (m *machine) finish(t *rapid.T) {
	m.calmDown(t)
	for len(m.conns) > 0 {
		m.hangUp(m.conns[0], nil)
	}
	m.settle(t)
	for len(m.service.manager.Attachments()) > 0 {
		time.Sleep(time.Second) // the pause between two tries of a detach
		synctest.Wait()
	}
	m.settle(t)
	time.Sleep(2 * time.Hour) // a VBD.create that was not answered is not expected any more
	m.settle(t)
	m.recover(t)
	m.settle(t)
	m.check(t)
	if left := m.service.manager.Leftovers(); len(left) > 0 {
		t.Fatalf("still to be removed: %+v", left)
	}
	if m.owed {
		t.Fatal("a recovery is still to be done")
	}
	for _, v := range m.host.VBDs() {
		if !v.Foreign {
			t.Fatalf("VBD left behind: %+v", v)
		}
	}
	if journal := m.service.files.Journal(memStateDir); len(journal) > 0 {
		t.Fatalf("journal: got %q, want it empty", journal)
	}
	m.stopService(t)
	m.spy.mu.Lock()
	defer m.spy.mu.Unlock()
	if n := m.host.Sessions(); m.spy.known && n > m.spy.excused {
		t.Fatalf("local sessions: got %d, want at most %d that could not be ended", n, m.spy.excused)
	}
}
