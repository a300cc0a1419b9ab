package nbd

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"

	"xapi-nbd/nbd/wire"
)

// infoOrGo answers NBD_OPT_INFO and NBD_OPT_GO, section "NBD_OPT_INFO and NBD_OPT_GO". The
// information replies and the ACK are sent in one write. The export that INFO opened stays
// open, so that a GO with the same name gets the same information.
func (n *negotiation) infoOrGo(ctx context.Context, opt wire.Option, data []byte) (*session, error) {
	req, err := wire.ParseInfoRequest(data)
	if err != nil {
		return nil, n.refuse(opt, wire.RepErrInvalid, err.Error())
	}
	if opt == wire.OptGo {
		// Before the export is opened: opening it may be expensive, and a connection
		// above the limit is refused anyway.
		if d := n.enter(); d != nil {
			return nil, n.deny(opt, req.Name, d)
		}
	}
	o, d := n.openSelected(ctx, req.Name)
	if d != nil {
		n.c.srv.leave(n.c)
		return nil, n.deny(opt, req.Name, d)
	}
	n.opened = o // so that release closes it after an error
	info := n.info(o)
	if err := n.c.writeHandshake(infoReplies(opt, req, &info)); err != nil {
		return nil, err
	}
	if opt == wire.OptInfo {
		return nil, nil
	}
	return n.session(req.Wants(wire.InfoBlockSize)), nil
}

// infoReplies returns the replies to a successful INFO or GO: each kind of information that
// was asked for once, except unknown kinds, then the ACK.
func infoReplies(opt wire.Option, req wire.InfoRequest, info *wire.ExportInfo) []byte {
	var b, data []byte
	add := func(i wire.Info) {
		data = info.AppendInfo(data[:0], i)
		b = wire.AppendOptionReply(b, opt, wire.RepInfo, data)
	}
	add(wire.InfoExport)
	if req.Wants(wire.InfoName) {
		add(wire.InfoName)
	}
	if req.Wants(wire.InfoDescription) && info.Description != "" {
		add(wire.InfoDescription)
	}
	if req.Wants(wire.InfoBlockSize) {
		add(wire.InfoBlockSize)
	}
	return wire.AppendOptionReply(b, opt, wire.RepAck, nil)
}

// validString returns an error if s is no protocol string, section "Values".
// The string itself stays out of the error: export names may be secrets.
func validString(s string) error {
	switch {
	case len(s) > wire.MaxString:
		return errors.New("the export name is longer than 4096 bytes")
	case !utf8.ValidString(s):
		return errors.New("the export name is not valid UTF-8")
	case strings.ContainsRune(s, 0):
		return errors.New("the export name contains a NUL byte")
	}
	return nil
}

func itoa(n int) string { return strconv.Itoa(n) }
