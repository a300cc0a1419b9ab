package check

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// inventory checks that the service's parser finds the keys that it needs.
func (c *checker) inventory() {
	const subject = "inventory"
	path := c.cfg.Inventory
	host, err := vdi.ReadInventory(path)
	if err != nil {
		c.problem(subject, "Set inventory to the host's xensource-inventory. xapi makes the file when it is installed.", "%v", err)
		return
	}
	c.host = host
	for _, key := range host.Missing() {
		c.problem(subject, "xapi rewrites the file in place: look again. If it stays so, put the line back:\n"+
			"xe host-list params=uuid gives INSTALLATION_UUID, xe vm-list is-control-domain=true CONTROL_DOMAIN_UUID.",
			"%s has no valid %s", path, key)
	}
	if len(host.Missing()) == 0 {
		c.ok(subject, "%s, host %s", path, host.Installation)
	}
}

// xapi checks the socket, logs in, and makes the calls that the service will make.
func (c *checker) xapi(ctx context.Context, client *xapi.Client) {
	if !c.xapiSocket(ctx) {
		return
	}
	const subject = "xapi login"
	begin := time.Now()
	s, err := client.Login(ctx, vdi.Originator)
	if err != nil {
		c.problem(subject, loginRemedy(err)+skipped, "%v", err)
		return
	}
	c.ok(subject, "a local session after %v", time.Since(begin).Round(time.Millisecond))
	c.session = s
	c.identity(ctx)
	c.networks(ctx)
}

// skipped lists the checks that need a login, for the remedy of a finding without one.
const skipped = "\nNot checked for this reason: host, control domain, network purposes, tagged VBDs."

func (c *checker) xapiSocket(ctx context.Context) bool {
	const subject = "xapi socket"
	path := c.cfg.XapiSocket
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.problem(subject, "Start xapi: systemctl start xapi. If its socket is elsewhere, set xapi_socket."+skipped, "%s does not exist", path)
		return false
	case err != nil:
		c.problem(subject, "Give the service's user access to it."+skipped, "%v", err)
		return false
	case st.Mode().Type() != fs.ModeSocket:
		c.problem(subject, "Set xapi_socket to xapi's unix socket."+skipped, "%s is not a socket", path)
		return false
	}
	if _, err := proc.SocketOwner(ctx, path); err != nil {
		c.problem(subject, "Look whether xapi runs: systemctl status xapi"+skipped, "%s: %v", path, connectError(err))
		return false
	}
	c.ok(subject, "%s", path)
	return true
}

