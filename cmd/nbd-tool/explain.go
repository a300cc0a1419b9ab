package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// explain adds the server and a hint to an error.
func (t *target) explain(err error) error {
	return fmt.Errorf("%s: %w%s", t.uri.Server(), err, t.hint(err))
}

// hint returns advice for an error, in parentheses and after a space, or "".
func (t *target) hint(err error) string {
	var (
		refused *client.Error
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		stalled *client.StallError
		lost    *client.LostError
		hint    string
	)
	switch {
	case errors.As(err, &refused) && refused.Reply == wire.RepErrTLSReqd:
		hint = "use " + strings.Replace(t.uri.Server(), "nbd", "nbds", 1) + ", or --host without --no-tls"
	case errors.As(err, &refused) && refused.Op == wire.OptStartTLS.String():
		hint = "without TLS, readable on the way: nbd in place of nbds, or --no-tls"
	case errors.As(err, &unknown):
		hint = "--tls-ca FILE names whom to trust"
	case errors.As(err, &name):
		hint = "--tls-hostname NAME, or tls-hostname=NAME in the URI's query, is the name to expect"
	case t.uri.TLS && strings.Contains(err.Error(), "tls: certificate required"):
		// crypto/tls has no type for the alerts of the other side.
		hint = "the server wants a certificate of the client: --tls-certificates DIR"
	case errors.As(err, &stalled):
		hint = "--timeout sets how long to wait"
	case errors.As(err, &lost):
		hint = "the server's log may say why"
	}
	if hint == "" {
		return ""
	}
	return " (" + hint + ")"
}
