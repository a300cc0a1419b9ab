package nbd

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

// namedDevice is a device with a canonical name.
type namedDevice struct{ *fakeDevice }

func (namedDevice) CanonicalName() string { return "/disk" }

// one is the only connection of the server.
func (s *testServer) one() ConnStatus {
	s.t.Helper()
	conns := s.Conns()
	if len(conns) != 1 {
		s.t.Fatalf("got %d connections, want 1", len(conns))
	}
	return conns[0]
}

const secretName = "/disk?session_id=OpaqueRef:secret"

// Conns describes a connection from its greeting on.
func TestConns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		h := newHold(t)
		device := namedDevice{newDevice(1 << 20)}
		device.onRead = h.read
		s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
			if name == "bad" {
				return nil, Refuse(ErrPolicy, "not today", nil)
			}
			return device, nil
		}
		begin := time.Now()
		p := s.connect()
		p.greet(fixedNoZeroes)
		synctest.Wait()
		if got := s.one(); got.Serving || !got.Since.Equal(begin) || got.LastError != "" || got.Export != "" {
			t.Errorf("during the handshake: got %+v", got)
		}
		p.refused(wire.OptGo, infoRequest("bad"), wire.RepErrPolicy)
		if got := s.one().LastError; got != "NBD_OPT_GO: NBD_REP_ERR_POLICY: not today" {
			t.Errorf("after a refusal: got %q", got)
		}
		p.goTo(secretName)
		advance(time.Second)
		p.read(1, 0, 4096)
		p.read(2, 0, 512)
		synctest.Wait()
		got := s.one()
		if !got.Serving || got.Export != "/disk" || got.Requests != 2 || got.InFlight != 2 || got.InFlightBytes != 4608 || got.Bytes != 0 {
			t.Errorf("with two requests under way: got %+v", got)
		}
		if !got.Began.Equal(begin) || got.TLS != "" {
			t.Errorf("got %+v, want it to begin at %v without TLS", got, begin)
		}
		h.release()
		p.anyReply()
		p.receive(int(got.InFlightBytes) + wire.SimpleReplyLen) // whichever comes first
		synctest.Wait()
		if got := s.one(); got.InFlight != 0 || got.InFlightBytes != 0 || got.Bytes != 4608 {
			t.Errorf("after them: got %+v", got)
		}
		p.disc()
		p.closed()
		if len(s.Conns()) != 0 {
			t.Errorf("after the end: got %+v", s.Conns())
		}
		if strings.Contains(s.log.String(), "secret") {
			t.Errorf("the log contains the requested name:\n%s", s.log)
		}
		if !strings.Contains(s.log.String(), "export=/disk") || !strings.Contains(s.log.String(), "rate=") {
			t.Errorf("the line of the transfer lacks export or rate:\n%s", s.log)
		}
	})
}

// The position follows the last READ, except where requests are merely out of order.
func TestConnsHaveThePosition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 1 << 20
		s := newTestServer(t)
		s.serve(newDevice(size))
		p := s.negotiated("a")
		for _, read := range []struct {
			what         string
			off, n, then int
		}{
			{"the first sector", 0, 512, 512},
			{"the last sector", size - 512, 512, size},
			{"from the start", 0, 4096, 4096},
			{"past what is skipped", size / 2, 4096, size/2 + 4096},
			{"a request that was overtaken", size/2 - 4096, 4096, size/2 + 4096},
			{"backwards, by more than that", size / 4, 4096, size/4 + 4096},
		} {
			p.reads(read.off, read.n)
			synctest.Wait()
			if got := s.one(); got.Position != int64(read.then) || got.Size != size {
				t.Errorf("%s: at %d of %d, want %d of %d", read.what, got.Position, got.Size, read.then, size)
			}
		}
		p.disc()
		p.closed()
	})
}

// The name of a device without a canonical name is not shown: the name that the client asked
// for may be secret.
func TestConnsHideTheRequestedName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.negotiated(secretName)
		p.reads(0, 512)
		if got := s.one(); got.Export != "" {
			t.Errorf("got %q", got.Export)
		}
		p.disc()
		p.closed()
	})
}

func zeroCounts(keys []string) map[string]int64 {
	m := make(map[string]int64)
	for _, key := range keys {
		m[key] = 0
	}
	return m
}

