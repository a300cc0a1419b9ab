package service

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/nbd"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// slowXapi authorizes and attaches after a time, unless the context ends before.
type slowXapi struct{ authorize, attach time.Duration }

func (x slowXapi) Authorize(ctx context.Context, _ string, _ auth.Request) (auth.Grant, error) {
	return auth.Grant{}, sleepUntil(ctx, x.authorize)
}

func (x slowXapi) Attach(ctx context.Context, _ *xapi.Session, _ string, _ ...string) (*vdi.Disk, error) {
	if err := sleepUntil(ctx, x.attach); err != nil {
		return nil, err
	}
	return nil, vdi.ErrLost
}

func (x slowXapi) AttachWritable(ctx context.Context, s *xapi.Session, vdiUUID string) (*vdi.WritableDisk, error) {
	_, err := x.Attach(ctx, s, vdiUUID)
	return nil, err
}

// sleepUntil waits for d, or for the end of ctx and then returns its cause.
func sleepUntil(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TestAttachTimeoutIsForEverything: authorization and plug together take at most attach_timeout,
// as Xen Orchestra gives up after a minute.
func TestAttachTimeoutIsForEverything(t *testing.T) {
	const limit, hangs = 45 * time.Second, time.Hour
	tests := []struct {
		name  string
		xapi  slowXapi
		after time.Duration
		text  string
	}{
		{"slow authorization and a hung plug", slowXapi{30 * time.Second, hangs}, limit, "attach still in progress"},
		{"hung authorization", slowXapi{hangs, 0}, limit, "xapi did not answer"},
		{"hung plug", slowXapi{0, hangs}, limit, "attach still in progress"},
		{"slow, but in time", slowXapi{30 * time.Second, 10 * time.Second}, 40 * time.Second, "detached by somebody else"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answered, locked := newLatch(), newLatch()
				answered.open()
				locked.open()
				e := &exporter{
					sessions: tt.xapi, disks: tt.xapi, timeout: func() time.Duration { return limit },
					rates: newRates(0, 0), ready: firstResponse{answered, time.Now(), locked}, draining: newDrainState(),
					admit: func(context.Context, nbd.Peer) error { return nil },
				}
				begin := time.Now()
				_, err := e.Open(t.Context(), nbd.Peer{Remote: &net.TCPAddr{}}, "/7a2e8f00-1234-4abc-9def-0123456789ab?session_id=OpaqueRef:x")
				if err == nil || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got %v, want %q", err, tt.text)
				}
				if took := time.Since(begin); took != tt.after {
					t.Errorf("refused after %v, want %v", took, tt.after)
				}
			})
		})
	}
}
