package nbd

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// recheckingExporter is a [Rechecker].
type recheckingExporter struct {
	*fakeExporter
	err      error
	panics   bool
	rechecks []string
}

func (e *recheckingExporter) Recheck(_ context.Context, peer Peer, name string) error {
	e.rechecks = append(e.rechecks, peer.ID+" "+name)
	if e.panics {
		panic("in Recheck")
	}
	return e.err
}

// TestRecheck: an export that INFO has opened is used by GO only after another question, and
// closed if the answer is a refusal.
func TestRecheck(t *testing.T) {
	stricter := Refuse(ErrPolicy, "not any more", errors.New("secret"))
	for _, tt := range []struct {
		name   string
		err    error
		panics bool
		typ    wire.OptionReply
	}{
		{"refused", stricter, false, wire.RepErrPolicy},
		{"other error", errors.New("secret"), false, wire.RepErrUnknown},
		{"panic", nil, true, wire.RepErrUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				x := &recheckingExporter{fakeExporter: s.exports}
				s.Exporter = x
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.info(wire.OptInfo, "a")
				if len(x.rechecks) != 0 {
					t.Errorf("asked again for %q before there was anything to use", x.rechecks)
				}
				p.info(wire.OptInfo, "a")
				x.err, x.panics = tt.err, tt.panics
				p.refused(wire.OptGo, infoRequest("a"), tt.typ)
				if n := s.exports.device(0).closes(); n != 1 {
					t.Errorf("the export was closed %d times, want once", n)
				}
				p.goTo("a") // is opened again, which asks Open
				p.reads(0, 512)
				id := s.exports.peers[0].ID
				if want := []string{id + " a", id + " a"}; !slices.Equal(x.rechecks, want) {
					t.Errorf("asked for %q, want %q", x.rechecks, want)
				}
				if got := s.exports.opened(); !slices.Equal(got, []string{"a", "a"}) {
					t.Errorf("opened %q, want it twice", got)
				}
			})
		})
	}
}