// Totals count connections that have ended and those that have not, and never decrease.
func TestTotals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.MaxConns = 1
		broken := false
		s.exports.open = func(context.Context, Peer, string) (Device, error) {
			d := newDevice(1 << 20)
			d.onRead = func(p []byte, off int64) (int, error) {
				if broken {
					return 0, errors.New("broken")
				}
				pattern(p, off)
				return len(p), nil
			}
			return d, nil
		}
		a := s.negotiated("a")
		a.reads(0, 4096)
		b := s.connect()
		b.greet(fixedNoZeroes)
		b.refused(wire.OptGo, infoRequest("b"), wire.RepErrPolicy)
		b.refused(wire.OptStructuredReply, []byte{1}, wire.RepErrInvalid)
		want := Totals{
			Conns: 2, Requests: 1, Bytes: 4096, Errors: map[string]int64{},
			OptionErrors: map[string]int64{"NBD_REP_ERR_POLICY": 1, "NBD_REP_ERR_INVALID": 1},
			Refusals:     zeroCounts(Rules()), Ends: zeroCounts(TransferEnds()),
			ReadLatency: latencyOf(0),
		}
		want.Refusals[RuleConnLimit], want.Refusals[RuleInvalidOption] = 1, 1
		synctest.Wait()
		if diff := cmp.Diff(want, s.Totals()); diff != "" {
			t.Errorf("while they live: want -, got +\n%s", diff)
		}
		broken = true
		a.read(7, 0, 512)
		if errno := a.answer(7, 0, 512); errno != wire.EIO {
			t.Errorf("got %v, want EIO", errno)
		}
		if got := s.Conns()[0].LastError; got != "NBD_CMD_READ: broken" {
			t.Errorf("last error: got %q", got)
		}
		a.disc()
		a.closed()
		b.option(wire.OptAbort, nil)
		b.want(wire.OptAbort, wire.RepAck)
		b.closed()
		synctest.Wait()
		want.Ends[EndDisconnect] = 1
		want.Requests, want.Failed, want.Errors["NBD_EIO"] = 3, 1, 1 // NBD_CMD_DISC is one
		want.ReadLatency = latencyOf(0, 0)                           // the one that failed is in it
		if diff := cmp.Diff(want, s.Totals()); diff != "" {
			t.Errorf("when they have ended: want -, got +\n%s", diff)
		}
	})
}

// Disconnect ends the connection, in either phase, and no other one.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		served, inHandshake := s.negotiated("a"), s.connect()
		inHandshake.greet(fixedNoZeroes)
		other := s.negotiated("b")
		synctest.Wait()
		conns := s.Conns()
		for i, p := range []*peer{served, inHandshake} {
			if !s.Disconnect(conns[i].ID) {
				t.Errorf("connection %s was not found", conns[i].ID)
			}
			wantHard(t, p.closed(), "disconnected by the administrator")
		}
		other.reads(0, 512)
		for _, id := range []string{"", "99", conns[0].ID} {
			if s.Disconnect(id) {
				t.Errorf("connection %q was found", id)
			}
		}
		other.disc()
		other.closed()
	})
}

// A client that leaves after a refusal causes one log line, with the rule and the remedy.
func TestRefusalIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.TLSConfig = serverTLS()
		s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) { return ForcedTLS, nil }
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.refused(wire.OptStructuredReply, nil, wire.RepErrTLSReqd)
		p.refused(wire.OptGo, infoRequest(secretName), wire.RepErrTLSReqd)
		p.nc.Close()
		p.end()
		s.wantLine(t, "level=WARN", `msg="option refused"`, "conn=1", "rule=tls_required", "opt=NBD_OPT_STRUCTURED_REPLY",
			`reason="send NBD_OPT_STARTTLS first"`, `remedy="have the client use TLS: nbds:// instead of nbd://`)
		if n := s.Totals().Refusals[RuleTLSRequired]; n != 1 {
			t.Errorf("%d refusals are counted, want 1", n)
		}
		if strings.Contains(s.log.String(), "secret") {
			t.Errorf("the log contains the requested name:\n%s", s.log)
		}
	})
}

// Requests that were refused are counted beside those that the device failed, in the
// status and in the line that sums up a transmission.
func TestRefusedRequestsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newDevice(4096)
		d.onRead = func([]byte, int64) (int, error) { return 0, syscall.EIO }
		s.serve(d)
		p := s.negotiated("a")
		for cookie, req := range []wire.Request{
			{Command: wire.CmdRead, Offset: 4096, Length: 512},
			{Command: wire.CmdFlush},
			{Command: wire.Command(99)},
			{Command: wire.CmdWrite, Length: 0},
			{Command: wire.CmdRead, Length: 512},
		} {
			req.Cookie = uint64(cookie)
			p.send(req.Append(nil))
			if r := p.anyReply(); r.Errno == wire.Success {
				t.Errorf("request %d succeeded", cookie)
			}
		}
		if got := s.Conns()[0]; got.Refused != 4 || got.Failed != 1 {
			t.Errorf("status: %d refused and %d failed, want 4 and 1", got.Refused, got.Failed)
		}
		p.disc()
		p.closed()
		p.end()
		if log := s.log.String(); !strings.Contains(log, "failed=1 refused=4") {
			t.Errorf("the end of the transmission is not summed up: %s", log[strings.LastIndex(log, "time="):])
		}
		if got := s.Totals(); got.Refused != 4 || got.Failed != 1 || got.Requests != 6 {
			t.Errorf("totals: %d refused and %d failed of %d, want 4 and 1 of 6", got.Refused, got.Failed, got.Requests)
		}
	})
}
