package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// selection is the result of the last NBD_OPT_SET_META_CONTEXT. It is valid for one export.
type selection struct {
	export   string
	queries  []string
	contexts []wire.MetaContext
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT,
// section "Metadata querying". Every export has base:allocation, and those of its
// [Contexter]; a query that matches none of them is no error. The export is opened as
// for NBD_OPT_INFO, so that a peer gets no information about exports that it may not use.
// For a list a [ContextExporter] is asked instead.
func (n *negotiation) metaContext(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	set := opt == wire.OptSetMetaContext
	if set {
		n.selected = selection{} // a failed SET also selects nothing
	}
	req, err := wire.ParseMetaContextRequest(data)
	switch {
	case err != nil:
		return nil, n.refuse(opt, wire.RepErrInvalid, err.Error())
	case n.replies == simpleReplies:
		return nil, n.refuse(opt, wire.RepErrInvalid, "metadata contexts need structured replies")
	}
	find := n.listMetaContexts
	if set {
		find = n.setMetaContexts
	}
	found, d := find(ctx, req)
	if d != nil {
		return nil, n.deny(opt, req.Export, d)
	}
	var b []byte
	for _, c := range found {
		b = wire.AppendOptionReply(b, opt, wire.RepMetaContext, c.Append(nil))
	}
	return nil, n.c.writeHandshake(wire.AppendOptionReply(b, opt, wire.RepAck, nil))
}

// setMetaContexts opens the export for the queries, and remembers which contexts they
// select.
func (n *negotiation) setMetaContexts(ctx context.Context, req wire.MetaContextRequest) ([]wire.MetaContext, *denial) {
	o, d := n.open(ctx, req.Export, req.Queries)
	if d != nil {
		return nil, d
	}
	n.opened = o
	n.selected = selection{req.Export, req.Queries, selectContexts(o.contexts, req.Queries)}
	return n.selected.contexts, nil
}

// listMetaContexts returns the contexts that match the queries. In a list they have no
// ids.
func (n *negotiation) listMetaContexts(ctx context.Context, req wire.MetaContextRequest) ([]wire.MetaContext, *denial) {
	var names []string
	if x, ok := n.c.srv.Exporter.(ContextExporter); ok {
		var d *denial
		if names, d = n.listContexts(ctx, x, req.Export, req.Queries); d != nil {
			return nil, d
		}
		if matches(req.Queries, wire.BaseAllocation, false) {
			names = append([]string{wire.BaseAllocation}, names...)
		}
	} else {
		o, d := n.open(ctx, req.Export, n.queries(req.Export))
		if d != nil {
			return nil, d
		}
		n.opened = o
		for _, c := range o.contexts {
			if matches(req.Queries, c.Name, false) {
				names = append(names, c.Name)
			}
		}
	}
	var found []wire.MetaContext
	for _, name := range names {
		if isContextName(name) {
			found = append(found, wire.MetaContext{Name: name})
		}
	}
	return found, nil
}
