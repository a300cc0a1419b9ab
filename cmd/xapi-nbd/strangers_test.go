//go:build !race

package main

import (
	"bytes"
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// The hostile clients of TestClientsBesideHostileOnes: each kind has addresses of its own,
// and strangersPerAddress connections from each of them. Each connection repeats its action
// after strangerPause, so that the test does not depend on the machine's speed.
const (
	strangersPerAddress = 32
	strangerPause       = 50 * time.Millisecond
)

var strangerKinds = []struct {
	name      string
	addresses int
	act       func(s *strangers, nc net.Conn)
}{
	{"guesses sessions", 4, (*strangers).guess},
	{"repeats a dead session", 2, (*strangers).repeat},
	{"asks by EXPORT_NAME", 2, (*strangers).oldWay},
	{"says nothing", 4, (*strangers).sayNothing},
	{"sends garbage", 1, (*strangers).sendGarbage},
	{"scans the port", 1, func(*strangers, net.Conn) {}},
}

// TestClientsBesideHostileOnes: beside hundreds of connections without a session, a client
// with one is served within two seconds, each time, and xapi gets few calls. It does not run
// with the race detector, with which hundreds of connections take too much processor time. A
// machine that was busy for a second gets two more attempts: an effect of the hostile
// connections would appear in each.
func TestClientsBesideHostileOnes(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	w := newWorld(t, xapitest.Config{})
	content := random(1, 1<<20)
	vdi := w.addVDI(content, xapitest.VDISpec{})
	p := w.start("--log-level=info", "--tls=off")
	p.waitCalm(w)
	dead := w.session(xapitest.RoleVMAdmin)
	w.host.ExpireSession(dead)
	// A question takes xapi some time, so that it matters who asks.
	w.host.Delay("session.get_record", 10*time.Millisecond)
	w.host.ResetCalls()

	s := &strangers{addr: p.addr, vdi: vdi, dead: w.host.ExportName(vdi, dead), acts: make([]atomic.Int64, len(strangerKinds))}
	ctx, cancel := context.WithCancel(t.Context())
	defer s.wg.Wait()
	defer cancel()
	begin, tries := time.Now(), 0
	s.run(ctx)
	for kind, k := range strangerKinds {
		if k.name == "says nothing" {
			continue // its acts end when the service ends them
		}
		eventually(t, func() string {
			if s.acts[kind].Load() < 2*strangersPerAddress {
				return "too few actions of hostile clients: one that " + k.name
			}
			return ""
		})
	}
	for try := range honestTries {
		quickest := time.Hour
		for chance := 0; chance < 3 && quickest > 2*time.Second; chance++ {
			begin := time.Now()
			w.readOnce(p, vdi, content)
			quickest = min(quickest, time.Since(begin))
			tries++
		}
		t.Logf("try %d: %v", try, quickest)
		if quickest > 2*time.Second {
			t.Errorf("try %d: took %v at best, want at most 2s", try, quickest)
		}
	}
	cancel()
	s.wg.Wait()
	w.wantFewQuestions(tries, time.Since(begin))
	w.waitClean(p)
}

// honestTries are those of the client that has a session.
const honestTries = 10

// readOnce is a client that is never refused, however long it takes.
func (w *world) readOnce(p *process, vdi string, content []byte) {
	w.t.Helper()
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		w.t.Fatalf("refused: %v", err)
	}
	defer conn.Close()
	got := make([]byte, 4096)
	if _, err := conn.ReadAt(got, 8192); err != nil || !bytes.Equal(got, content[8192:][:len(got)]) {
		w.t.Errorf("reading: %v", err)
	}
}

// wantFewQuestions compares the number of calls about sessions with the number that the
// hostile addresses may cause in that time.
func (w *world) wantFewQuestions(honest int, lasted time.Duration) {
	w.t.Helper()
	// Each address that guesses may cause the calls without a penalty, those in progress
	// then, and one for each penalty, which is soon some seconds long. Dead sessions: 3 s each.
	seconds := int(lasted/time.Second) + 1
	most := honest + 4*(8+4+6+seconds) + 4*(4+seconds)
	asked := w.count("session.get_record")
	w.t.Logf("%d questions about sessions in %v", asked, lasted)
	if asked > most {
		w.t.Errorf("xapi was asked about sessions %d times in %v, want at most %d", asked, lasted, most)
	}
}
