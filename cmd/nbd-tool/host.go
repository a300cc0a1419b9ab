package main

import (
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// hostFlags name a disk of a XenServer or XCP-ng host by the values that VDI.get_nbd_info
// returns, instead of a URI.
type hostFlags struct {
	host        string
	port        uint16
	vdi         string
	sessionFile string
	noTLS       bool
}

func (f *hostFlags) bind(flags *pflag.FlagSet) {
	flags.StringVar(&f.host, "host", "", "name or address of a `HOST` with XenServer or XCP-ng, in place of a URI")
	flags.Uint16Var(&f.port, "port", wire.DefaultPort, "TCP `PORT` of the host")
	flags.StringVar(&f.vdi, "vdi", "", "`UUID` of the VDI")
	flags.StringVar(&f.sessionFile, "session-file", "", "read the reference of a xapi session from `FILE`, or from standard input with -")
	flags.BoolVar(&f.noTLS, "no-tls", false, "connect to the host in the clear: the session can be read on the way")
}

func (f *hostFlags) given() bool { return f.host != "" }

var uuidSyntax = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// check returns a usage error for missing and invalid flags. The error contains no value: a
// session may have been given in the wrong flag.
func (f *hostFlags) check(nameless bool) error {
	named := f.vdi != "" || f.sessionFile != ""
	switch {
	case !f.given() && (named || f.noTLS || f.port != wire.DefaultPort):
		return usagef("--port, --vdi, --session-file and --no-tls need --host")
	case !f.given():
		return nil
	case !isHost(f.host):
		return usagef("--host is a name or an address; the port is --port")
	case f.port == 0:
		return usagef("--port is 1 to 65535")
	case nameless && !named:
		return nil
	case f.vdi == "" || f.sessionFile == "":
		return usagef("--host needs --vdi and --session-file")
	case !uuidSyntax.MatchString(f.vdi):
		return usagef("--vdi is a UUID, such as 0e0fba52-7b2e-4b1e-8d3b-5d3a1f1c2b3a")
	}
	return nil
}

// isHost reports whether s is a name or an address, of IPv6 with or without
// brackets.
func isHost(s string) bool {
	if addr, err := netip.ParseAddr(unbracketed(s)); err == nil {
		return addr.Is6() || s == unbracketed(s)
	}
	return !strings.ContainsAny(s, ":/?#@[]% \t\r\n")
}

func unbracketed(s string) string {
	if inner, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inner, "]") {
		return strings.TrimSuffix(inner, "]")
	}
	return s
}

// refSyntax matches references of xapi. Their characters need no encoding in an export name.
var refSyntax = regexp.MustCompile(`^OpaqueRef:[0-9A-Za-z-]+$`)

// uri returns the URI that the flags describe.
func (f *hostFlags) uri(in *secretInput) (*client.URI, error) {
	u := &client.URI{Network: "tcp", Addr: net.JoinHostPort(unbracketed(f.host), strconv.Itoa(int(f.port))), TLS: !f.noTLS}
	if f.sessionFile == "" {
		return u, nil // the command needs no name
	}
	ref, err := in.readLine(f.sessionFile, "session")
	if err != nil {
		return nil, err
	}
	if !refSyntax.MatchString(ref) {
		return nil, usagef("%s holds no session: want one line with its reference, OpaqueRef:…", fileName(f.sessionFile))
	}
	u.Export = "/" + strings.ToLower(f.vdi) + "?session_id=" + ref
	return u, nil
}
