package nbd

import (
	"context"
	"slices"
	"strings"

	"xapi-nbd/nbd/wire"
)

// selection is what the last NBD_OPT_SET_META_CONTEXT selected. It holds for
// one export only.
type selection struct {
	export   string
	contexts []wire.MetaContext
}

// baseAllocationID is by which block status chunks name base:allocation.
const baseAllocationID = 1

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT,
// section "Metadata querying". Every export has base:allocation; queries for
// anything else find nothing, which is no error. The export is opened as for
// NBD_OPT_INFO, so that nothing is said of exports that the peer may not use.
func (n *negotiation) metaContext(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	set := opt == wire.OptSetMetaContext
	if set {
		n.selected = selection{} // a failed SET selects nothing too
	}
	req, err := wire.ParseMetaContextRequest(data)
	switch {
	case err != nil:
		return nil, n.refuse(opt, wire.RepErrInvalid, err.Error())
	case n.replies == simpleReplies:
		return nil, n.refuse(opt, wire.RepErrInvalid, "metadata contexts need structured replies")
	}
	o, d := n.open(ctx, req.Export)
	if d != nil {
		return nil, n.deny(opt, req.Export, d)
	}
	n.opened = o

	var b []byte
	if asksForBaseAllocation(req.Queries, set) {
		found := wire.MetaContext{Name: wire.BaseAllocation}
		if set {
			found.ID = baseAllocationID
			n.selected = selection{export: req.Export, contexts: []wire.MetaContext{found}}
		}
		b = wire.AppendOptionReply(b, opt, wire.RepMetaContext, found.Append(nil))
	}
	return nil, n.c.writeHandshake(wire.AppendOptionReply(b, opt, wire.RepAck, nil))
}

// asksForBaseAllocation matches the queries. A list without queries asks for
// everything, and "base:" for the whole namespace; a selection must name it.
func asksForBaseAllocation(queries []string, set bool) bool {
	if slices.Contains(queries, wire.BaseAllocation) {
		return true
	}
	namespace := wire.BaseAllocation[:strings.Index(wire.BaseAllocation, ":")+1]
	return !set && (len(queries) == 0 || slices.Contains(queries, namespace))
}
