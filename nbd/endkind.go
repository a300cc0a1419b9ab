package nbd

import (
	"errors"
	"strings"

	"xapi-nbd/nbd/internal/neterr"
)

// endKinds maps the reasons why connections end, by their beginnings, to kinds. Kinds are
// for statistics, reasons for the log.
var endKinds = []struct{ reason, kind string }{
	{"connection lost without NBD_CMD_DISC", EndLost},
	{"connection lost inside a payload", EndLost},
	{"connection lost inside the payload of a refused request", EndLost},
	{"cannot send a reply", EndLost},
	{"peer hung up", EndLost},
	{"idle: ", EndIdle},
	{"negotiated, but not a single request", EndIdle},
	{"the peer does not read its replies", EndStuck},
	{stuckReason, EndStuck},
	{"the device has ended", EndDevice},
	{"the device failed after the reply had begun", EndDevice},
	{"disconnected by the administrator", EndAdmin},
	{"not drained in time", EndStopped},
	{"handshake timeout", EndHandshakeTimeout},
	{"TLS handshake failed", EndTLS},
	{"the peer sent data before STARTTLS was answered", EndProtocol},
	{"too many bytes in one handshake", EndProtocol},
	{"too many options in one handshake", EndProtocol},
	{"unknown client flags", EndProtocol},
	{"not an option", EndProtocol},
	{"option data is too long", EndProtocol},
	{"not a request", EndProtocol},
	{"the payload of a request is too long", EndProtocol},
	{"too many connections wait for their handshake", EndCrowded},
	{"made room for a newer connection", EndCrowded},
	{"NBD_OPT_EXPORT_NAME refused", EndRefused},
}

// The kinds of ends of connections: the keys of Totals.Ends.
const (
	EndDisconnect       = "disconnect"        // NBD_CMD_DISC or NBD_OPT_ABORT
	EndLost             = "lost"              // the peer or the network is gone
	EndIdle             = "idle"              // IdleTimeout or FirstRequestTimeout
	EndStuck            = "stuck"             // the peer does not read its replies
	EndDevice           = "device"            // the device was revoked, or failed inside a reply
	EndAdmin            = "administrator"     // Server.Disconnect
	EndStopped          = "stopped"           // Server.Shutdown
	EndHandshakeTimeout = "handshake_timeout" // HandshakeTimeout
	EndTLS              = "tls_failed"        // the TLS handshake failed
	EndProtocol         = "protocol"          // the peer broke the protocol
	EndCrowded          = "crowded"           // too many connections were in the handshake
	EndRefused          = "refused"           // EXPORT_NAME was refused
	EndOther            = "other"
)

// TransferEnds returns the kinds by which a transmission can end.
func TransferEnds() []string {
	return []string{EndDisconnect, EndLost, EndIdle, EndStuck, EndDevice, EndAdmin, EndStopped, EndProtocol, EndOther}
}

// endKind returns the kind of an end, from the error that [Server.ServeConn] returns.
func endKind(err error) string {
	if err == nil {
		return EndDisconnect
	}
	if errors.Is(err, ErrServerClosed) {
		return EndStopped
	}
	for _, e := range endKinds {
		if strings.HasPrefix(err.Error(), e.reason) {
			return e.kind
		}
	}
	if neterr.IsGone(err) {
		return EndLost
	}
	return EndOther
}
