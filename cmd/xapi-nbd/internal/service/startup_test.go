package service

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/nbd"
)

func TestClientsWaitForTheFirstResponse(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	opened := newLatch()
	opened.open()
	soon := newLatch()
	for _, tt := range []struct {
		name  string
		ctx   context.Context
		latch latch
		grace time.Duration
		want  bool
	}{
		{"it has come", t.Context(), opened, -time.Hour, true},
		{"it comes within the grace", t.Context(), soon, time.Hour, true},
		{"the grace is over", t.Context(), newLatch(), -time.Hour, false},
		{"the client has gone", ended, newLatch(), time.Hour, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.latch == soon {
				go soon.open()
			}
			f := firstResponse{tt.latch, time.Now().Add(tt.grace), opened}
			if got := f.wait(tt.ctx); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// TestRefusedAfterTheGrace: until xapi has answered, clients wait for the rest of startupGrace
// and are then refused; later ones are refused at once.
func TestRefusedAfterTheGrace(t *testing.T) {
	locked := newLatch()
	locked.open()
	const name = "/00000000-0000-4000-8000-000000000001?session_id=OpaqueRef:00000000-0000-4000-8000-000000000002"
	for _, tt := range []struct {
		what string
		ask  func(context.Context, firstResponse) error
	}{
		{"export", func(ctx context.Context, ready firstResponse) error {
			_, err := (&exporter{ready: ready, draining: newDrainState()}).Open(ctx, nbd.Peer{}, name)
			return err
		}},
		{"TLS", func(ctx context.Context, ready firstResponse) error {
			p := &tlsPolicy{ready: ready, draining: newDrainState()}
			p.settings.Store(&tlsSettings{policy: config.TLSXapi})
			_, err := p.mode(ctx, nbd.Peer{})
			return err
		}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ready := firstResponse{newLatch(), time.Now().Add(startupGrace), locked}
				time.Sleep(startupGrace / 4) // of the bubble's time
				var refusal *nbd.Refusal
				for i, wait := range []time.Duration{startupGrace * 3 / 4, 0} {
					begin := time.Now()
					err := tt.ask(t.Context(), ready)
					if !errors.Is(err, errNotYet) {
						t.Errorf("client %d: got %v, want %v", i+1, err, errNotYet)
					}
					if !errors.As(err, &refusal) || refusal.Rule != reasonNotYet {
						t.Errorf("client %d is refused by the rule %q, want %q", i+1, refusal.Rule, reasonNotYet)
					}
					if waited := time.Since(begin); waited != wait {
						t.Errorf("client %d waited %v, want %v", i+1, waited, wait)
					}
				}
			})
		})
	}
}

// TestDefaultsRefuseWithinAMinute: with the defaults the call about the networks and the attach
// together take less than a minute, after which Xen Orchestra gives up.
func TestDefaultsRefuseWithinAMinute(t *testing.T) {
	const networks = 10 * time.Second // fetchTimeout in package auth
	if sum := networks + startupGrace + time.Duration(config.Default().AttachTimeout); sum >= time.Minute {
		t.Errorf("a client may wait for %v, want less than a minute", sum)
	}
}
