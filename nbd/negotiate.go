package nbd

import (
	"context"
	"errors"
	"fmt"

	"xapi-nbd/nbd/wire"
)

// Limits of the haggling phase.
const (
	// maxOptionData bounds the data of one option in memory: a name of 4096
	// bytes with two thousand information requests, or with long metadata
	// queries, fits. Longer data is skipped, not stored.
	maxOptionData = 8 << 10
	// maxSkippedData bounds what is skipped; a peer that announces more is
	// not haggling.
	maxSkippedData = 64 << 10
)

// negotiation is the state of one connection's haggling phase. STARTTLS starts
// it anew, section "Protocol phases": nothing that was agreed in the clear
// survives.
type negotiation struct {
	c     *conn
	flags wire.ClientFlags
	tls   bool

	mode    TLSMode
	modeErr error
	settled bool // mode and modeErr hold

	replies  replyMode
	selected selection
	opened   *opened // what the last INFO or the like opened, nil if nothing
}

// opened is an export that was opened for a name.
type opened struct {
	name   string
	device Device
	can    capabilities
	static wire.ExportInfo // but for the flags, which depend on the negotiation
}

// negotiate greets and haggles. It returns the session to serve, nil after
// NBD_OPT_ABORT, or why there is none.
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
	for range c.srv.MaxOptions {
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

// option reads one option and answers it. A session ends the haggling, and so
// does an error.
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
	if handled, err := n.gate(hdr.Option); handled || err != nil {
		return nil, err
	}
	handle, ok := optionHandlers[hdr.Option]
	if !ok {
		return nil, n.refuse(hdr.Option, wire.RepErrUnsup, "")
	}
	return handle(n, ctx, hdr.Option, data)
}

// optionHandlers serve one option each. They get the whole data and answer; a
// session or an error ends the haggling.
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

// settleMode asks the TLS policy, once in a connection's life: section "TLS
// support" forbids to change the mode on the way.
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
	if n.modeErr == nil && n.mode != NoTLS && n.c.srv.TLSConfig == nil {
		n.modeErr = Refuse(ErrPolicy, "TLS is wanted and not configured", nil)
	}
	if n.modeErr != nil {
		n.c.log.With(stackOf(n.modeErr)...).Warn("every option of this connection is refused", "reason", n.modeErr)
	}
}

// gate refuses what may not be answered at all at this point. It reports
// whether it answered.
func (n *negotiation) gate(opt wire.Option) (handled bool, err error) {
	if opt == wire.OptAbort {
		return false, nil
	}
	reply, text := n.barred(opt)
	if reply == 0 {
		return false, nil
	}
	if opt == wire.OptExportName {
		return true, n.drop(reply, text)
	}
	return true, n.refuse(opt, reply, text)
}

// barred says with which error the option must be refused whatever it is, 0 if
// with none.
func (n *negotiation) barred(opt wire.Option) (wire.OptionReply, string) {
	switch {
	case n.c.isStopped():
		return wire.RepErrShutdown, ""
	case n.modeErr != nil:
		return refusalReply(n.modeErr)
	case n.mode == ForcedTLS && !n.tls && opt != wire.OptStartTLS:
		return wire.RepErrTLSReqd, "send NBD_OPT_STARTTLS first"
	}
	return 0, ""
}

// skip answers an option whose data is too long to be looked at.
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
	if handled, err := n.gate(hdr.Option); handled || err != nil {
		return err
	}
	return n.refuse(hdr.Option, wire.RepErrTooBig, "option data is too long")
}

// reply sends one reply without data.
func (n *negotiation) reply(opt wire.Option, typ wire.OptionReply) error {
	return n.c.writeHandshake(wire.AppendOptionReply(nil, opt, typ, nil))
}

// refuse sends an error reply; the haggling goes on.
func (n *negotiation) refuse(opt wire.Option, typ wire.OptionReply, text string) error {
	n.c.log.Debug("option refused", "opt", opt, "reply", typ, "text", text)
	n.noteRefusal(opt, typ, text)
	return n.c.writeHandshake(wire.AppendOptionReply(nil, opt, typ, []byte(text)))
}

