package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// extendedHeaders answers NBD_OPT_EXTENDED_HEADERS, which replaces structured replies and
// may be sent after them.
func (n *negotiation) extendedHeaders(_ context.Context, opt wire.Option, data []byte) (*session, error) {
	switch {
	case len(data) != 0:
		return nil, n.refuse(opt, wire.RepErrInvalid, "NBD_OPT_EXTENDED_HEADERS has no data")
	case n.replies == extendedHeaders:
		return nil, n.refuse(opt, wire.RepErrInvalid, "extended headers are in use already")
	}
	n.replies = extendedHeaders
	return nil, n.reply(opt, wire.RepAck)
}
