package service

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi"
)

// Prefixes of the metadata contexts for the blocks that have changed since another VDI,
// whose uuid follows. See package changes.
const (
	DirtyBitmap     = "qemu:dirty-bitmap:"
	UnchangedBlocks = "x-xapi:unchanged:"
)

// changesContext is a metadata context for changed blocks.
type changesContext struct {
	name string
	base string // uuid, in the spelling of xapi
}

// parseContext reads the name of a context; ok is false for all others.
func parseContext(name string) (c changesContext, ok bool) {
	for _, prefix := range []string{DirtyBitmap, UnchangedBlocks} {
		if base, found := strings.CutPrefix(name, prefix); found && xapi.IsUUID(base) {
			return changesContext{name, strings.ToLower(base)}, true
		}
	}
	return changesContext{}, false
}

// parseContexts returns the contexts that a client asks for, and their bases, each once.
func parseContexts(queries []string) (contexts []changesContext, bases []string) {
	for _, q := range queries {
		c, ok := parseContext(q)
		if !ok || slices.Contains(contexts, c) {
			continue
		}
		contexts = append(contexts, c)
		if !slices.Contains(bases, c.base) {
			bases = append(bases, c.base)
		}
	}
	return contexts, bases
}

// OpenFor implements nbd.ContextExporter. xapi must be asked for changed blocks before
// the VDI is attached.
func (e *exporter) OpenFor(ctx context.Context, peer nbd.Peer, name string, queries []string) (nbd.Device, error) {
	return e.open(ctx, peer, name, queries)
}

// ListContexts implements nbd.ContextExporter. It does not ask xapi which bases a VDI has:
// it lists the prefixes in place of all names, and each valid name that is asked for, even
// if OpenFor may not grant it. Nothing is attached.
func (e *exporter) ListContexts(ctx context.Context, peer nbd.Peer, name string, queries []string) ([]string, error) {
	req, err := e.parse(ctx, peer, name)
	if err != nil {
		return nil, err
	}
	if err := e.mayExport(ctx, peer.Remote, req); err != nil {
		return nil, byRule(refusal(err))
	}
	var names []string
	for _, prefix := range []string{DirtyBitmap, UnchangedBlocks} {
		namespace := prefix[:strings.Index(prefix, ":")+1]
		if len(queries) == 0 || slices.Contains(queries, prefix) || slices.Contains(queries, namespace) {
			names = append(names, prefix)
		}
	}
	for _, q := range queries {
		if _, ok := parseContext(q); ok && !slices.Contains(names, q) {
			names = append(names, q)
		}
	}
	return names, nil
}

// mayExport authorizes a request to list an export's contexts.
func (e *exporter) mayExport(ctx context.Context, from net.Addr, req auth.Request) error {
	_, err := e.authorize(ctx, time.Now().Add(e.timeout()), from, req)
	return err
}

// Contexts implements nbd.Contexter.
func (d *watchedDisk) Contexts() (names []string) {
	for _, c := range d.contexts {
		names = append(names, c.name)
	}
	return names
}

// ContextExtents implements nbd.Contexter.
func (d *watchedDisk) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	c, _ := parseContext(name)
	m, ok := d.Changes(c.base)
	if !ok {
		return nil, fmt.Errorf("%s is not known any more", name)
	}
	runs := m.Unchanged
	if strings.HasPrefix(name, DirtyBitmap) {
		runs = m.Dirty
	}
	var extents []wire.Extent
	for _, e := range runs(off, n) {
		extents = append(extents, wire.Extent{Length: uint64(e.Length), Status: e.Status})
	}
	return extents, nil
}

// maxExtents bounds the answer to one question for extents.
const maxExtents = 4096

// Extents implements nbd.Extenter: blocks without data are holes that read as zeroes.
func (d *watchedDisk) Extents(off, n int64) ([]wire.Extent, error) {
	var extents []wire.Extent
	for end := off + n; off < end && len(extents) < maxExtents; {
		data, length := d.DataRun(off, end-off)
		e := wire.Extent{Length: uint64(length)}
		if !data {
			e.Status = wire.StateHole | wire.StateZero
		}
		extents = append(extents, e)
		off += length
	}
	return extents, nil
}
