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

// expiryWarning is how long before the end of the certificate there is a warning.
const expiryWarning = 30 * 24 * time.Hour

// certificate looks at file, key, times and names.
func (c *checker) certificate() {
	const subject = "certificate"
	if c.cfg.TLS == config.TLSOff {
		c.ok(subject, `not needed: tls = "off"`)
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
		c.warning(subject, "Set certfile, or wait for xapi to make that one. Without it there is no TLS.",
			"no certfile is set, and there is no %s", path)
		return
	case err != nil:
		c.problem(subject, remedy, "%s", strings.TrimPrefix(err.Error(), "certificate "))
		return
	}
	c.usable = true
	c.ok(subject, "%s%s: the key belongs to it", path, origin)
	for _, err := range leftOut {
		c.warning("certificate file", "Install the certificate anew, with its whole chain.",
			"%s: left out: %v", path, err)
	}
	c.certificateFile(path)
	c.certificateTime(cert.Leaf)
	c.certificateNames(cert.Leaf)
}

// certificateFile looks for faults of the file that do not keep the service from using it.
func (c *checker) certificateFile(path string) {
	const subject = "certificate file"
	data, err := os.ReadFile(path)
	if err != nil {
		return // it has just been read
	}
	if first, _ := pem.Decode(data); first != nil && first.Type == "CERTIFICATE" {
		c.warning(subject, "Put the private key first, as xapi does: the original xapi-nbd needs that order.",
			"%s: the certificate stands before the key", path)
	}
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o007 != 0 {
		c.problem(subject, "chmod 0400 "+path+"\nAnd replace the key, if others have accounts on this host.",
			"%s: the private key can be read by every user (mode %04o)", path, st.Mode().Perm())
	}
}

func (c *checker) certificateTime(leaf *x509.Certificate) {
	const subject = "certificate time"
	const renew = "Renew it: xe host-reset-server-certificate host=HOST, or xe host-server-certificate-install for your own."
	from, to, left := leaf.NotBefore.Format(time.DateOnly), leaf.NotAfter.Format(time.DateOnly), leaf.NotAfter.Sub(c.facts.Now)
	switch {
	case left <= 0:
		c.problem(subject, renew, "expired on %s: clients that verify it do not connect", to)
	case c.facts.Now.Before(leaf.NotBefore):
		c.problem(subject, "Correct the clock, or replace the certificate.", "not valid before %s: clients that verify it do not connect", from)
	case left < expiryWarning:
		in := text.Count(int(left.Hours())/24, "day")
		if left < 48*time.Hour {
			in = text.Count(int(left.Hours()), "hour")
		}
		c.warning(subject, renew, "ends in %s, on %s", in, to)
	default:
		c.ok(subject, "valid until %s", to)
	}
}

// certificateNames looks whether the certificate has the host's name and addresses: a
// client verifies the name or the address that it connects to.
func (c *checker) certificateNames(leaf *x509.Certificate) {
	const subject = "certificate names"
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
		c.ok(subject, "%s", listNames(append([]string{c.facts.Hostname}, covered...)))
	case byName:
		c.ok(subject, "%s, but not %s: clients that verify must connect by name", listNames(append([]string{c.facts.Hostname}, covered...)), listNames(missing))
	case len(covered) > 0 && len(missing) == 0:
		c.ok(subject, "%s, but not the host name %s", listNames(covered), c.facts.Hostname)
	default:
		c.warning(subject, "Clients that verify will refuse it. A certificate with these names: xe host-reset-server-certificate host=HOST",
			"not in it: %s", listNames(append([]string{c.facts.Hostname}, missing...)))
	}
}

// listNames joins names: the first 4 and the number of the others.
func listNames(names []string) string {
	const few = 4
	if len(names) > few {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), len(names)-few)
	}
	return strings.Join(names, ", ")
}
