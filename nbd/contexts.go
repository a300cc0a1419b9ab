package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"xapi-nbd/nbd/wire"
)

// Contexter is a Device that has metadata contexts besides base:allocation, section
// "Metadata querying".
//
// Contexts is called once, when the export is opened. It returns the names in the
// order in which NBD_OPT_LIST_META_CONTEXT shows them: "namespace:leaf", at most 4096
// bytes of UTF-8 each, at most 16 of them. Other names, and those after the 16th, are
// left out.
//
// ContextExtents returns the extents of one of these contexts, by the rules of
// [Extenter]. The meaning of the status belongs to the context. A status above 32 bits
// can be sent only to a client that has negotiated extended headers; without them the
// request fails. No extent at all is an error, because no status means "not known" in
// every context. ContextExtents is called concurrently.
type Contexter interface {
	Contexts() []string
	ContextExtents(name string, off, n int64) ([]wire.Extent, error)
}

// ContextExporter is an Exporter that has to know which metadata contexts a client asks
// for before it opens the export: for example because it must fetch them while the disk
// is not attached.
type ContextExporter interface {
	Exporter

	// OpenFor is Open for a client that has sent NBD_OPT_SET_META_CONTEXT with these
	// queries besides base:allocation. There is at least one. It is called for that option already, and the
	// device serves the NBD_OPT_GO that follows. A context that the device's
	// [Contexter] does not name is not granted, which is no error.
	OpenFor(ctx context.Context, peer Peer, name string, queries []string) (Device, error)

	// ListContexts is called for NBD_OPT_LIST_META_CONTEXT, instead of opening the
	// export. It returns the names of the contexts that match the queries, except
	// base:allocation; without queries all of them. A query that ends with a colon
	// matches all names that begin with it, and such a query may be returned in place
	// of the names that it stands for. Its errors are treated as those of Open.
	ListContexts(ctx context.Context, peer Peer, name string, queries []string) ([]string, error)
}

// maxContexts bounds the contexts of one export, and with it the size of one reply to
// BLOCK_STATUS.
const maxContexts = 16

// baseAllocationID is the id of base:allocation in replies. The contexts of a Contexter
// have the ids that follow, in the order of its names.
const baseAllocationID = 1

// contextsOf returns the contexts of an export, base:allocation first.
func contextsOf(x Contexter) []wire.MetaContext {
	all := []wire.MetaContext{{ID: baseAllocationID, Name: wire.BaseAllocation}}
	if x == nil {
		return all
	}
	seen := map[string]bool{wire.BaseAllocation: true}
	for _, name := range x.Contexts() {
		if len(all) <= maxContexts && isContextName(name) && !seen[name] {
			seen[name] = true
			all = append(all, wire.MetaContext{ID: uint32(len(all)) + baseAllocationID, Name: name})
		}
	}
	return all
}

// isContextName reports whether a name, or a query that a name is replaced by in a
// list, can be sent.
func isContextName(name string) bool {
	return strings.Contains(name, ":") && validString(name) == nil
}

// matches reports whether one of the queries asks for the context. A selection must
// name it. In a list no query at all asks for everything, and one that ends with a
// colon for everything that begins with it.
func matches(queries []string, name string, set bool) bool {
	if !set && len(queries) == 0 {
		return true
	}
	for _, q := range queries {
		if q == name || !set && strings.HasSuffix(q, ":") && strings.HasPrefix(name, q) {
			return true
		}
	}
	return false
}

// selectContexts returns those contexts that the queries select.
func selectContexts(all []wire.MetaContext, queries []string) []wire.MetaContext {
	var selected []wire.MetaContext
	for _, c := range all {
		if matches(queries, c.Name, true) {
			selected = append(selected, c)
		}
	}
	return selected
}

// listContexts asks a ContextExporter which contexts match the queries.
func (n *negotiation) listContexts(ctx context.Context, x ContextExporter, name string, queries []string) ([]string, *denial) {
	var names []string
	denied := n.ask(ctx, name, func(ctx context.Context) (err error) {
		perr := guard(func() { names, err = x.ListContexts(ctx, n.c.peer, name, queries) })
		return errors.Join(perr, err)
	})
	return names, denied
}

// contextExtents asks the device for the extents of one context.
func (s *session) contextExtents(c wire.MetaContext, off, n int64) ([]wire.Extent, error) {
	if c.ID != baseAllocationID {
		extents, err := s.can.contexter.ContextExtents(c.Name, off, n)
		if err == nil && len(extents) == 0 {
			err = fmt.Errorf("the device has no extents of %s", c.Name)
		}
		return extents, err
	}
	if s.can.extenter == nil {
		return []wire.Extent{{Length: uint64(n)}}, nil // data
	}
	return s.can.extenter.Extents(off, n)
}
