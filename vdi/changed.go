package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"xapi-nbd/vdi/changes"
	"xapi-nbd/xapi"
)

// maxBases bounds the bases of one attachment: each costs a call of xapi, during which
// the storage does nothing else, and 2 MiB of memory for each TiB.
const maxBases = 4

// changedTimeout bounds what is spent on the changed blocks of an attachment. The
// storage manager needs seconds; somebody waits for the disk meanwhile.
const changedTimeout = 20 * time.Second

// listChanged asks xapi which blocks have changed since the bases, before the VBD is
// created: xapi refuses for a VDI that is attached. What it does not tell is missing in
// the result, and the log has the reason; the attachment goes on without.
func (a *attachment) listChanged(ctx context.Context, s *xapi.Session) map[string]*xapi.ChangedBlocks {
	if len(a.bases) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, changedTimeout, fmt.Errorf("no answer within %v", changedTimeout))
	defer cancel()
	of, err := s.VDIRecord(ctx, a.vdiRef)
	known := make(map[string]*xapi.ChangedBlocks)
	for i, base := range a.bases {
		switch {
		case err != nil:
			a.logUnknown(base, err)
			continue
		case i >= maxBases:
			a.logUnknown(base, fmt.Errorf("one connection asks for more than %d bases", maxBases))
			continue
		}
		begin := time.Now()
		changed, err := listChangedSince(ctx, s, a.vdiRef, base, of.VirtualSize)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			a.logUnknown(base, err)
			continue
		}
		a.log.Info("changed blocks are known", "base", base, "changed", changed.Bytes(), "size", changed.Size(), "took", time.Since(begin).Round(time.Millisecond))
		known[base] = changed
	}
	return known
}

func listChangedSince(ctx context.Context, s *xapi.Session, this xapi.VDIRef, base string, size int64) (*xapi.ChangedBlocks, error) {
	ref, err := s.VDIByUUID(ctx, base)
	if err != nil {
		return nil, err
	}
	return s.ListChangedBlocks(ctx, ref, this, size)
}

// logUnknown says why a client is not told which blocks have changed.
func (a *attachment) logUnknown(base string, err error) {
	a.log.Warn("changed blocks are not known", "base", base, "err", err)
}

// errAttachedBefore is why a client that comes later is not told: xapi can be asked only
// while the VDI is not attached.
var errAttachedBefore = errors.New("the VDI is attached already for somebody who did not ask for this base; end the other transfer")

// lacks reports whether one of the bases was not asked for when the attachment was made.
func (a *attachment) lacks(bases []string) bool {
	return slices.ContainsFunc(bases, func(base string) bool { return !slices.Contains(a.bases, base) })
}

// Changes returns what has changed since the VDI base; ok is false if that is not known:
// the log says why. See [Manager.Attach]. It waits as DataRun does.
func (d *Disk) Changes(base string) (_ changes.Map, ok bool) {
	changed := d.a.changed[base]
	if changed == nil || d.a.notFrozen != "" {
		return changes.Map{}, false
	}
	m := changes.Map{Changed: changed}
	<-d.a.blocks.done
	if data := d.a.blocks.set; data != nil {
		m.Allocated = data
	}
	return m, true
}

// KnowsChanges reports whether Changes has an answer, without waiting.
func (d *Disk) KnowsChanges(base string) bool {
	return d.a.changed[base] != nil && d.a.notFrozen == ""
}
