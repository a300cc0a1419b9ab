package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/xapi"
)

// purposeTTL is how long the networks' purposes are believed: a flood of
// connections must not become a flood of questions to xapi.
const purposeTTL = 3 * time.Second

// errNotYet is what clients hear while xapi has never answered.
var errNotYet = nbd.Refuse(nbd.ErrPolicy, "xapi not reachable yet", nil)

// tlsPolicy decides the TLS mode of a connection.
type tlsPolicy struct {
	setting  string           // of --tls
	cert     *nbdtls.Reloader // nil without a certfile
	networks *auth.NetworkPolicy
	ready    latch // xapi has answered
}

// mode is the nbd.Server's TLSPolicy. Whatever is not certain is refused.
func (p *tlsPolicy) mode(ctx context.Context, _ nbd.Peer) (nbd.TLSMode, error) {
	switch p.setting {
	case tlsOff:
		return nbd.NoTLS, nil
	case tlsRequire:
		return p.forced()
	}
	if !p.ready.isOpen() {
		return 0, errNotYet
	}
	purpose, err := p.networks.Purpose(ctx)
	switch {
	case errors.Is(err, auth.ErrNoPurpose), errors.Is(err, auth.ErrConflictingPurpose):
		return 0, nbd.Refuse(nbd.ErrPolicy, err.Error(), nil)
	case err != nil:
		return 0, nbd.Refuse(nbd.ErrPolicy, "xapi unreachable: the networks' NBD purposes are not known", err)
	case purpose == xapi.PurposeNBD:
		return p.forced()
	case purpose == xapi.PurposeInsecureNBD:
		if p.certificate() != nil {
			return nbd.NoTLS, nil
		}
		// get_nbd_info hands out a certificate for such networks too, and
		// clients that got one send STARTTLS: let them.
		return nbd.SelectiveTLS, nil
	}
	return 0, nbd.Refuse(nbd.ErrPolicy, "unknown network purpose", fmt.Errorf("purpose %q", purpose))
}

func (p *tlsPolicy) forced() (nbd.TLSMode, error) {
	if err := p.certificate(); err != nil {
		return 0, nbd.Refuse(nbd.ErrPolicy, "TLS is required and the service has no usable certificate", err)
	}
	return nbd.ForcedTLS, nil
}

// certificate says why there is no usable certificate, nil if there is one.
func (p *tlsPolicy) certificate() error {
	if p.cert == nil {
		return errors.New("no certfile is configured")
	}
	return p.cert.Available()
}
