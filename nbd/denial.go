package nbd

import (
	"errors"
	"log/slog"
	"strings"

	"xapi-nbd/nbd/wire"
)

// The rules by which a Server itself refuses options. They are keys of Totals.Refusals,
// like those that Exporter and TLSPolicy set in [Refusal].Rule.
const (
	RuleTLSRequired     = "tls_required"      // an option before STARTTLS where the mode is ForcedTLS
	RuleTLSNotAvailable = "tls_not_available" // STARTTLS where the mode is NoTLS
	RuleTLSPolicy       = "tls_policy"        // TLSPolicy returned an error that names no rule
	RuleConnLimit       = "connection_limit"  // Server.MaxConns
	RuleNoList          = "list"              // LIST, and the Exporter is no Lister
	RuleInvalidOption   = "invalid_option"    // a mistake of the client
	RuleStopping        = "stopping"          // Shutdown was called
	RuleOther           = "other"             // the Exporter returned an error that names no rule
)

// Rules returns the rules of the Server itself.
func Rules() []string {
	return []string{
		RuleTLSRequired, RuleTLSNotAvailable, RuleTLSPolicy, RuleConnLimit, RuleNoList, RuleInvalidOption, RuleStopping, RuleOther,
	}
}

// denial is the refusal of one option: its reply, its log line, and its count.
type denial struct {
	reply  wire.OptionReply
	text   string // for the peer, and for the log
	rule   string // "" for unknown options, which do not count as refused
	remedy string // for the log
	cause  error  // for the log; may be nil
}

// denialOf returns the denial for an error of an Exporter or a TLSPolicy. rule is for errors
// that have none.
func denialOf(err error, rule string) *denial {
	d := &denial{rule: rule}
	d.reply, d.text = refusalReply(err)
	var r *Refusal
	switch {
	case errors.Is(err, ErrServerClosed):
		d.rule = RuleStopping
	case errors.As(err, &r):
		d.cause, d.remedy = r.Cause, r.Remedy
		if r.Rule != "" {
			d.rule = r.Rule
		}
	default:
		d.cause = err
	}
	return d
}

// same reports whether d need not be logged after other: a client that is refused
// SET_META_CONTEXT usually sends GO next, which is refused for the same reason.
func (d *denial) same(other *denial) bool {
	return other != nil && d.rule == other.rule && d.text == other.text
}

// denied is the last refusal of a connection.
type denied struct {
	*denial
	opt    wire.Option
	name   string // of the export as the peer sent it, which may be secret; "" if it named none
	logged bool
}

// note counts and logs a refusal. Equal refusals in a row are counted and logged once.
func (n *negotiation) note(opt wire.Option, name string, d *denial) {
	n.c.srv.view.refused.add(d.reply)
	what := opt.String() + ": " + d.reply.String()
	if d.text != "" {
		what += ": " + d.text
	}
	n.c.setLastError(what)
	n.c.log.Debug("error reply", "opt", opt, "reply", d.reply, "text", d.text)
	if d.rule == "" {
		return
	}
	last := &n.c.denied
	if d.same(last.denial) && (name == "" || last.name == "" || name == last.name) {
		if last.name == "" {
			last.name = name
		}
		return
	}
	*last = denied{denial: d, opt: opt, name: name}
	n.c.srv.view.rules.add(d.rule)
	// A client that does not insist on TLS goes on without it, and is served.
	if d.rule != RuleTLSNotAvailable {
		n.c.logDenied()
	}
}

// logDenied logs the last refusal, unless it has been logged.
func (c *conn) logDenied() {
	d := &c.denied
	if d.denial == nil || d.logged {
		return
	}
	d.logged = true
	args := []any{"rule", d.rule, "opt", d.opt, "reply", d.reply}
	if export := c.srv.publicName(d.name); export != "" {
		args = append(args, "export", export)
	}
	if d.text != "" {
		args = append(args, "reason", d.text)
	}
	if cause := causeBeyond(d.text, d.cause); cause != "" {
		args = append(args, "cause", cause)
	}
	if d.remedy != "" {
		args = append(args, "remedy", d.remedy)
	}
	args = append(args, stackOf(d.cause)...)
	message := "option refused"
	switch d.opt {
	case wire.OptGo, wire.OptInfo, wire.OptExportName, wire.OptSetMetaContext, wire.OptListMetaContext:
		message = "export refused"
	default: // other options name no export
	}
	c.logBounded(slog.LevelWarn, d.rule, message, args...)
}

// publicName returns the part of an export name that may be logged, "" if that is not known.
func (s *Server) publicName(name string) string {
	p, ok := s.Exporter.(PublicNamer)
	if !ok || name == "" {
		return ""
	}
	public := ""
	if err := guard(func() { public = p.PublicName(name) }); err != nil {
		return ""
	}
	return wire.ProtocolString(public)
}

// causeBeyond returns the parts of a cause that the text does not have, so that a log line
// does not repeat itself.
func causeBeyond(text string, cause error) string {
	if cause == nil {
		return ""
	}
	var parts []string
	for part := range strings.SplitSeq(cause.Error(), ": ") {
		if !strings.Contains(text, part) {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}