// noteRefusal keeps a refusal for those who look.
func (n *negotiation) noteRefusal(opt wire.Option, typ wire.OptionReply, text string) {
	n.c.srv.view.refused.add(typ)
	what := opt.String() + ": " + typ.String()
	if text != "" {
		what += ": " + text
	}
	n.c.troubled(what)
}

// drop ends the session where EXPORT_NAME has no way to say no.
func (n *negotiation) drop(typ wire.OptionReply, text string) error {
	n.noteRefusal(wire.OptExportName, typ, text)
	reason := "NBD_OPT_EXPORT_NAME refused (" + typ.String() + ")"
	if text != "" {
		return hardDisconnect(reason, errors.New(text))
	}
	return hardDisconnect(reason, nil)
}

// open opens the export for the peer, or takes what an INFO of the same name
// opened before. On failure it returns the error reply to send.
func (n *negotiation) open(ctx context.Context, opt wire.Option, name string) (o *opened, reply wire.OptionReply, text string) {
	if n.opened != nil && n.opened.name == name {
		o, n.opened = n.opened, nil
		return o, 0, ""
	}
	n.release()
	if err := validString(name); err != nil {
		return nil, wire.RepErrInvalid, err.Error()
	}
	ctx, done := n.c.watchPeer(ctx)
	o, err := n.openDevice(ctx, name)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	done()
	if err != nil {
		reply, text = refusalReply(err)
		n.c.log.With(stackOf(err)...).Warn("export refused", "opt", opt, "reply", reply, "reason", err)
		return nil, reply, text
	}
	return o, 0, ""
}

// openDevice calls the Exporter and asks the device for all that does not change.
func (n *negotiation) openDevice(ctx context.Context, name string) (*opened, error) {
	if n.c.srv.Exporter == nil {
		return nil, errors.New("the server has no Exporter")
	}
	o := &opened{name: name}
	var err error
	if perr := guard(func() { o.device, err = n.c.srv.Exporter.Open(ctx, n.c.peer, name) }); perr != nil {
		return nil, perr
	}
	if err == nil && o.device == nil {
		err = errors.New("the Exporter returned neither a device nor an error")
	}
	if err != nil {
		return nil, err
	}
	err = guard(func() { o.can, o.static = capabilitiesOf(o.device), exportInfo(o.device, name) })
	if err == nil && o.device.Size() < 0 {
		err = fmt.Errorf("the device has a size of %d bytes", o.device.Size())
	}
	if err != nil {
		n.c.closeDevice(o.device)
		return nil, err
	}
	return o, nil
}

// info is what can be told of an export at this point of the negotiation.
func (n *negotiation) info(o *opened) wire.ExportInfo {
	info := o.static
	info.Flags = o.can.transmissionFlags(n.replies)
	return info
}

// release closes what an INFO opened and no GO took.
func (n *negotiation) release() {
	if n.opened == nil {
		return
	}
	n.c.closeDevice(n.opened.device)
	n.opened = nil
}

// exportInfo asks the device everything that does not change, once.
func exportInfo(d Device, name string) wire.ExportInfo {
	info := wire.ExportInfo{
		Size:       uint64(d.Size()),
		Name:       name,
		BlockSizes: blockSizesOf(d),
	}
	if n, ok := unwrap(d).(Namer); ok {
		info.Name = protocolString(n.CanonicalName())
	}
	if t, ok := unwrap(d).(Describer); ok {
		info.Description = protocolString(t.Description())
	}
	return info
}

// enter takes one of MaxConns, or says why not.
func (n *negotiation) enter() (wire.OptionReply, string) {
	if n.c.srv.enter(n.c) {
		return 0, ""
	}
	n.c.srv.view.full.Add(1)
	text := "connection limit reached: max_connections is " + itoa(n.c.srv.limits.Load().MaxConns)
	n.c.log.Warn("export refused", "reason", text)
	return wire.RepErrPolicy, text
}
