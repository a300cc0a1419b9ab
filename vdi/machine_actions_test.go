package vdi_test

import (
	"context"
	"fmt"
	"slices"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// action is a step of a sequence.
type action struct {
	name string
	do   func(*rapid.T)
}

// actions returns all steps. rapid prefers the first and the last one. The rare ones share
// one entry.
func (m *machine) actions() map[string]func(*rapid.T) {
	steps := []action{
		{"connect", m.connect},
		{"read", m.read},
		{"write", m.write},
		{"lose the client", func(t *rapid.T) { m.disconnect(t, errConnectionLost) }},
		{"leave", func(t *rapid.T) { m.disconnect(t, nil) }},
		{"let time pass", m.timePasses},
		{"at once", m.atOnce},
		{"arm a call", m.armCall},
		{"calm down", m.calmDown},
		{"unplug ours", m.unplugOurs},
		{"end lifetimes", m.endLifetimes},
		{"toggle foreign", m.toggleForeign},
		{"destroy ours", m.destroyOurs},
		{"expire a session", m.expireSession},
		{"", m.rare},
		{"connect", m.connect},
		{"read", m.read},
	}
	actions := map[string]func(*rapid.T){"": m.check}
	for i, s := range steps {
		actions[fmt.Sprintf("%02d %s", i, s.name)] = func(t *rapid.T) {
			m.tally.counts[s.name]++
			s.do(t)
			m.settle(t)
			m.tally.steps++
		}
	}
	return actions
}

// rare takes one of the steps that end connections and attachments of the other steps.
func (m *machine) rare(t *rapid.T) {
	steps := []action{
		{"arm a file operation", m.armFile},
		{"recover", m.recover},
		{"restart xapi", m.restartXapi},
		{"restart the service", m.restartService},
		{"kill the service", m.killService},
		{"stop xapi", m.stopXapi},
	}
	s := steps[rapid.IntRange(0, len(steps)-1).Draw(t, "rare step")]
	t.Log(s.name)
	m.tally.counts[s.name]++
	s.do(t)
}

func (m *machine) drawDisk(t *rapid.T) *modelDisk {
	return m.disks[rapid.IntRange(0, len(m.disks)-1).Draw(t, "disk")]
}

func (m *machine) timePasses(t *rapid.T) {
	spans := []time.Duration{10 * time.Millisecond, time.Second, 5 * time.Second, 2 * recheckEvery}
	time.Sleep(rapid.SampledFrom(spans).Draw(t, "time"))
}

// armCall prepares an event for one of the next calls.
func (m *machine) armCall(t *rapid.T) {
	methods := []string{
		"session.login_with_password", "session.logout", "session.get_uuid", "session.get_record",
		"VDI.get_by_uuid", "VDI.get_record", "VM.get_by_uuid", "VBD.get_uuid", "VBD.get_record",
		"VBD.get_by_uuid", "VBD.get_all_records_where", "VBD.create", "VBD.plug", "VBD.unplug", "VBD.destroy",
	}
	e := event{
		method: rapid.SampledFrom(methods).Draw(t, "method"),
		kind:   eventKind(rapid.IntRange(0, int(destroyOurs)).Draw(t, "event")),
		after:  rapid.Bool().Draw(t, "after"),
	}
	switch e.kind {
	case failCall:
		e.after = false
		codes := []string{"INTERNAL_ERROR", "OTHER_OPERATION_IN_PROGRESS", "SR_BACKEND_FAILURE_46", "HOST_STILL_BOOTING"}
		e.code = rapid.SampledFrom(codes).Draw(t, "code")
	case unplugOurs: // only a VBD that has just been plugged is not open yet
		e.method, e.after = "VBD.plug", true
	case destroyOurs:
		e.method, e.after = "VBD.create", true
	}
	t.Logf("at the next %s, after it: %t: %v", e.method, e.after, e.kind)
	m.spy.with(func() { m.spy.events = append(m.spy.events, e) })
}

func (m *machine) armFile(t *rapid.T) {
	e := fileEvent{
		in:    rapid.IntRange(1, 12).Draw(t, "operations from now"),
		after: rapid.Bool().Draw(t, "after"),
		fail:  rapid.Bool().Draw(t, "error"),
	}
	m.spy.with(func() { m.spy.file = e })
}

// calmDown cancels the events that have not happened yet, and lets xapi respond.
func (m *machine) calmDown(t *rapid.T) {
	m.spy.with(func() { m.spy.events, m.spy.file, m.spy.fileNow = nil, fileEvent{}, false })
	m.resumeXapi(t)
}

func (m *machine) restartXapi(*rapid.T) {
	m.out.do(m.spy.restart)
	m.spy.with(func() { m.spy.known, m.spy.excused = true, 0 })
}

func (m *machine) stopXapi(*rapid.T) { m.out.do(m.spy.stop) }

func (m *machine) resumeXapi(t *rapid.T) {
	var err error
	m.out.do(func() { err = m.host.Resume() })
	if err != nil {
		t.Fatal(err)
	}
	m.spy.with(func() { m.spy.down = false })
}

// restartService stops the service in an orderly way and starts it again.
func (m *machine) restartService(t *rapid.T) {
	m.stopService(t)
	if m.wasKilled() {
		return
	}
	m.service.disconnect()
	m.start(t, m.service.files)
}

// stopService hangs up and closes everything.
func (m *machine) stopService(t *rapid.T) {
	troubled := slices.ContainsFunc(m.service.manager.Attachments(), func(a vdi.Attachment) bool {
		return a.Stage != "attached" && a.Stage != "lingering"
	})
	sure := m.spy.calm() && m.undisturbed() && !m.owed && !troubled && len(m.service.manager.Leftovers()) == 0
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for len(m.conns) > 0 {
		m.hangUp(m.conns[0], errConnectionLost)
	}
	m.service.endChecks()
	err := m.service.manager.Close(ctx)
	if err != nil && sure {
		t.Fatalf("closing the manager: %v", err)
	}
	if err := m.service.local.Close(ctx); err != nil {
		m.spy.with(func() { m.spy.known = false })
	}
	synctest.Wait()
	m.out.do(m.spy.waitIdle)
	if !sure || m.wasKilled() {
		return
	}
	for _, v := range m.host.VBDs() {
		if !v.Foreign {
			t.Fatalf("VBD left behind by an orderly stop: %+v", v)
		}
	}
}

func (m *machine) killService(*rapid.T) { m.out.do(m.spy.kill) }

// drawVBD picks a VBD of this service for which ok returns true. Without any it skips the
// step.
func (m *machine) drawVBD(t *rapid.T, ok func(xapitest.VBD) bool) xapitest.VBD {
	ours := slices.DeleteFunc(m.host.VBDs(), func(v xapitest.VBD) bool { return v.Foreign || !ok(v) })
	if len(ours) == 0 {
		t.Skip("no such VBD")
	}
	return ours[rapid.IntRange(0, len(ours)-1).Draw(t, "VBD")]
}

// isOpen reports whether the service has the device of a VDI open.
func (m *machine) isOpen(vdiUUID string) bool {
	return slices.ContainsFunc(m.service.manager.Attachments(), func(a vdi.Attachment) bool {
		return a.VDI == vdiUUID && slices.Contains([]string{"attached", "lingering", "lost"}, a.Stage)
	})
}

// mayBeUnplugged reports whether another client of xapi can unplug an attached VBD. If
// devices are not called nbdN, xapi refuses that while the device is open, unless the VDI
// has another VBD.
func (m *machine) mayBeUnplugged(v xapitest.VBD) bool {
	shared := slices.ContainsFunc(m.host.VBDs(), func(o xapitest.VBD) bool {
		return o.VDI == v.VDI && o.UUID != v.UUID && o.CurrentlyAttached
	})
	return v.CurrentlyAttached && (m.style == xapitest.StyleNBD || shared || !m.isOpen(v.VDI))
}
