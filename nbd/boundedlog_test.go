package nbd

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

var leftOutCount = regexp.MustCompile(`msg="log lines left out".* count=(\d+)`)

// leftOut returns the number of summaries and the number of lines that they count.
func (s *testServer) leftOut(t *testing.T) (summaries, count int) {
	t.Helper()
	for _, m := range leftOutCount.FindAllStringSubmatch(s.log.String(), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		summaries++
		count += n
	}
	return summaries, count
}

// kept returns the number of counts, and whether a window is open.
func (b *boundedLog) kept() (keys int, pending bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.lines), b.pending != nil
}

// refuseFrom makes a connection from host that is refused.
func (s *testServer) refuseFrom(host string) {
	p := s.connectFrom(host)
	p.greet(fixedNoZeroes)
	p.refused(wire.OptList, nil, wire.RepErrPolicy)
	p.nc.Close()
	p.end()
}

// TestLogOfOneAddressIsBounded: one address gets a burst of lines and then one a minute, until
// it has caused none for a while. All refusals are counted, and lines of other kinds and
// addresses are written.
func TestLogOfOneAddressIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		const n = 200
		for range n {
			s.refuseFrom("192.0.2.1")
		}
		if lines := s.linesWith("192.0.2.1", "rule=list"); len(lines) != logBurst {
			t.Errorf("%d lines, want %d", len(lines), logBurst)
		}
		s.refuseFrom("192.0.2.2")
		s.wantLine(t, "192.0.2.2", "rule=list")
		p := s.connectFrom("192.0.2.1")
		p.nc.Close()
		p.end()
		s.wantLine(t, "192.0.2.1", "handshake ended without an export")

		time.Sleep(logWindow)
		synctest.Wait()
		s.wantLine(t, "level=WARN", `msg="log lines left out"`, "remote=192.0.2.1", fmt.Sprint("count=", n-logBurst), fmt.Sprintf(`kinds="list %d"`, n-logBurst))
		for range 3 {
			s.refuseFrom("192.0.2.1") // goes on
		}
		time.Sleep(logWindow)
		synctest.Wait()
		s.wantLine(t, `msg="log lines left out"`, "count=3")
		if lines := s.linesWith("rule=list", "192.0.2.1"); len(lines) != logBurst {
			t.Errorf("in the second minute: %d lines, want still %d", len(lines), logBurst)
		}
		time.Sleep(logWindow)
		synctest.Wait()
		s.refuseFrom("192.0.2.1") // was quiet
		if lines := s.linesWith("rule=list", "192.0.2.1"); len(lines) != logBurst+1 {
			t.Errorf("after a quiet minute: %d lines, want %d", len(lines), logBurst+1)
		}
		if total := s.Totals().Refusals[RuleNoList]; total != n+5 {
			t.Errorf("%d refusals are counted, want %d", total, n+5)
		}
	})
}

// TestLogOfManyAddressesIsBounded: lines and memory are bounded for any number of addresses,
// and the summaries count the other lines.
func TestLogOfManyAddressesIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.init()
		const n = 3 * maxLogKeys
		written := 0
		for i := range n {
			if s.bounded.allow(s.Logger, fmt.Sprint("host", i), "kind") {
				written++
			}
		}
		if written != logBurstAll {
			t.Errorf("%d lines, want %d", written, logBurstAll)
		}
		if keys, _ := s.bounded.kept(); keys > maxLogKeys+1 {
			t.Errorf("%d counts are kept, want at most %d", keys, maxLogKeys+1)
		}
		time.Sleep(logWindow)
		synctest.Wait()
		summaries, count := s.leftOut(t)
		if summaries > maxLogSummaries+1 || count != n-written {
			t.Errorf("%d summaries of %d lines, want at most %d of %d", summaries, count, maxLogSummaries+1, n-written)
		}
		time.Sleep(2 * logWindow)
		synctest.Wait()
		if keys, pending := s.bounded.kept(); pending || keys != 0 {
			t.Errorf("at rest %d counts are kept, and a timer: %v", keys, pending)
		}
	})
}

// TestLogSummaryAtShutdown: Shutdown writes the counts that are left.
func TestLogSummaryAtShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		for range logBurst + 7 {
			s.refuseFrom("192.0.2.1")
		}
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if summaries, count := s.leftOut(t); summaries != 1 || count != 7 {
			t.Errorf("%d summaries of %d lines, want 1 of 7:\n%s", summaries, count, s.log)
		}
	})
}

// TestServedClientsAreAlwaysLogged: the lines of clients that are served are always written.
func TestServedClientsAreAlwaysLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		const n = 3 * logBurst
		for range n {
			p := s.connectFrom("192.0.2.1")
			p.greet(fixedNoZeroes)
			p.goTo("a")
			p.disc()
			p.end()
		}
		if got := strings.Count(s.log.String(), `msg="transmission ended"`); got != n {
			t.Errorf("%d ends are logged, want %d", got, n)
		}
		if summaries, _ := s.leftOut(t); summaries != 0 {
			t.Errorf("%d summaries, want none", summaries)
		}
	})
}
