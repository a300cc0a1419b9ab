package vdi_test

import (
	"context"
	"sync"

	"pgregory.net/rapid"

	"xapi-nbd/auth"
	"xapi-nbd/internal/fsys/memfs"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// service is a manager with the parts that the program adds to it.
type service struct {
	*process
	local     *xapi.Local
	sessions  *auth.Authorizer
	rechecks  *auth.Rechecker
	endChecks func() // ends the rechecks of sessions and waits for them
}

// start starts the service on the files, and again if it is killed meanwhile.
func (m *machine) start(t *rapid.T, files *vdi.MemFS) {
	for {
		m.launch(t, files)
		if !m.wasKilled() {
			return
		}
		files = m.bury(t)
	}
}

func (m *machine) launch(t *rapid.T, files *vdi.MemFS) {
	p, err := newProcess(m.host, files)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{process: p, local: xapi.NewLocal(p.client, vdi.Originator)}
	s.sessions = auth.NewAuthorizer(p.client, s.local)
	s.rechecks = auth.NewRechecker(s.local, recheckEvery, nil)
	ctx, cancel := context.WithCancel(context.Background())
	var checking sync.WaitGroup
	checking.Go(func() { s.rechecks.Run(ctx) })
	s.endChecks = func() { cancel(); checking.Wait() }
	m.service, m.owed = s, true
	m.spy.with(func() { m.spy.service, m.spy.killed = s, false })
	files.OnOp(m.spy.onFile)
	calm := m.spy.calm()
	for tries := 0; s.manager == nil; tries++ {
		err := s.open(func(c *vdi.Config) { *c = m.config(*c, s.local) })
		switch {
		case m.wasKilled():
			return
		case err != nil && (calm || tries > 0):
			t.Fatalf("opening the manager: %v", err)
		}
	}
	s.manager.OnTransition(m.tally.step)
	m.recover(t)
}

// config adds the settings that were drawn for the sequence.
func (m *machine) config(c vdi.Config, local *xapi.Local) vdi.Config {
	c.MaxVBDs, c.Linger, c.Local = m.cfg.MaxVBDs, m.cfg.Linger, local
	return c
}

func (m *machine) wasKilled() (killed bool) {
	m.spy.with(func() { killed = m.spy.killed })
	return killed
}

// bury ends the goroutines of a service that was cut off, and returns the files for the next
// one.
func (m *machine) bury(t *rapid.T) *vdi.MemFS {
	m.tally.counts["killed"]++
	m.endService()
	m.conns = nil
	if n := rapid.IntRange(-1, len(memfs.Survivals)-1).Draw(t, "what survives"); n >= 0 {
		return m.service.files.AfterPowerCut(memfs.Survivals[n])
	}
	return m.service.files.AfterKill()
}

// endService ends all goroutines of a service that was cut off.
func (m *machine) endService() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m.service.endChecks()
	m.service.bury()
	_ = m.service.local.Close(ctx) // cannot log out
}

// abandon ends the service, in any state.
func (m *machine) abandon() {
	if m.service == nil {
		return
	}
	m.out.do(func() {
		m.host.OnCall(nil)
		m.service.cut()
	})
	m.endService()
}
