package nbd

import (
	"context"
	"errors"

	"xapi-nbd/nbd/wire"
)

// Limits of the handshake, in bytes.
const (
	// maxOptionData limits the data of one option that is stored: a name of 4096 bytes
	// with two thousand information requests, or with long metadata queries. Longer data
	// is skipped and the option is refused.
	maxOptionData = 8 << 10
	// maxSkippedData limits the data that is skipped. If there is more the connection is
	// closed.
	maxSkippedData = 64 << 10
)

// negotiation is the state of the handshake of one connection. NBD_OPT_STARTTLS resets it,
// section "Protocol phases": nothing that was negotiated before TLS remains.
type negotiation struct {
	c     *conn
	flags wire.ClientFlags
	tls   bool

	mode    TLSMode
	modeErr error
	settled bool // mode and modeErr are set

	replies  replyMode
	selected selection
	opened   *opened // the export that the last option opened; nil if none
}

// negotiate performs the handshake. It returns the session to serve, nil after
// NBD_OPT_ABORT, or an error.
func (c *conn) negotiate(ctx context.Context) (*session, error) {
	if err := c.writeHandshake(wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)); err != nil {
		return nil, err
	}
	var b [4]byte
	if err := c.readHandshake(b[:]); err != nil {
		return nil, err
	}
	flags := wire.ParseClientFlags(&b)
	if unknown := flags &^ (wire.FlagCFixedNewstyle | wire.FlagCNoZeroes); unknown != 0 {
		return nil, hardDisconnect("unknown client flags "+unknown.String(), nil)
	}
	n := &negotiation{c: c, flags: flags}
	defer func() { n.release() }()
	for range c.srv.limits.Load().MaxOptions {
		sess, err := n.option(ctx)
		if errors.Is(err, errAborted) {
			return nil, nil
		}
		if sess != nil || err != nil {
			return sess, err
		}
	}
	return nil, hardDisconnect("too many options in one handshake", nil)
}

// option reads one option and answers it. The handshake ends if it returns a session or an
// error.
func (n *negotiation) option(ctx context.Context) (*session, error) {
	var b [wire.OptionHeaderLen]byte
	if err := n.c.readHandshake(b[:]); err != nil {
		return nil, err
	}
	hdr, err := wire.ParseOptionHeader(&b)
	if err != nil {
		return nil, hardDisconnect("not an option", err)
	}
	n.c.log.Debug("option", "opt", hdr.Option, "length", hdr.Length)
	if hdr.Option != wire.OptAbort {
		n.settleMode(ctx)
	}
	if hdr.Length > maxOptionData {
		return nil, n.skip(hdr)
	}
	data := make([]byte, hdr.Length)
	if err := n.c.readHandshake(data); err != nil {
		return nil, err
	}
	if handled, err := n.gate(hdr.Option, data); handled || err != nil {
		return nil, err
	}
	handle, ok := optionHandlers[hdr.Option]
	if !ok {
		return nil, n.refuse(hdr.Option, wire.RepErrUnsup, "")
	}
	return handle(n, ctx, hdr.Option, data)
}

// optionHandlers have a function for each option, which gets all of its data and sends the
// reply. The handshake ends if it returns a session or an error.
var optionHandlers = map[wire.Option]func(n *negotiation, ctx context.Context, opt wire.Option, data []byte) (*session, error){
	wire.OptExportName: (*negotiation).exportName,
	wire.OptAbort:      (*negotiation).abort,
	wire.OptList:       (*negotiation).list,
	wire.OptStartTLS:   (*negotiation).startTLS,
	wire.OptInfo:       (*negotiation).infoOrGo,
	wire.OptGo:         (*negotiation).infoOrGo,

	wire.OptStructuredReply: (*negotiation).structuredReply,
	wire.OptExtendedHeaders: (*negotiation).extendedHeaders,
	wire.OptListMetaContext: (*negotiation).metaContext,
	wire.OptSetMetaContext:  (*negotiation).metaContext,
}

// settleMode asks the TLS policy, once for each connection: section "TLS support" forbids
// changing the mode later.
func (n *negotiation) settleMode(ctx context.Context) {
	if n.settled {
		return
	}
	n.settled = true
	policy := n.c.srv.TLSPolicy
	if policy == nil {
		return
	}
	ctx, done := n.c.watchPeer(ctx)
	defer done()
	if err := guard(func() { n.mode, n.modeErr = policy(ctx, n.c.peer) }); err != nil {
		n.modeErr = err
	}
	if n.modeErr != nil && errors.Is(context.Cause(ctx), errPeerGone) {
		n.modeErr = errPeerGone
		n.c.kill(hardDisconnect("peer hung up", nil))
	}
	if n.modeErr == nil && n.mode != NoTLS && n.c.srv.TLSConfig == nil {
		n.modeErr = Refuse(ErrPolicy, "TLS is wanted and not configured", nil)
	}
}

