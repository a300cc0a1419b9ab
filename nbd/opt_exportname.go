package nbd

import (
	"context"
	"strings"

	"xapi-nbd/nbd/wire"
)

// exportName answers NBD_OPT_EXPORT_NAME, the oldest way to begin the transmission phase
// and the only one that Xen Orchestra uses. It has no error reply: to refuse it the server
// closes the connection, and the log has the reason. The reply is sent in one write,
// because clients read it with one call.
func (n *negotiation) exportName(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	name := string(data)
	if n.c.srv.ForgiveNUL {
		name = strings.TrimSuffix(name, "\x00")
	}
	if d := n.enter(); d != nil {
		return nil, n.deny(opt, name, d)
	}
	o, d := n.openSelected(ctx, name)
	if d != nil {
		return nil, n.deny(opt, name, d)
	}
	n.opened = o // so that release closes it after an error
	zeroes := n.flags&wire.FlagCNoZeroes == 0
	info := n.info(o)
	if err := n.c.writeHandshake(wire.AppendExportNameReply(nil, info.Size, info.Flags, zeroes)); err != nil {
		return nil, err
	}
	return n.session(false), nil
}
