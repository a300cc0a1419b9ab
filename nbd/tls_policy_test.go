package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

func TestPolicyErrorRefusesEverything(t *testing.T) {
	tests := []struct {
		name string
		err  error
		cfg  *tls.Config
		mode TLSMode
		typ  wire.OptionReply
		text string
	}{
		{"refusal", Refuse(ErrPolicy, "no network has an NBD purpose", errors.New("secret")), serverTLS(), NoTLS, wire.RepErrPolicy, "no network has an NBD purpose"},
		{"TLS without a configuration", nil, nil, ForcedTLS, wire.RepErrPolicy, "TLS is wanted and not configured"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.TLSConfig = tt.cfg
				s.TLSPolicy = func(context.Context, Peer) (TLSMode, error) { return tt.mode, tt.err }
				p := s.connect()
				p.greet(fixedNoZeroes)
				for _, opt := range []wire.Option{wire.OptStartTLS, wire.OptInfo, wire.OptGo, wire.OptList, wire.OptStructuredReply} {
					if text := p.refused(opt, nil, tt.typ); text != tt.text {
						t.Errorf("%v: refused with %q, want %q", opt, text, tt.text)
					}
				}
				p.refused(wire.OptAbort, nil, wire.RepAck)
				if err := p.closed(); err != nil {
					t.Error(err)
				}
				old := s.connect()
				old.greet(fixedNoZeroes)
				old.option(wire.OptExportName, []byte("a"))
				wantHard(t, old.closed(), tt.text)
				if got := s.exports.opened(); len(got) != 0 {
					t.Errorf("opened %q", got)
				}
			})
		})
	}
}

// TestPolicyIsAskedOnceAtTheFirstOption: the mode does not change during a connection, section
// "TLS support", and a peer that sends nothing causes no call of the policy.
func TestPolicyIsAskedOnceAtTheFirstOption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, SelectiveTLS)
		var asked []string
		s.TLSPolicy = func(_ context.Context, peer Peer) (TLSMode, error) {
			asked = append(asked, peer.ID)
			if len(asked) > 1 {
				return NoTLS, errors.New("changed its mind")
			}
			return SelectiveTLS, nil
		}
		quiet := s.connect()
		quiet.greet(fixedNoZeroes)
		synctest.Wait()
		quiet.refused(wire.OptAbort, nil, wire.RepAck)
		quiet.end()
		p := s.connect()
		p.greet(fixedNoZeroes)
		synctest.Wait()
		if len(asked) != 0 {
			t.Errorf("policy asked for %q before the first option", asked)
		}
		p.refused(wire.OptList, nil, wire.RepErrPolicy)
		p.info(wire.OptInfo, "a")
		p.startTLS(nil)
		p.info(wire.OptInfo, "a")
		p.goTo("b")
		if len(asked) != 1 || asked[0] != s.exports.peers[0].ID {
			t.Errorf("policy asked for %q, want once for this connection", asked)
		}
	})
}