// gate refuses an option that is not permitted at this point. It reports whether it has
// sent a reply.
func (n *negotiation) gate(opt wire.Option, data []byte) (handled bool, err error) {
	if opt == wire.OptAbort {
		return false, nil
	}
	d := n.barred(opt)
	if d == nil {
		return false, nil
	}
	return true, n.deny(opt, exportNameIn(opt, data), d)
}

// barred returns the denial of an option that is not permitted at this point, otherwise
// nil.
func (n *negotiation) barred(opt wire.Option) *denial {
	switch {
	case n.c.isStopped():
		return &denial{reply: wire.RepErrShutdown, rule: RuleStopping}
	case errors.Is(n.modeErr, errPeerGone):
		return &denial{reply: wire.RepErrUnknown} // which is not sent
	case n.modeErr != nil:
		return denialOf(n.modeErr, RuleTLSPolicy)
	case n.mode == ForcedTLS && !n.tls && opt != wire.OptStartTLS:
		return &denial{
			reply: wire.RepErrTLSReqd, text: "send NBD_OPT_STARTTLS first", rule: RuleTLSRequired,
			remedy: "have the client use TLS: nbds:// instead of nbd://, or its option for TLS",
		}
	}
	return nil
}

// exportNameIn returns the name of the export in the data of an option, "" if there is none.
func exportNameIn(opt wire.Option, data []byte) string {
	switch opt {
	case wire.OptExportName:
		return string(data)
	case wire.OptGo, wire.OptInfo:
		if req, err := wire.ParseInfoRequest(data); err == nil {
			return req.Name
		}
	case wire.OptSetMetaContext, wire.OptListMetaContext:
		if req, err := wire.ParseMetaContextRequest(data); err == nil {
			return req.Export
		}
	default: // other options name no export
	}
	return ""
}

// skip reads and drops the data of an option that is too long, and refuses the option.
func (n *negotiation) skip(hdr wire.OptionHeader) error {
	if hdr.Option == wire.OptExportName || hdr.Length > maxSkippedData {
		return hardDisconnect("option data is too long: "+hdr.Option.String(), nil)
	}
	if hdr.Option == wire.OptSetMetaContext {
		n.selected = selection{} // a failed SET selects nothing too
	}
	var b [512]byte
	for left := hdr.Length; left > 0; {
		chunk := b[:min(left, uint32(len(b)))]
		if err := n.c.readHandshake(chunk); err != nil {
			return err
		}
		left -= uint32(len(chunk))
	}
	if hdr.Option == wire.OptAbort {
		return n.acknowledgeAbort()
	}
	if handled, err := n.gate(hdr.Option, nil); handled || err != nil {
		return err
	}
	return n.refuse(hdr.Option, wire.RepErrTooBig, "option data is too long")
}

// reply sends one reply without data.
func (n *negotiation) reply(opt wire.Option, typ wire.OptionReply) error {
	return n.c.writeHandshake(wire.AppendOptionReply(nil, opt, typ, nil))
}

// refuse refuses an option that is unknown or that the client should not have sent. The
// handshake continues.
func (n *negotiation) refuse(opt wire.Option, typ wire.OptionReply, text string) error {
	d := &denial{reply: typ, text: text}
	if typ != wire.RepErrUnsup {
		d.rule, d.remedy = RuleInvalidOption, "correct the client"
	}
	return n.deny(opt, "", d)
}

// deny refuses an option. The handshake continues, except after EXPORT_NAME, which has no
// error reply: the error ends the connection.
func (n *negotiation) deny(opt wire.Option, name string, d *denial) error {
	n.note(opt, name, d)
	if opt != wire.OptExportName {
		return n.c.writeHandshake(wire.AppendOptionReply(nil, opt, d.reply, []byte(d.text)))
	}
	reason := "NBD_OPT_EXPORT_NAME refused (" + d.reply.String() + ")"
	if d.text != "" {
		return hardDisconnect(reason, errors.New(d.text))
	}
	return hardDisconnect(reason, nil)
}

// enter takes one of MaxConns, or returns the denial.
func (n *negotiation) enter() *denial {
	if n.c.srv.enter(n.c) {
		return nil
	}
	return &denial{
		reply: wire.RepErrPolicy, rule: RuleConnLimit,
		text:   "connection limit reached: max_connections is " + itoa(n.c.srv.limits.Load().MaxConns),
		remedy: "wait for others to end, or raise max_connections",
	}
}
