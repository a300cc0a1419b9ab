package nbd

import (
	"context"

	"xapi-nbd/nbd/wire"
)

// list answers NBD_OPT_LIST. Export names carry sessions and exist only in the
// hands of those who were given them, so there is nothing to list; the
// protocol has an answer for that.
func (n *negotiation) list(_ context.Context, opt wire.Option, data []byte) (*session, error) {
	if len(data) != 0 {
		return nil, n.refuse(opt, wire.RepErrInvalid, "NBD_OPT_LIST has no data")
	}
	return nil, n.refuse(opt, wire.RepErrPolicy, "exports are not listed; ask for one by name")
}
