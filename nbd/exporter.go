package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"xapi-nbd/nbd/wire"
)

// Exporter opens the devices of a [Server].
type Exporter interface {
	// Open opens the export with this name for one connection. The server calls it when
	// a client names an export, and closes the device that it returns. It is called
	// concurrently.
	//
	// ctx is done when the peer closes the connection or the server shuts down;
	// otherwise Open may take any time. If Open returns a [*Refusal], the peer gets its
	// text. Of any other error the peer learns only that there was one; the log gets
	// the error. A panic, or neither a device nor an error, counts as such an error.
	Open(ctx context.Context, peer Peer, name string) (Device, error)
}

// Export is one entry of the list that a [Lister] returns.
type Export struct{ Name, Description string }

// Lister is an [Exporter] whose exports may be listed. Without it NBD_OPT_LIST is refused
// with NBD_REP_ERR_POLICY.
type Lister interface {
	// List returns the exports for NBD_OPT_LIST. Its errors are treated like those of
	// Open. Many clients accept only some thousands of exports.
	List(ctx context.Context, peer Peer) ([]Export, error)
}

// Rechecker is an [Exporter] whose requirements can become stricter while a client is in the
// handshake.
type Rechecker interface {
	// Recheck is called before an option uses the export that an earlier option of the
	// same client, such as NBD_OPT_INFO, has opened under this name: Open is not called
	// again then. Its errors are treated like those of Open, and close the device. It is
	// called concurrently.
	Recheck(ctx context.Context, peer Peer, name string) error
}

// PublicNamer is an [Exporter] that knows which part of an export name may be logged.
// Without it the log lines of refusals name no export.
type PublicNamer interface {
	// PublicName returns the part of a name that identifies the export and is not
	// secret, "" if there is none. The name comes from a client and may be malformed.
	PublicName(name string) string
}

// Peer describes the client of a connection.
type Peer struct {
	ID     string               // identifies the connection, unique for its Server
	Remote net.Addr             // the address of the client
	TLS    *tls.ConnectionState // nil without TLS
}

// TLSMode is how a server treats TLS on one connection, section "TLS support".
type TLSMode int

// The modes.
const (
	NoTLS        TLSMode = iota // STARTTLS is refused
	SelectiveTLS                // STARTTLS is offered, but every export is served without it too
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
	ErrServerClosed  = errors.New("nbd: server closed") // of Serve after Shutdown
)

// Refusal is an error whose text is sent to the peer.
type Refusal struct {
	Kind   error  // ErrInvalid, ErrPolicy, ErrUnknownExport, ErrShutdown or ErrTLSRequired
	Text   string // for the peer, so it must hold no secrets
	Cause  error  // for the log only; may be nil
	Rule   string // names the reason in log and statistics, out of a small set; may be empty
	Remedy string // for the log only: how an administrator can remedy it; may be empty
}

// Refuse returns a [*Refusal] with this kind, which is one of the errors above, text and
// cause. cause may be nil.
func Refuse(kind error, text string, cause error) error {
	return &Refusal{Kind: kind, Text: text, Cause: cause}
}

// Error returns the text for the peer together with the cause. It is for the log.
func (r *Refusal) Error() string {
	if r.Cause == nil {
		return r.Text
	}
	return r.Text + ": " + r.Cause.Error()
}

// Unwrap makes errors.Is find the kind and the cause.
func (r *Refusal) Unwrap() []error { return []error{r.Kind, r.Cause} }

// refusalReply returns the error reply and its text for an error of an Exporter or of a
// TLSPolicy. All texts for refused peers come from here.
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
