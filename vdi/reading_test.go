package vdi_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/xapi/xapitest"
)

// TestDetachWaitsForTheImages: the storage manager may fail to deactivate a volume that
// is open, so the VBD is unplugged when the images are closed.
func TestDetachWaitsForTheImages(t *testing.T) {
	f := newChainFixture(t)
	var unplugged, reading atomic.Bool
	reading.Store(true)
	called := make(chan struct{}, 1)
	f.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		if c.Method == "VBD.unplug" && !c.After {
			unplugged.Store(reading.Load())
			select {
			case called <- struct{}{}:
			default:
			}
		}
		return xapitest.Proceed
	})
	f.manager.ReadMap(func(ctx context.Context, _ allocation.Source) (*vhd.BlockSet, error) {
		<-ctx.Done()
		select { // a detach that does not wait comes within this time
		case <-called:
		case <-time.After(200 * time.Millisecond):
		}
		reading.Store(false)
		return nil, allocation.ErrUnknown
	})
	leave(f.attach(f.session(xapitest.RoleVMAdmin)))
	f.closeManager()
	if unplugged.Load() {
		t.Error("the VBD was unplugged while images were open")
	}
}
