package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/auth"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
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

// drawClient picks a session, or makes one.
func (m *machine) drawClient(t *rapid.T) *client {
	if n := rapid.IntRange(0, min(len(m.clients), 3)).Draw(t, "session"); n > 0 {
		return m.clients[len(m.clients)-n] // most old sessions have ended
	}
	roles := []xapitest.Role{xapitest.RoleRoot, xapitest.RoleRoot, xapitest.RoleVMAdmin, xapitest.RoleVMOperator}
	c := &client{role: rapid.SampledFrom(roles).Draw(t, "role")}
	m.out.do(func() { c.ref = xapi.SessionRef(m.host.NewSession(c.role)) })
	m.spy.with(func() { c.restarts = m.spy.restarts })
	m.clients = append(m.clients, c)
	return c
}

func (m *machine) drawDisk(t *rapid.T) *modelDisk {
	return m.disks[rapid.IntRange(0, len(m.disks)-1).Draw(t, "disk")]
}

// isAlive reports whether xapi still knows a session.
func (m *machine) isAlive(c *client) (alive bool) {
	m.spy.with(func() { alive = !c.expired && c.restarts == m.spy.restarts })
	return alive
}

// attempt is an attempt to connect.
type attempt struct {
	client     *client
	disk       *modelDisk
	sure, vain bool // it must succeed, or must not
	conn       *conn
	err        error
}

// newAttempt makes an attempt and predicts its result.
func (m *machine) newAttempt(t *rapid.T) *attempt {
	a := &attempt{client: m.drawClient(t), disk: m.drawDisk(t)}
	allowed := m.isAlive(a.client) && a.client.role <= xapitest.RoleVMAdmin
	a.vain = !allowed
	a.sure = allowed && m.spy.calm() && m.undisturbed()
	return a
}

// open opens a connection as the program does. It may be called concurrently.
func (m *machine) open(a *attempt) {
	ctx := context.Background()
	s := m.service
	grant, err := s.sessions.Authorize(ctx, string(a.client.ref), auth.Request{VDI: a.disk.uuid, Session: a.client.ref})
	if err != nil {
		a.err = err
		return
	}
	d, err := s.manager.Attach(ctx, grant.Session, a.disk.uuid)
	if err != nil {
		a.err = err
		return
	}
	c := &conn{client: a.client, model: a.disk, disk: d, unwatch: s.rechecks.Watch(grant, d.Revoke)}
	m.spy.with(func() { c.undoubted = m.spy.restarts == 0 })
	a.conn = c
}

// conclude checks the result of an attempt and adds it to the model.
func (m *machine) conclude(t *rapid.T, a *attempt) {
	var full *vdi.LimitError
	switch {
	case a.err == nil && a.vain:
		t.Fatalf("a client was served whose session is dead or may not plug: %+v", *a.client)
	case a.err == nil:
		m.tally.counts["connected"]++
		m.conns = append(m.conns, a.conn)
	case errors.As(a.err, &full) && full.Max == m.cfg.MaxVBDs && full.Max < len(m.disks):
		m.tally.counts["refused by the limit"]++
	case a.sure:
		t.Fatalf("connecting: %v", a.err)
	}
}

func (m *machine) connect(t *rapid.T) {
	a := m.newAttempt(t)
	m.open(a)
	if !m.wasKilled() { // else the connection is gone, too
		m.conclude(t, a)
	}
}

// hangUp ends a connection as the server does: abruptly with an error.
func (m *machine) hangUp(c *conn, err error) {
	m.conns = slices.DeleteFunc(m.conns, func(o *conn) bool { return o == c })
	c.unwatch()
	c.disk.CloseWithError(err)
}

// drawConn picks a connection. Without any it skips the step.
func (m *machine) drawConn(t *rapid.T) *conn {
	if len(m.conns) == 0 {
		t.Skip("no connections")
	}
	return m.conns[rapid.IntRange(0, len(m.conns)-1).Draw(t, "connection")]
}

func (m *machine) disconnect(t *rapid.T, err error) { m.hangUp(m.drawConn(t), err) }

// request is one read.
type request struct {
	conn *conn
	off  int64
	p    []byte
	err  error
	n    int
}

