package vdi

import (
	"context"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// lingerPoll is how often a lingering attachment looks whether somebody needs
// its VDI: VDI.data_destroy waits about four seconds for VBDs to go, and they
// have to be unplugged within that too.
const lingerPoll = 200 * time.Millisecond

// linger waits for a client that was lost to come back. It returns when one has
// joined, or with the attachment on its way to be detached.
func (a *attachment) linger(ctx context.Context) {
	patience := a.m.limits.Load().Linger
	ctx, cancel := context.WithTimeout(ctx, patience)
	needed := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { a.watchVDI(ctx, needed) })
	defer watching.Wait()
	defer cancel()
	a.log.Info("waiting for the client to come back", "vbd", a.vbdUUID, "linger", patience.String())
	select {
	case <-a.wake:
		return // serve looks at the stage
	case <-needed:
		a.log.Info("not waiting any longer: the VDI is needed", "vbd", a.vbdUUID)
	case <-ctx.Done():
	}
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if a.stage == lingering {
		a.moveTo(detaching)
	}
}

// watchVDI closes needed when somebody wants the VDI's VBDs to go. It ends with
// ctx. A xapi that does not answer says nothing.
func (a *attachment) watchVDI(ctx context.Context, needed chan<- struct{}) {
	tick := time.NewTicker(lingerPoll)
	defer tick.Stop()
	for {
		var record xapi.VDIRecord
		err := a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			record, err = local.VDIRecord(ctx, a.vdiRef)
			return err
		})
		if err == nil && isNeeded(record) {
			close(needed)
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// isNeeded reports whether VDI.data_destroy waits for the VBDs of a VDI; it
// changes the type first.
func isNeeded(r xapi.VDIRecord) bool {
	for _, operation := range r.CurrentOperations {
		if operation == "data_destroy" {
			return true
		}
	}
	return r.Type == "cbt_metadata"
}
