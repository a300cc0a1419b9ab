package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// list answers NBD_OPT_LIST. Without a [Lister] it is refused: where export names contain
// credentials there is nothing that could be listed.
func (n *negotiation) list(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	if len(data) != 0 {
		return nil, n.refuse(opt, wire.RepErrInvalid, "NBD_OPT_LIST has no data")
	}
	lister, ok := n.c.srv.Exporter.(Lister)
	if !ok {
		return nil, n.deny(opt, "", &denial{
			reply: wire.RepErrPolicy, text: "exports are not listed; ask for one by name", rule: RuleNoList,
		})
	}
	ctx, done := n.c.watchPeer(ctx)
	var exports []Export
	var err error
	if perr := guard(func() { exports, err = lister.List(ctx, n.c.peer) }); perr != nil {
		err = perr
	}
	done()
	if err != nil {
		return nil, n.deny(opt, "", denialOf(err, RuleOther))
	}
	var b, entry []byte
	for _, e := range exports {
		entry = wire.ServerReply{Name: e.Name, Details: wire.ProtocolString(e.Description)}.Append(entry[:0])
		b = wire.AppendOptionReply(b, opt, wire.RepServer, entry)
	}
	return nil, n.c.writeHandshake(wire.AppendOptionReply(b, opt, wire.RepAck, nil))
}