func (m *machine) newRequest(t *rapid.T) *request {
	r := &request{conn: m.drawConn(t)}
	size := len(r.conn.model.content)
	r.off = int64(rapid.IntRange(0, size-1).Draw(t, "offset"))
	r.p = make([]byte, rapid.IntRange(1, min(4096, size-int(r.off))).Draw(t, "length"))
	return r
}

func (r *request) do() { r.n, r.err = r.conn.disk.ReadAt(r.p, r.off) }

// concludeRead checks that every byte is that of the model, or that the read has failed and
// returned none.
func (m *machine) concludeRead(t *rapid.T, r *request) {
	want := r.conn.model.content[r.off:][:len(r.p)]
	switch {
	case r.err == nil:
		m.tally.counts["read well"]++
		if r.n != len(want) || !bytes.Equal(r.p, want) {
			t.Fatalf("read of %d at %d: other bytes than the model's", len(want), r.off)
		}
	case !errors.Is(r.err, vdi.ErrLost) || !m.isDisturbed(r.conn.model):
		t.Fatalf("read: %v", r.err)
	case !bytes.Equal(r.p, make([]byte, len(r.p))):
		t.Fatal("a failed read left data behind")
	}
}

func (m *machine) read(t *rapid.T) {
	if len(m.conns) == 0 {
		t.Skip("no connections")
	}
	var requests []*request
	for range rapid.IntRange(1, 3).Draw(t, "reads") {
		requests = append(requests, m.newRequest(t))
	}
	var wg sync.WaitGroup
	for _, r := range requests {
		wg.Go(r.do)
	}
	wg.Wait()
	for _, r := range requests {
		m.concludeRead(t, r)
	}
}

// atOnce connects, hangs up and recovers concurrently.
func (m *machine) atOnce(t *rapid.T) {
	var attempts []*attempt
	for range rapid.IntRange(1, 3).Draw(t, "connects") {
		attempts = append(attempts, m.newAttempt(t))
	}
	var leaving []*conn
	for range min(len(m.conns), rapid.IntRange(0, 2).Draw(t, "hang-ups")) {
		if c := m.drawConn(t); !slices.Contains(leaving, c) {
			leaving = append(leaving, c)
		}
	}
	var wg sync.WaitGroup
	for _, a := range attempts {
		wg.Go(func() { m.open(a) })
	}
	if rapid.Bool().Draw(t, "recovery") {
		wg.Go(func() { _, _ = m.service.manager.Recover(context.Background()) })
	}
	for _, c := range leaving {
		m.hangUp(c, errConnectionLost)
	}
	wg.Wait()
	for _, a := range attempts {
		if !m.wasKilled() {
			m.conclude(t, a)
		}
	}
}

// endLifetimes hangs up the connections whose lifetime has ended.
func (m *machine) endLifetimes(*rapid.T) {
	for _, c := range slices.Clone(m.conns) {
		if c.disk.Lifetime().Err() != nil {
			m.hangUp(c, context.Cause(c.disk.Lifetime()))
		}
	}
}

func (m *machine) timePasses(t *rapid.T) {
	spans := []time.Duration{10 * time.Millisecond, time.Second, 5 * time.Second, 2 * recheckEvery}
	time.Sleep(rapid.SampledFrom(spans).Draw(t, "time"))
}

// expireSession ends a session. Its connections, and no others, end within two rechecks.
func (m *machine) expireSession(t *rapid.T) {
	c := m.drawConn(t).client
	sure := m.spy.calm()
	m.out.do(func() { m.host.ExpireSession(string(c.ref)) })
	wasAlive := m.isAlive(c)
	c.expired = true
	time.Sleep(2 * recheckEvery)
	synctest.Wait()
	if !sure || m.wasKilled() {
		return
	}
	for _, o := range m.conns {
		ended := errors.Is(context.Cause(o.disk.Lifetime()), auth.ErrSession)
		switch {
		case o.client == c && wasAlive && o.undoubted && o.disk.Lifetime().Err() == nil:
			t.Fatal("a connection goes on after its session has ended")
		case o.client != c && m.isAlive(o.client) && ended:
			t.Fatal("a connection ended because of another session")
		}
	}
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