// connectError returns the cause of a failed connection, without the path.
func connectError(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

func loginRemedy(err error) string {
	var lost *xapi.TransportError
	if errors.As(err, &lost) {
		return "xapi accepts connections and does not answer: look at its log and load; on a pool supporter, whether the pool master can be reached."
	}
	if errors.Is(err, xapi.HostStillBooting) {
		return "Wait until xapi has started. The service waits for startup_wait."
	}
	return "Look at xapi's log, /var/log/xensource.log."
}

// identity checks with xapi the two uuids of the inventory.
func (c *checker) identity(ctx context.Context) {
	const logRemedy = "Look at xapi's log, /var/log/xensource.log."
	var host xapi.HostRef
	var err error
	if c.host.Installation != "" { // else reported with the inventory
		host, err = c.session.HostByUUID(ctx, c.host.Installation)
		switch {
		case errors.Is(err, xapi.UUIDInvalid):
			c.problem("host", "Correct INSTALLATION_UUID: xe host-list params=uuid,name-label\n"+
				"With a wrong one the VBDs that the service has made are not found again.",
				"xapi does not know %s of %s", c.host.Installation, c.cfg.Inventory)
		case err != nil:
			c.problem("host", logRemedy, "%v", err)
		}
	}
	if c.host.ControlDomain == "" {
		return
	}
	const subject = "control domain"
	dom0, err := c.session.VMByUUID(ctx, c.host.ControlDomain)
	switch {
	case errors.Is(err, xapi.UUIDInvalid):
		c.problem(subject, "Correct CONTROL_DOMAIN_UUID: xe vm-list is-control-domain=true resident-on=HOST params=uuid",
			"xapi does not know %s of %s", c.host.ControlDomain, c.cfg.Inventory)
		return
	case err != nil:
		c.problem(subject, logRemedy, "%v", err)
		return
	}
	c.ok(subject, "%s, known to xapi", c.host.ControlDomain)
	if host == "" {
		return
	}
	switch its, err := c.session.ControlDomainOf(ctx, host); {
	case err != nil:
		c.problem("host", logRemedy, "%v", err)
	case its != dom0:
		c.problem("host", "Correct INSTALLATION_UUID or CONTROL_DOMAIN_UUID: they are of two hosts of the pool.\nxe host-list params=uuid,name-label",
			"%s is not the host of the control domain %s", c.host.Installation, c.host.ControlDomain)
	default:
		c.ok("host", "%s, known to xapi", c.host.Installation)
	}
}

// networks checks the purposes, which decide about TLS unless the setting tls does, and
// that there is a certificate if they require one.
func (c *checker) networks(ctx context.Context) {
	const subject = "network purposes"
	records, err := c.session.NetworkRecords(ctx)
	if err != nil {
		c.problem(subject, "Every client is refused until xapi answers. Look at its log, /var/log/xensource.log.", "%v", err)
		return
	}
	var secure, insecure int
	for _, r := range records {
		if slices.Contains(r.Purpose, xapi.PurposeNBD) {
			secure++
		}
		if slices.Contains(r.Purpose, xapi.PurposeInsecureNBD) {
			insecure++
		}
	}
	const remove = "\nxe network-param-remove uuid=UUID param-name=purpose param-key=PURPOSE"
	switch {
	case secure > 0 && insecure > 0:
		c.problem(subject, "Every client is refused. Leave one kind in the pool:"+remove,
			"contradictory: %s nbd, %s insecure_nbd", text.Count(secure, "network")+isOrAre(secure), text.Count(insecure, "network")+isOrAre(insecure))
	case secure+insecure == 0:
		c.problem(subject, "Every client is refused. Open a network for NBD with TLS:\nxe network-param-add uuid=UUID param-name=purpose param-key=nbd",
			"no network has the purpose nbd")
	case secure > 0 && c.cfg.TLS == config.TLSOff:
		c.warning(subject, `Set tls = "xapi", unless disks may really be read in the clear.`,
			`%s nbd, which asks for TLS, but tls = "off" switches it off`, text.Count(secure, "network")+isOrAre(secure))
	case secure > 0 && !c.usable:
		c.problem(subject, "Every client is refused until there is a usable certificate: see certificate.",
			"%s nbd, which needs TLS, and there is no usable certificate", text.Count(secure, "network")+isOrAre(secure))
	case secure > 0:
		c.ok(subject, "%s nbd: TLS is required", text.Count(secure, "network")+isOrAre(secure))
	default:
		c.ok(subject, "%s insecure_nbd: disks may be read in the clear", text.Count(insecure, "network")+isOrAre(insecure))
	}
}

// tagged returns the uuids of the VBDs of this host's control domain that the service made.
func (c *checker) tagged(ctx context.Context) (uuids []string) {
	if c.session == nil || c.host.ControlDomain == "" || c.host.Installation == "" {
		return nil
	}
	dom0, err := c.session.VMByUUID(ctx, c.host.ControlDomain)
	if err != nil {
		return nil // reported with the control domain
	}
	vbds, err := c.session.VBDsOfVM(ctx, dom0)
	if err != nil {
		c.problem("journal", "Look at xapi's log, /var/log/xensource.log.", "the VBDs of the control domain: %v", err)
		return nil
	}
	for _, vbd := range vbds {
		if host, ok := vdi.TaggedHost(vbd.OtherConfig); ok && host == c.host.Installation {
			uuids = append(uuids, vbd.UUID)
		}
	}
	return uuids
}

// logout ends the session, as xapi keeps a limited number of sessions per originator.
func (c *checker) logout(ctx context.Context) {
	if c.session == nil {
		return
	}
	if err := c.session.Logout(ctx); err != nil {
		c.warning("xapi login", "Nothing has to be done: xapi expires the session by itself.", "cannot log out: %v", err)
	}
}
