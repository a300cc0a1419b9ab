package vdi

import (
	"context"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// lingerPoll is the interval at which a lingering attachment asks xapi whether its VDI is
// needed: VDI.data_destroy waits about four seconds until all VBDs are unplugged.
const lingerPoll = 200 * time.Millisecond

// linger waits until a client joins the attachment. It sets the stage to detaching if none
// does in time, or if the VDI is needed.
func (a *attachment) linger(ctx context.Context) {
	limit := a.m.limits.Load().Linger
	ctx, cancel := context.WithTimeout(ctx, limit)
	needed := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { a.watchVDI(ctx, needed) })
	defer watching.Wait()
	defer cancel()
	a.log.Info("waiting for the client to come back", "vbd", a.vbdUUID, "linger", limit.String())
	select {
	case <-a.wake:
		return // serve reads the stage
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

// watchVDI polls the VDI's record and closes needed when VDI.data_destroy waits for its
// VBDs to be unplugged. It ends with ctx. Errors of xapi are ignored.
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

// isNeeded reports whether VDI.data_destroy waits for the VBDs of a VDI. The operation
// changes the type of the VDI before it waits.
func isNeeded(r xapi.VDIRecord) bool {
	for _, operation := range r.CurrentOperations {
		if operation == "data_destroy" {
			return true
		}
	}
	return r.Type == "cbt_metadata"
}
