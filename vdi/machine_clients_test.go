package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
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

// isAlive reports whether xapi still knows a session.
func (m *machine) isAlive(c *client) (alive bool) {
	m.spy.with(func() { alive = !c.expired && c.restarts == m.spy.restarts })
	return alive
}

// attempt is an attempt to connect.
type attempt struct {
	client     *client
	disk       *modelDisk
	write      bool // it connects for writing
	sure, vain bool // it must succeed, or must not
	conn       *conn
	err        error
}

// newAttempt makes an attempt and predicts its result.
func (m *machine) newAttempt(t *rapid.T) *attempt {
	a := &attempt{client: m.drawClient(t), disk: m.drawDisk(t)}
	a.write = rapid.IntRange(0, 2).Draw(t, "mode") == 0
	allowed := m.isAlive(a.client) && a.client.role <= xapitest.RoleVMAdmin
	a.vain = !allowed
	// Who reads is only refused for one who writes; who writes, for many reasons.
	a.sure = allowed && !a.write && !m.isWritten(a.disk) && m.spy.calm() && m.undisturbed()
	return a
}

// isWritten reports whether a disk is attached for writing.
func (m *machine) isWritten(d *modelDisk) bool {
	return slices.ContainsFunc(m.service.manager.Status(), func(s vdi.Status) bool { return s.VDI == d.uuid && s.Write })
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
	c := &conn{client: a.client, model: a.disk}
	if a.write {
		if c.writable, a.err = s.manager.AttachWritable(ctx, grant.Session, a.disk.uuid); a.err == nil {
			c.disk = c.writable.Disk
		}
	} else {
		c.disk, a.err = s.manager.Attach(ctx, grant.Session, a.disk.uuid)
	}
	if a.err != nil {
		return
	}
	c.unwatch = s.rechecks.Watch(grant, c.disk.Revoke)
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
		if a.write {
			m.tally.counts["connected for writing"]++
		}
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
	if c.writable != nil {
		c.writable.CloseWithError(err)
		return
	}
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
	case !m.mayFail(r.conn, r.err):
		t.Fatalf("read: %v", r.err)
	case !bytes.Equal(r.p, make([]byte, len(r.p))):
		t.Fatal("a failed read left data behind")
	}
}

// mayFail reports whether a read or write of a connection may fail with err: the device was
// taken away, or is written and not exclusively ours any more, or it is a write and the session
// has ended.
func (m *machine) mayFail(c *conn, err error) bool {
	cause := context.Cause(c.disk.Lifetime())
	var broken *vdi.ExclusiveError
	switch {
	case errors.Is(err, vdi.ErrLost):
		return m.isDisturbed(c.model)
	case c.writable == nil:
		return false
	case errors.Is(err, auth.ErrSession):
		return errors.Is(cause, auth.ErrSession) && !m.isAlive(c.client)
	case errors.As(err, &broken):
		// The session may have ended before the attachment.
		known := errors.Is(cause, broken) || errors.Is(cause, auth.ErrSession) && !m.isAlive(c.client)
		return known && m.mayBreak(c.model, broken.Rule)
	}
	return false
}

// mayBreak reports whether something has happened while a disk was written that breaks a rule of
// vdi.ExclusiveError.
func (m *machine) mayBreak(d *modelDisk, rule string) (may bool) {
	switch rule {
	case "attached", "busy":
		return m.shared[d.uuid] || m.isDisturbed(d)
	case "unknown":
		m.spy.with(func() { may = m.spy.stopped })
	}
	return may
}

// write writes to a disk. After a failed write the expected content is read from the image.
func (m *machine) write(t *rapid.T) {
	i := slices.IndexFunc(m.conns, func(c *conn) bool { return c.writable != nil })
	if i < 0 {
		t.Skip("no connections that write")
	}
	c := m.conns[i]
	off := rapid.IntRange(0, len(c.model.content)-1).Draw(t, "offset")
	p := rapid.SliceOfN(rapid.Byte(), 1, min(4096, len(c.model.content)-off)).Draw(t, "bytes")
	n, err := c.writable.WriteAt(p, int64(off))
	switch {
	case err == nil && n != len(p):
		t.Fatalf("wrote %d of %d bytes without an error", n, len(p))
	case err == nil:
		m.tally.counts["wrote well"]++
		copy(c.model.content[off:], p)
	case !m.mayFail(c, err):
		t.Fatalf("write: %v", err)
	}
	image, err := os.ReadFile(c.model.image)
	if err != nil {
		t.Fatal(err)
	}
	if n == len(p) && !bytes.Equal(image, c.model.content) {
		t.Fatalf("%d bytes written at %d: the image has something else", n, off)
	}
	c.model.content = image
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
	for _, a := range attempts {
		a.sure = a.sure && !slices.ContainsFunc(attempts, func(o *attempt) bool { return o.write && o.disk == a.disk })
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
