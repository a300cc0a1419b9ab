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

// acknowledgeAbort sends the reply to NBD_OPT_ABORT. A client that has closed the connection
// without waiting for it is no error.
func (n *negotiation) acknowledgeAbort() error {
	if err := n.reply(wire.OptAbort, wire.RepAck); err != nil && !neterr.IsGone(err) {
		return err
	}
	return errAborted
}
