package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"

	"xapi-nbd/nbd/wire"
)

const (
	// maxReplyData is the largest option reply in bytes: a name and a text of 4096
	// bytes each, with their lengths.
	maxReplyData = 2*wire.MaxString + 64
	// maxReplies is the largest number of replies to one INFO or GO. The protocol
	// has four kinds of information; later versions may have more.
	maxReplies = 64
)

// greet reads the server's greeting and answers with the client flags, section "Newstyle
// negotiation".
func (c *Client) greet() error {
	var b [wire.GreetingLen]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		return fmt.Errorf("no greeting from the server: %w", connError{err})
	}
	offered, err := wire.ParseGreeting(&b)
	if err != nil {
		return fmt.Errorf("not a newstyle NBD server: %w", err)
	}
	if offered&wire.FlagFixedNewstyle != 0 {
		c.fixed = true
		c.flags |= wire.FlagCFixedNewstyle
	}
	if offered&wire.FlagNoZeroes != 0 {
		c.flags |= wire.FlagCNoZeroes
	}
	if _, err = c.nc.Write(wire.AppendClientFlags(nil, c.flags)); err != nil {
		return fmt.Errorf("cannot answer the greeting: %w", connError{err})
	}
	return nil
}

// startTLS upgrades the connection, section "NBD_OPT_STARTTLS". It reads exactly the
// reply and no more: plaintext that an attacker has put behind the reply goes to the TLS
// handshake, which fails, and not into a buffer from which it would be read later.
func (c *Client) startTLS(ctx context.Context, cfg *tls.Config) error {
	if err := c.simpleOption(wire.OptStartTLS); err != nil {
		return err
	}
	t := tls.Client(c.nc, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", connError{err})
	}
	state := t.ConnectionState()
	c.nc, c.tlsState = t, &state
	return nil
}

// chooseReplies asks for extended headers and then for structured replies, as far as the
// configuration allows it. A refusal for any reason means no more than that the server
// does not offer them now: a server that requires TLS refuses GO too.
func (c *Client) chooseReplies() error {
	if !c.fixed || c.cfg.NoStructured {
		return nil
	}
	wanted := []struct {
		opt  wire.Option
		mode replyMode
	}{{wire.OptExtendedHeaders, extendedHeaders}, {wire.OptStructuredReply, structuredReplies}}
	if c.cfg.NoExtended {
		wanted = wanted[1:]
	}
	for _, w := range wanted {
		err := c.simpleOption(w.opt)
		switch {
		case err == nil:
			c.mode = w.mode
			return nil
		case !isRefused(err) || isReply(err, wire.RepErrShutdown):
			return err
		}
	}
	return nil
}

// simpleOption sends an option without data to which the server replies with an ACK or a
// refusal.
func (c *Client) simpleOption(opt wire.Option) error {
	return c.ask(opt, nil, 0, func(typ wire.OptionReply, data []byte) error {
		return replyError(opt, typ, data)
	})
}

// ask sends an option and calls take for each reply until the ACK or a refusal. It fails
// after more than limit replies; a limit of 0 means no limit.
func (c *Client) ask(opt wire.Option, data []byte, limit int, take func(typ wire.OptionReply, data []byte) error) error {
	if _, err := c.nc.Write(wire.AppendOption(nil, opt, data)); err != nil {
		return fmt.Errorf("%v: %w", opt, connError{err})
	}
	for n := 0; ; n++ {
		typ, data, err := c.readReply(opt)
		switch {
		case err != nil:
			return err
		case typ == wire.RepAck:
			return nil
		case typ.IsError():
			return replyError(opt, typ, data)
		case n >= limit && limit > 0:
			return fmt.Errorf("%v: endless replies, more than %d", opt, limit)
		}
		if err := take(typ, data); err != nil {
			return err
		}
	}
}

// readReply reads one option reply and checks that it answers opt.
func (c *Client) readReply(opt wire.Option) (wire.OptionReply, []byte, error) {
	var b [wire.OptionReplyHeaderLen]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		return 0, nil, fmt.Errorf("%v: no answer: %w", opt, connError{err})
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
		return 0, nil, fmt.Errorf("%v: answer cut short: %w", opt, connError{err})
	}
	return hdr.Type, data, nil
}

// replyError returns the error for a reply that is neither the ACK nor expected: an
// [*Error] if the reply is a refusal.
func replyError(opt wire.Option, typ wire.OptionReply, data []byte) error {
	if !typ.IsError() {
		return fmt.Errorf("%v: unexpected reply %v", opt, typ)
	}
	return &Error{Op: opt.String(), Reply: typ, Text: wire.ProtocolString(string(data))}
}

// isRefused reports whether err means that the server refused an option. It then waits
// for the next option.
func isRefused(err error) bool {
	var refused *Error
	return errors.As(err, &refused)
}

// isReply reports whether err means that the server refused an option with a reply of
// that type.
func isReply(err error, typ wire.OptionReply) bool {
	var refused *Error
	return errors.As(err, &refused) && refused.Reply == typ
}
