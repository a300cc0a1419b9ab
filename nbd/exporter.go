package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"xapi-nbd/nbd/wire"
)

// Exporter turns export names into devices.
type Exporter interface {
	// Open is called for INFO, GO and EXPORT_NAME. The device it returns
	// belongs to the connection, which closes it.
	//
	// ctx ends when the peer goes away or the server shuts down; Open may
	// take as long as it likes otherwise. To refuse with a text for the peer
	// it returns a [*Refusal]; of any other error the peer learns nothing but
	// that there was one, and the log everything. A panic counts as such an error, and
	// so does to return neither a device nor an error.
	Open(ctx context.Context, peer Peer, name string) (Device, error)
}

// Export is one entry of the list that a [Lister] returns.
type Export struct{ Name, Description string }

// Lister is an Exporter whose exports may be listed. Without it NBD_OPT_LIST is
// refused by policy.
type Lister interface {
	// List is called for NBD_OPT_LIST. Its errors are treated as those of Open.
	// More than some thousands of exports are more than clients take.
	List(ctx context.Context, peer Peer) ([]Export, error)
}

// PublicNamer is an Exporter that knows what may be shown of the names that
// clients ask for. Without it the log of a refusal names no export.
type PublicNamer interface {
	// PublicName returns the part of an export name that is no secret and names
	// the export, "" if there is none. The name may be malformed.
	PublicName(name string) string
}

// Peer is the other end of a connection.
type Peer struct {
	ID     string               // of the connection, unique in this process
	Remote net.Addr             // where it comes from
	TLS    *tls.ConnectionState // nil in the clear
}

// TLSMode says how a server treats TLS, section "TLS support".
type TLSMode int

// The modes.
const (
	NoTLS        TLSMode = iota // STARTTLS is refused
	SelectiveTLS                // STARTTLS is offered, every export also in the clear
	ForcedTLS                   // nothing but STARTTLS and ABORT before TLS
)

func (m TLSMode) String() string {
	switch m {
	case NoTLS:
		return "NOTLS"
	case SelectiveTLS:
		return "SELECTIVETLS"
	case ForcedTLS:
		return "FORCEDTLS"
	}
	return "invalid TLS mode"
}

// The kinds of refusal. An Exporter gives one of them to [Refuse].
var (
	ErrInvalid       = errors.New("invalid request")    // NBD_REP_ERR_INVALID
	ErrPolicy        = errors.New("refused")            // NBD_REP_ERR_POLICY
	ErrUnknownExport = errors.New("no such export")     // NBD_REP_ERR_UNKNOWN
	ErrShutdown      = errors.New("shutting down")      // NBD_REP_ERR_SHUTDOWN
	ErrTLSRequired   = errors.New("TLS is required")    // NBD_REP_ERR_TLS_REQD
	errPeerGone      = errors.New("peer hung up")       // while its export was being opened
	ErrServerClosed  = errors.New("nbd: server closed") // what Serve returns after Shutdown
)

// Refusal is an error whose text goes to the peer.
type Refusal struct {
	Kind   error  // one of the kinds above
	Text   string // for the peer: no secrets
	Cause  error  // for the log only; may be nil
	Rule   string // one of a small set, for log and statistics; "" if there is none
	Remedy string // for the log only: what can be done about it; may be empty
}

// Refuse makes a [*Refusal] of one of the kinds above, the text for the peer,
// and the cause for the log, which may be nil.
func Refuse(kind error, text string, cause error) error {
	return &Refusal{Kind: kind, Text: text, Cause: cause}
}

// Error is the text for the log: what the peer sees and the cause behind it.
func (r *Refusal) Error() string {
	if r.Cause == nil {
		return r.Text
	}
	return r.Text + ": " + r.Cause.Error()
}

// Unwrap makes errors.Is find the kind and the cause.
func (r *Refusal) Unwrap() []error { return []error{r.Kind, r.Cause} }

// refusalReply translates what an Exporter or a TLS policy returned into an
// error reply. It is the only place that decides what a refused peer learns.
func refusalReply(err error) (wire.OptionReply, string) {
	if errors.Is(err, ErrServerClosed) {
		return wire.RepErrShutdown, ""
	}
	var r *Refusal
	if !errors.As(err, &r) {
		return wire.RepErrUnknown, "the export cannot be opened; the server's log says why"
	}
	text := wire.ProtocolString(r.Text)
	switch {
	case errors.Is(r.Kind, ErrInvalid):
		return wire.RepErrInvalid, text
	case errors.Is(r.Kind, ErrPolicy):
		return wire.RepErrPolicy, text
	case errors.Is(r.Kind, ErrShutdown):
		return wire.RepErrShutdown, text
	case errors.Is(r.Kind, ErrTLSRequired):
		return wire.RepErrTLSReqd, text
	}
	return wire.RepErrUnknown, text
}
