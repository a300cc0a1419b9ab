package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// structuredReply answers NBD_OPT_STRUCTURED_REPLY.
func (n *negotiation) structuredReply(_ context.Context, opt wire.Option, data []byte) (*session, error) {
	switch {
	case len(data) != 0:
		return nil, n.refuse(opt, wire.RepErrInvalid, "NBD_OPT_STRUCTURED_REPLY has no data")
	case n.replies == extendedHeaders:
		return nil, n.refuse(opt, wire.RepErrExtHeaderReqd, "extended headers are in use")
	case n.replies == structuredReplies:
		return nil, n.refuse(opt, wire.RepErrInvalid, "structured replies are in use already")
	}
	n.replies = structuredReplies
	return nil, n.reply(opt, wire.RepAck)
}
