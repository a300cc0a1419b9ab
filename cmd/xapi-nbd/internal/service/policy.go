package service

import (
	"context"
	cryptotls "crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/xapi"
)

// PurposeTTL is how long the networks' purposes are cached, so that many connections do
// not cause as many calls to xapi.
const PurposeTTL = 3 * time.Second

// notYet is the text of the refusal while xapi has not answered since the service started,
// or answers that it is not ready.
const notYet = "xapi not reachable yet"

var (
	// errNotYet refuses clients until xapi has answered once.
	errNotYet = byRule(reasonNotYet, nbd.Refuse(nbd.ErrPolicy, notYet, nil))
	// errNotLocked refuses clients while another process has locked the state folder.
	errNotLocked = byRule(reasonNotYet, nbd.Refuse(nbd.ErrPolicy, "the service is starting: it cannot use its state folder yet", nil))
	// errDraining refuses clients while the service drains.
	errDraining = byRule(reasonDraining, nbd.Refuse(nbd.ErrShutdown, "the service ends when its last connection has ended", nil))
)

// tlsSettings are the settings of TLS. They are immutable: a reload makes new ones.
type tlsSettings struct {
	policy string // of --tls
	file   string
	cert   *nbdtls.Reloader  // nil without a certfile
	config *cryptotls.Config // nil without a certfile
}

func newTLSSettings(cfg config.Config, cert *nbdtls.Reloader) *tlsSettings {
	s := &tlsSettings{policy: cfg.TLS, file: cfg.Certfile, cert: cert}
	if cert != nil {
		s.config = nbdtls.ServerConfig(cert)
	}
	return s
}

// tlsPolicy decides the TLS mode of a connection.
type tlsPolicy struct {
	settings atomic.Pointer[tlsSettings]
	networks *auth.NetworkPolicy
	ready    firstResponse
	draining *drainState
}

// mode is the nbd.Server's TLSPolicy. It refuses the client if the mode is not known.
func (p *tlsPolicy) mode(ctx context.Context, _ nbd.Peer) (nbd.TLSMode, error) {
	if p.draining.isOn() {
		return 0, errDraining
	}
	mode, reason, err := p.decide(ctx)
	if err != nil {
		err = byRule(reason, err)
	}
	return mode, err
}

// admit refuses a client in the clear if TLS is required by now. Its connection began when that
// was not so, and the mode of a connection does not change.
func (p *tlsPolicy) admit(ctx context.Context, peer nbd.Peer) error {
	if peer.TLS != nil {
		return nil
	}
	mode, reason, err := p.decide(ctx)
	if err == nil && mode == nbd.ForcedTLS {
		err = nbd.Refuse(nbd.ErrPolicy, "TLS is required now: connect again with TLS", nil)
	}
	if err != nil {
		return byRule(reason, err)
	}
	return nil
}

// config returns the TLS configuration of the server, which uses the current settings for
// each handshake.
func (p *tlsPolicy) config() *cryptotls.Config {
	return &cryptotls.Config{
		MinVersion: cryptotls.VersionTLS12,
		GetConfigForClient: func(hello *cryptotls.ClientHelloInfo) (*cryptotls.Config, error) {
			c := p.settings.Load().config
			if c == nil {
				return nil, errors.New("no certfile is configured any more")
			}
			return c.GetConfigForClient(hello)
		},
	}
}

// decide returns the mode, or the refusal and its rule.
func (p *tlsPolicy) decide(ctx context.Context) (mode nbd.TLSMode, reason string, err error) {
	switch p.settings.Load().policy {
	case config.TLSOff:
		return nbd.NoTLS, "", nil
	case config.TLSRequire:
		mode, err = p.forced()
		return mode, reasonTLS, err
	}
	if !p.ready.wait(ctx) {
		return 0, reasonNotYet, p.ready.missing()
	}
	purpose, err := p.networks.Purpose(ctx)
	if err != nil {
		reason, err = purposeRefusal(err)
		return 0, reason, err
	}
	mode, err = p.modeFor(purpose)
	return mode, reasonTLS, err
}

// purposeRefusal returns the refusal, and its rule, for an error of NetworkPolicy.Purpose.
func purposeRefusal(err error) (reason string, answer error) {
	var xe *xapi.Error
	switch {
	case errors.Is(err, auth.ErrNoPurpose), errors.Is(err, auth.ErrConflictingPurpose):
		return reasonTLS, nbd.Refuse(nbd.ErrPolicy, err.Error(), nil)
	case errors.As(err, &xe) && xe.NotReady():
		return reasonNotYet, nbd.Refuse(nbd.ErrPolicy, notYet, err)
	case errors.As(err, &xe):
		return reasonTLS, nbd.Refuse(nbd.ErrPolicy, "xapi does not return the networks' NBD purposes: "+string(xe.Code), err)
	}
	return xapiUnusable(err)
}

// modeFor returns the mode that a purpose requires.
func (p *tlsPolicy) modeFor(purpose xapi.NetworkPurpose) (nbd.TLSMode, error) {
	switch {
	case purpose == xapi.PurposeNBD:
		return p.forced()
	case purpose != xapi.PurposeInsecureNBD:
		return 0, nbd.Refuse(nbd.ErrPolicy, "unknown network purpose", fmt.Errorf("purpose %q", purpose))
	case p.certificate() != nil:
		return nbd.NoTLS, nil
	}
	// get_nbd_info returns a certificate for such networks too, and clients that have one
	// send STARTTLS, so TLS is allowed.
	return nbd.SelectiveTLS, nil
}

func (p *tlsPolicy) forced() (nbd.TLSMode, error) {
	if err := p.certificate(); err != nil {
		return 0, nbd.Refuse(nbd.ErrPolicy, "TLS is required and the service has no usable certificate", err)
	}
	return nbd.ForcedTLS, nil
}

// certificate returns why there is no usable certificate, nil if there is one.
func (p *tlsPolicy) certificate() error {
	cert := p.settings.Load().cert
	if cert == nil {
		return errors.New("no certfile is configured")
	}
	return cert.Available()
}

// certificateExpiry returns when the certificate that is served expires, false without one.
func (p *tlsPolicy) certificateExpiry() (time.Time, bool) {
	cert := p.settings.Load().cert
	if cert == nil {
		return time.Time{}, false
	}
	served, err := cert.GetCertificate(nil)
	if err != nil || served == nil || served.Leaf == nil {
		return time.Time{}, false
	}
	return served.Leaf.NotAfter, true
}
