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
// the storage repository is locked, and 2 MiB of memory for each TiB.
const maxBases = 4

// changedTimeout bounds the time that an attachment spends on changed blocks. The storage
// manager needs seconds, and a client waits for the disk meanwhile. A variable for tests.
var changedTimeout = 20 * time.Second

// listChanged asks xapi which blocks have changed since each base. It is called before the
// VBD is created: xapi refuses the question for an attached VDI. A base for which xapi
// returns an error has no entry in the result; the error is logged and the attach goes on.
func (a *attachment) listChanged(ctx context.Context, s *xapi.Session) map[string]*xapi.ChangedBlocks {
	if len(a.bases) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, changedTimeout, fmt.Errorf("no answer within %v", changedTimeout))
	defer cancel()
	of, err := s.VDIRecord(ctx, a.vdiRef)
	if err == nil && !of.IsSnapshot {
		err = errNoSnapshot
	}
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

// errNoSnapshot is why the changed blocks of other VDIs are not known: a VM could write
// to the VDI after xapi's answer and before the plug, and nothing would tell.
var errNoSnapshot = errors.New("the VDI is no snapshot, so it may be written to before it is attached")

// listChangedSince asks for the changed blocks of a VDI of size bytes. If the disk has grown
// since the base, the new part counts as changed, although the storage manager does not
// list it: the base has no content there.
func listChangedSince(ctx context.Context, s *xapi.Session, this xapi.VDIRef, base string, size int64) (*xapi.ChangedBlocks, error) {
	ref, err := s.VDIByUUID(ctx, base)
	if err != nil {
		return nil, err
	}
	of, err := s.VDIRecord(ctx, ref)
	if err != nil {
		return nil, err
	}
	changed, err := s.ListChangedBlocks(ctx, ref, this, size)
	if err != nil || of.Type == typeCBTMetadata {
		return changed, err
	}
	return changed.ChangedFrom(of.VirtualSize), nil
}

// typeCBTMetadata is the type of a VDI without data. Its size is that of its log, so the
// size that the disk had is not known.
const typeCBTMetadata = "cbt_metadata"

// logUnknown logs why the blocks changed since base are unknown.
func (a *attachment) logUnknown(base string, err error) {
	a.log.Warn("changed blocks are not known", "base", base, "err", err)
}

// errAttachedBefore is the reason for a client that joins an attachment with other bases:
// xapi lists changed blocks only while the VDI is not attached.
var errAttachedBefore = errors.New("the VDI is attached already for somebody who did not ask for this base; end the other transfer")

// lacks reports whether one of bases is not among the bases of the attachment.
func (a *attachment) lacks(bases []string) bool {
	return slices.ContainsFunc(bases, func(base string) bool { return !slices.Contains(a.bases, base) })
}

// Changes returns the blocks that have changed since the VDI base, with the blocks that
// have data. ok is false if they are unknown; the reason is in the log. base must have
// been passed to [Manager.Attach]. Changes waits up to 2 s, as [Disk.DataRun] does.
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

// KnowsChanges reports, without waiting, whether Changes returns ok for base.
func (d *Disk) KnowsChanges(base string) bool {
	return d.a.changed[base] != nil && d.a.notFrozen == ""
}
