package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"

	"xapi-nbd/nbd/wire"
)

const (
	// maxReplyData bounds one option reply: a name and a text of 4096 bytes
	// each.
	maxReplyData = 2*wire.MaxString + 64
	// maxReplies bounds the replies to one GO: there are four kinds of
	// information, and room for those to come.
	maxReplies = 64
)

// greet reads the server's greeting and answers it, section "Newstyle
// negotiation".
func (c *Client) greet() error {
	var b [wire.GreetingLen]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		return fmt.Errorf("no greeting from the server: %w", err)
	}
	offered, err := wire.ParseGreeting(&b)
	if err != nil {
		return fmt.Errorf("not a newstyle NBD server: %w", err)
	}
	if offered&wire.FlagFixedNewstyle == 0 {
		return errors.New("the server does not speak fixed newstyle")
	}
	c.flags = wire.FlagCFixedNewstyle
	if offered&wire.FlagNoZeroes != 0 {
		c.flags |= wire.FlagCNoZeroes
	}
	_, err = c.nc.Write(wire.AppendClientFlags(nil, c.flags))
	return err
}

// startTLS upgrades the connection, section "NBD_OPT_STARTTLS".
func (c *Client) startTLS(ctx context.Context, cfg *tls.Config) error {
	if _, err := c.nc.Write(wire.AppendOption(nil, wire.OptStartTLS, nil)); err != nil {
		return err
	}
	typ, data, err := c.readReply(wire.OptStartTLS)
	if err != nil {
		return err
	}
	if typ != wire.RepAck {
		return replyError(wire.OptStartTLS, typ, data)
	}
	t := tls.Client(c.nc, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	c.nc = t
	return nil
}

// optGo sends NBD_OPT_GO and collects the information until the ACK.
func (c *Client) optGo(name string) (*wire.ExportInfo, error) {
	req := wire.InfoRequest{Name: name, Infos: []wire.Info{wire.InfoBlockSize, wire.InfoDescription}}
	if _, err := c.nc.Write(wire.AppendOption(nil, wire.OptGo, req.Append(nil))); err != nil {
		return nil, err
	}
	var info wire.ExportInfo
	known := false
	for range maxReplies {
		typ, data, err := c.readReply(wire.OptGo)
		switch {
		case err != nil:
			return nil, err
		case typ == wire.RepAck && !known:
			return nil, errors.New("NBD_OPT_GO: server acknowledged without NBD_INFO_EXPORT")
		case typ == wire.RepAck:
			return &info, nil
		case typ != wire.RepInfo:
			return nil, replyError(wire.OptGo, typ, data)
		}
		kind, err := info.ParseInfo(data)
		if err != nil {
			return nil, fmt.Errorf("NBD_OPT_GO: %w", err)
		}
		known = known || kind == wire.InfoExport
	}
	return nil, errors.New("NBD_OPT_GO: endless replies")
}

// readReply reads one option reply and checks that it answers opt.
func (c *Client) readReply(opt wire.Option) (wire.OptionReply, []byte, error) {
	var b [wire.OptionReplyHeaderLen]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		return 0, nil, fmt.Errorf("%v: no answer: %w", opt, err)
	}
	hdr, err := wire.ParseOptionReplyHeader(&b)
	switch {
	case err != nil:
		return 0, nil, fmt.Errorf("%v: %w", opt, err)
	case hdr.Option != opt:
		return 0, nil, fmt.Errorf("%v: server answered another option, %v", opt, hdr.Option)
	case hdr.Length > maxReplyData:
		return 0, nil, fmt.Errorf("%v: reply of %d bytes is too long", opt, hdr.Length)
	case hdr.Type == wire.RepAck && hdr.Length != 0:
		return 0, nil, fmt.Errorf("%v: NBD_REP_ACK with data", opt)
	}
	data := make([]byte, hdr.Length)
	if _, err := io.ReadFull(c.nc, data); err != nil {
		return 0, nil, fmt.Errorf("%v: answer cut short: %w", opt, err)
	}
	return hdr.Type, data, nil
}

// replyError is what a reply means that is neither the ACK nor expected.
func replyError(opt wire.Option, typ wire.OptionReply, data []byte) error {
	if !typ.IsError() {
		return fmt.Errorf("%v: unexpected reply %v", opt, typ)
	}
	return &Error{Op: opt.String(), Reply: typ, Text: protocolString(string(data))}
}
