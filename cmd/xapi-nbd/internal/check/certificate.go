package check

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
	nbdtls "xapi-nbd/tls"
)

// unitCertfile is the certificate that the packaged unit passes as a flag.
const unitCertfile = "/etc/xensource/xapi-ssl.pem"

// soon is when an administrator should hear that a certificate ends.
const soon = 30 * 24 * time.Hour

// certificate looks at file, key, times and names.
func (c *checker) certificate() {
	const what = "certificate"
	if c.cfg.TLS == config.TLSOff {
		c.ok(what, `not needed: tls = "off"`)
		return
	}
	path, origin := c.cfg.Certfile, ""
	if path == "" {
		path, origin = c.facts.UnitCertfile, ", as the packaged unit passes it"
	}
	const remedy = "Have xapi make one: xe host-reset-server-certificate host=HOST\n" +
		"or install your own: xe host-server-certificate-install\nThe service notices by itself."
	cert, leftOut, err := nbdtls.LoadKeyPair(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && c.cfg.Certfile == "":
		c.warning(what, "Set certfile, or wait for xapi to make that one. Without it there is no TLS.",
			"no certfile is set, and there is no %s", path)
		return
	case err != nil:
		c.problem(what, remedy, "%s", strings.TrimPrefix(err.Error(), "certificate "))
		return
	}
	c.usable = true
	c.ok(what, "%s%s: the key belongs to it", path, origin)
	for _, err := range leftOut {
		c.warning("certificate file", "Install the certificate anew, with its whole chain.",
			"%s: left out: %v", path, err)
	}
	c.certificateFile(path)
	c.certificateTime(cert.Leaf)
	c.certificateNames(cert.Leaf)
}

// certificateFile looks for mistakes with which the certificate is served all the same.
func (c *checker) certificateFile(path string) {
	const what = "certificate file"
	data, err := os.ReadFile(path)
	if err != nil {
		return // it has just been read
	}
	if first, _ := pem.Decode(data); first != nil && first.Type == "CERTIFICATE" {
		c.warning(what, "Put the private key first, as xapi does: the original xapi-nbd wants it so.",
			"%s: the certificate stands before the key", path)
	}
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o007 != 0 {
		c.problem(what, "chmod 0400 "+path+"\nAnd replace the key, if others have accounts on this host.",
			"%s: everybody may read the private key (mode %04o)", path, st.Mode().Perm())
	}
}

func (c *checker) certificateTime(leaf *x509.Certificate) {
	const what = "certificate time"
	const renew = "Renew it: xe host-reset-server-certificate host=HOST, or xe host-server-certificate-install for your own."
	from, to, left := leaf.NotBefore.Format(time.DateOnly), leaf.NotAfter.Format(time.DateOnly), leaf.NotAfter.Sub(c.facts.Now)
	switch {
	case left <= 0:
		c.problem(what, renew, "expired on %s: clients that verify refuse it", to)
	case c.facts.Now.Before(leaf.NotBefore):
		c.problem(what, "Correct the clock, or replace the certificate.", "not valid before %s: clients that verify refuse it", from)
	case left < soon:
		in := text.Count(int(left.Hours())/24, "day")
		if left < 48*time.Hour {
			in = text.Count(int(left.Hours()), "hour")
		}
		c.warning(what, renew, "ends in %s, on %s", in, to)
	default:
		c.ok(what, "valid until %s", to)
	}
}

// certificateNames: a client that verifies does so by the name or the address
// that it connects to.
func (c *checker) certificateNames(leaf *x509.Certificate) {
	const what = "certificate names"
	var covered, missing []string
	for _, address := range c.facts.Addresses {
		if leaf.VerifyHostname(address) == nil {
			covered = append(covered, address)
		} else {
			missing = append(missing, address)
		}
	}
	byName := leaf.VerifyHostname(c.facts.Hostname) == nil
	switch {
	case byName && len(missing) == 0:
		c.ok(what, "%s", identity(append([]string{c.facts.Hostname}, covered...)))
	case byName:
		c.ok(what, "%s, but not %s: who verifies connects by name", identity(append([]string{c.facts.Hostname}, covered...)), identity(missing))
	case len(covered) > 0 && len(missing) == 0:
		c.ok(what, "%s, but not the host name %s", identity(covered), c.facts.Hostname)
	default:
		c.warning(what, "Clients that verify will refuse it. A certificate with these names: xe host-reset-server-certificate host=HOST",
			"not in it: %s", identity(append([]string{c.facts.Hostname}, missing...)))
	}
}

// identity lists names, a few of them.
func identity(names []string) string {
	const few = 4
	if len(names) > few {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), len(names)-few)
	}
	return strings.Join(names, ", ")
}
