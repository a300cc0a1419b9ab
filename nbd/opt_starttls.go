package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// startTLS answers NBD_OPT_STARTTLS, section "TLS support". After the ACK everything is
// encrypted, and all options before it have no effect any more.
func (n *negotiation) startTLS(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	switch {
	case n.tls:
		return nil, n.refuse(opt, wire.RepErrInvalid, "TLS is already in use")
	case len(data) != 0:
		return nil, n.refuse(opt, wire.RepErrInvalid, "NBD_OPT_STARTTLS has no data")
	case n.flags&wire.FlagCFixedNewstyle == 0:
		return nil, n.refuse(opt, wire.RepErrPolicy, "TLS needs fixed newstyle negotiation")
	case n.mode == NoTLS:
		return nil, n.deny(opt, "", &denial{
			reply: wire.RepErrPolicy, text: "TLS is not available here", rule: RuleTLSNotAvailable,
			remedy: "have the client connect in the clear: nbd:// instead of nbds://, or configure TLS",
		})
	}
	n.release()
	if err := n.reply(opt, wire.RepAck); err != nil {
		return nil, err
	}
	if err := n.c.startTLS(ctx); err != nil {
		return nil, err
	}
	*n = negotiation{c: n.c, flags: n.flags, tls: true, mode: n.mode, settled: true}
	return nil, nil
}
