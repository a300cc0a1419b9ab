package nbd

import (
	"context"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// abort answers NBD_OPT_ABORT, whose data is ignored.
func (n *negotiation) abort(context.Context, wire.Option, []byte) (*session, error) {
	return nil, n.acknowledgeAbort()
}

// acknowledgeAbort does not mind a client that has left without waiting.
func (n *negotiation) acknowledgeAbort() error {
	if err := n.reply(wire.OptAbort, wire.RepAck); err != nil && !neterr.IsGone(err) {
		return err
	}
	return errAborted
}
