package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"xapi-nbd/nbd/wire"
)

// opened is an export that was opened for a name.
type opened struct {
	name   string
	device Device
	can    capabilities
	static wire.ExportInfo // without the flags, which depend on the negotiation

	queries  []string           // with which a ContextExporter opened it
	contexts []wire.MetaContext // which it has
}

// open opens the export for the peer, which asks for metadata contexts with these
// queries, unless an earlier option has opened it for the same name. On failure it returns
// the refusal to send.
func (n *negotiation) open(ctx context.Context, name string, queries []string) (*opened, *denial) {
	x, asks := n.c.srv.Exporter.(ContextExporter)
	if !asks {
		queries = nil
	}
	queries = slices.DeleteFunc(slices.Clone(queries), func(q string) bool { return q == wire.BaseAllocation })
	if n.opened != nil && n.opened.name == name && containsAll(n.opened.queries, queries) {
		if d := n.recheck(ctx, name); d != nil {
			n.release()
			return nil, d
		}
		o := n.opened
		n.opened = nil
		return o, nil
	}
	n.release()
	var o *opened
	d := n.ask(ctx, name, func(ctx context.Context) (err error) {
		o, err = n.openDevice(name, func() (Device, error) {
			switch {
			case len(queries) > 0:
				return x.OpenFor(ctx, n.c.peer, name, queries)
			case n.c.srv.Exporter == nil:
				return nil, errors.New("the server has no Exporter")
			}
			return n.c.srv.Exporter.Open(ctx, n.c.peer, name)
		})
		return err
	})
	if d != nil {
		return nil, d
	}
	o.queries = queries
	return o, nil
}

// recheck asks a [Rechecker] whether the peer may still use the export that is open. If not,
// it returns the refusal to send.
func (n *negotiation) recheck(ctx context.Context, name string) *denial {
	x, ok := n.c.srv.Exporter.(Rechecker)
	if !ok {
		return nil
	}
	return n.ask(ctx, name, func(ctx context.Context) (err error) {
		perr := guard(func() { err = x.Recheck(ctx, n.c.peer, name) })
		return errors.Join(perr, err)
	})
}

// openSelected opens the export with the contexts that were selected for it before.
func (n *negotiation) openSelected(ctx context.Context, name string) (*opened, *denial) {
	o, d := n.open(ctx, name, n.queries(name))
	if d != nil || n.selected.export != name || containsAll(o.contexts, n.selected.contexts) {
		return o, d
	}
	// The export was opened again, and lacks a metadata context that was granted.
	n.c.closeDevice(o.device)
	return nil, &denial{
		reply: wire.RepErrInvalid, rule: RuleOther,
		text:   "a metadata context that was selected is not available any more",
		remedy: "have the client select metadata contexts right before it begins the transmission",
	}
}

// queries are those with which contexts of the export were selected.
func (n *negotiation) queries(name string) []string {
	if n.selected.export != name {
		return nil
	}
	return n.selected.queries
}

// containsAll reports whether all has each of some.
func containsAll[T comparable](all, some []T) bool {
	return !slices.ContainsFunc(some, func(v T) bool { return !slices.Contains(all, v) })
}

// ask asks the Exporter about an export. The call ends early if the peer leaves. If it
// fails, the refusal to send is returned.
func (n *negotiation) ask(ctx context.Context, name string, call func(ctx context.Context) error) *denial {
	if err := validString(name); err != nil {
		return &denial{reply: wire.RepErrInvalid, text: err.Error(), rule: RuleInvalidOption, remedy: "correct the client"}
	}
	ctx, done := n.c.watchPeer(ctx)
	err := call(ctx)
	cause := context.Cause(ctx)
	done()
	switch {
	case err == nil:
		return nil
	case errors.Is(cause, errPeerGone):
		n.c.kill(hardDisconnect("peer hung up", nil))
		return &denial{reply: wire.RepErrUnknown} // which is not sent
	case cause != nil:
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return denialOf(err, RuleOther)
}

// openDevice calls the Exporter and asks the device for all that does not change.
func (n *negotiation) openDevice(name string, open func() (Device, error)) (*opened, error) {
	o := &opened{name: name}
	var err error
	if perr := guard(func() { o.device, err = open() }); perr != nil {
		return nil, perr
	}
	if err == nil && o.device == nil {
		err = errors.New("the Exporter returned neither a device nor an error")
	}
	if err != nil {
		return nil, err
	}
	err = guard(func() {
		o.can, o.static = capabilitiesOf(o.device), exportInfo(o.device, name)
		o.contexts = contextsOf(o.can.contexter)
	})
	if err == nil && o.device.Size() < 0 {
		err = fmt.Errorf("the device has a size of %d bytes", o.device.Size())
	}
	if err != nil {
		n.c.closeDevice(o.device)
		return nil, err
	}
	return o, nil
}

// info returns the information about an export, with the flags for what has been
// negotiated so far.
func (n *negotiation) info(o *opened) wire.ExportInfo {
	info := o.static
	info.Flags = o.can.transmissionFlags(n.replies)
	return info
}

// release closes the export that an option opened, if it is not in use.
func (n *negotiation) release() {
	if n.opened == nil {
		return
	}
	n.c.closeDevice(n.opened.device)
	n.opened = nil
}

// exportInfo asks a device for all information that does not change.
func exportInfo(d Device, name string) wire.ExportInfo {
	info := wire.ExportInfo{
		Size:       uint64(d.Size()),
		Name:       name,
		BlockSizes: blockSizesOf(d),
	}
	if n, ok := unwrap(d).(Namer); ok {
		info.Name = wire.ProtocolString(n.CanonicalName())
	}
	if t, ok := unwrap(d).(Describer); ok {
		info.Description = wire.ProtocolString(t.Description())
	}
	return info
}
