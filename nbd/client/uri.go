package client

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"xapi-nbd/nbd/wire"
)

// URI is the address of an export, as the NBD project's URI specification (doc/uri.md)
// defines it:
//
//	nbd://HOST[:PORT]/EXPORT               nbds: the same, with TLS
//	nbd+unix:///EXPORT?socket=PATH         nbds+unix: the same, with TLS
//
// The export name is everything behind the first slash, percent-decoded. A second slash
// belongs to the name; a question mark in it is written %3F.
type URI struct {
	Network string // "tcp" or "unix"
	Addr    string // "host:port", or the socket's path
	Export  string // may be empty, and may hold a secret

	// TLS means that the connection must use TLS. Without it the fields below are empty.
	TLS             bool
	TLSType         string // "anon", "x509", "psk", or empty
	TLSHostname     string // the name to verify in the certificate, instead of the host
	TLSCertificates string // a folder with ca-cert.pem, and perhaps client-cert.pem and client-key.pem
	TLSUsername     string // used with pre-shared keys only; empty means the local user
	TLSVerifyPeer   *bool  // whether to verify the certificate; nil means true
}

// uriSchemes are the schemes, with the network and whether TLS is required.
var uriSchemes = map[string]struct {
	network string
	tls     bool
}{
	"nbd": {"tcp", false}, "nbds": {"tcp", true},
	"nbd+unix": {"unix", false}, "nbds+unix": {"unix", true},
}

// ParseURI parses an NBD URI. An unknown query parameter is an error, unless its name begins
// with "x-". Errors never contain the export name or the query, which may hold secrets.
func ParseURI(s string) (*URI, error) {
	parsed, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("malformed URI: " + uriDefect(err))
	}
	scheme, ok := uriSchemes[parsed.Scheme]
	switch {
	case !ok:
		return nil, errors.New("not an NBD URI: the schemes are nbd, nbds, nbd+unix and nbds+unix")
	case !strings.HasPrefix(s[len(parsed.Scheme):], "://"):
		return nil, fmt.Errorf("malformed URI: %s: is followed by two slashes", parsed.Scheme)
	case strings.Contains(s, "#"):
		return nil, errors.New("malformed URI: fragment; a # in an export name is written %23")
	}
	u := &URI{Network: scheme.network, TLS: scheme.tls, Export: strings.TrimPrefix(parsed.Path, "/")}
	if !utf8.ValidString(u.Export) || strings.ContainsRune(u.Export, 0) || len(u.Export) > wire.MaxString {
		// Section "Values": no server can have an export of such a name.
		return nil, fmt.Errorf("export name is not UTF-8 without NUL of at most %d bytes", wire.MaxString)
	}
	if err := u.setUser(parsed.User); err != nil {
		return nil, err
	}
	if err := u.setQuery(parsed.RawQuery); err != nil {
		return nil, err
	}
	if err := u.setAddr(parsed); err != nil {
		return nil, err
	}
	return u, nil
}

// uriDefect describes an error of net/url, whose own text contains parts of the URI.
func uriDefect(err error) string {
	var escape url.EscapeError
	if errors.As(err, &escape) {
		return "a % is not followed by two hexadecimal digits"
	}
	return "want nbd://HOST:PORT/EXPORT, an IPv6 address in brackets, a space written as %20"
}

// setUser sets the TLS user name from the user information.
func (u *URI) setUser(user *url.Userinfo) error {
	if _, set := user.Password(); set {
		return errors.New("NBD URIs have no password")
	}
	if u.TLS {
		u.TLSUsername = user.Username()
	}
	return nil
}

// setQuery parses the query parameters. They are percent-encoded only: unlike in a form, +
// is a plus.
func (u *URI) setQuery(query string) error {
	seen := make(map[string]bool)
	for param := range strings.SplitSeq(query, "&") {
		if param == "" {
			continue
		}
		rawKey, rawValue, hasValue := strings.Cut(param, "=")
		key, err1 := url.PathUnescape(rawKey)
		value, err2 := url.PathUnescape(rawValue)
		switch {
		case err1 != nil || err2 != nil:
			return errors.New("malformed URI: a % in the query is not followed by two hexadecimal digits")
		case strings.HasPrefix(key, "x-"):
			continue
		case uriParams[key] == nil:
			return unknownParam(key, hasValue)
		case seen[key]:
			return fmt.Errorf("query parameter %s is given twice", key)
		case strings.HasPrefix(key, "tls-") && !u.TLS:
			return fmt.Errorf("query parameter %s needs TLS: use the scheme nbds or nbds+unix", key)
		}
		seen[key] = true
		if err := uriParams[key](u, value); err != nil {
			return fmt.Errorf("query parameter %s: %w", key, err)
		}
	}
	return nil
}

// unknownParam returns the error for an unknown query parameter. It contains the name only
// if it looks like one: if a ? in an export name is not encoded, the "query" may be a secret.
func unknownParam(key string, hasValue bool) error {
	const hint = "; a ? in an export name is written %3F"
	plain := len(key) <= 32 && strings.Trim(key, "abcdefghijklmnopqrstuvwxyz-_") == ""
	if !hasValue || !plain {
		return errors.New("unknown query parameter" + hint)
	}
	return fmt.Errorf("unknown query parameter %s%s", key, hint)
}

// uriParams are the query parameters, with functions that set their decoded value.
var uriParams = map[string]func(*URI, string) error{
	"socket": func(u *URI, v string) error {
		if u.Network != "unix" {
			return errors.New("use the scheme nbd+unix or nbds+unix")
		}
		u.Addr = v
		return nil
	},
	"tls-type": func(u *URI, v string) error {
		if v != "anon" && v != "x509" && v != "psk" {
			return errors.New("want anon, x509 or psk")
		}
		u.TLSType = v
		return nil
	},
	"tls-hostname":     func(u *URI, v string) error { u.TLSHostname = v; return nil },
	"tls-certificates": func(u *URI, v string) error { u.TLSCertificates = v; return nil },
	"tls-verify-peer": func(u *URI, v string) error {
		verify, err := strconv.ParseBool(v)
		if err != nil {
			return errors.New("want 0 or 1")
		}
		u.TLSVerifyPeer = &verify
		return nil
	},
}

// setAddr sets the address from host and port; for a unix socket it checks that setQuery has
// set the path.
func (u *URI) setAddr(parsed *url.URL) error {
	host, port := parsed.Hostname(), parsed.Port()
	if u.Network == "unix" {
		switch {
		case parsed.Host != "":
			return fmt.Errorf("%s has no host: write %s:///EXPORT?socket=PATH", parsed.Scheme, parsed.Scheme)
		case u.Addr == "":
			return fmt.Errorf("%s needs the query parameter socket=PATH", parsed.Scheme)
		}
		return nil
	}
	bracketed := strings.HasPrefix(parsed.Host, "[")
	if strings.Contains(host, ":") != bracketed {
		return errors.New("malformed URI: brackets are for IPv6 addresses, and those need them")
	}
	if host == "" {
		host = "localhost"
	}
	number := uint64(wire.DefaultPort)
	if port != "" {
		var err error
		if number, err = strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
			return errors.New("the port of the URI is not a number from 1 to 65535")
		}
	}
	u.Addr = net.JoinHostPort(host, strconv.FormatUint(number, 10))
	return nil
}

// scheme returns the scheme of the URI.
func (u *URI) scheme() string {
	s := "nbd"
	if u.TLS {
		s += "s"
	}
	if u.Network == "unix" {
		s += "+unix"
	}
	return s
}

// String returns the URI as text that [ParseURI] accepts. If the export name holds a secret,
// so does the text: use [URI.Server] in messages.
func (u *URI) String() string {
	out := url.URL{Scheme: u.scheme(), Path: "/" + u.Export, RawQuery: u.query()}
	if u.Network != "unix" {
		out.Host = u.Addr
		if host, ok := strings.CutSuffix(u.Addr, ":"+strconv.Itoa(wire.DefaultPort)); ok {
			out.Host = host
		}
	}
	if u.TLSUsername != "" {
		out.User = url.User(u.TLSUsername)
	}
	return out.String()
}

// Server returns the URI without user, export name and query, but with the path of a unix
// socket. It may be used in messages.
func (u *URI) Server() string {
	if u.Network == "unix" {
		return u.scheme() + ":" + u.Addr
	}
	return u.scheme() + "://" + u.Addr
}

// query returns the query with the parameters that are set, in the order of the fields.
func (u *URI) query() string {
	var params []string
	add := func(key, value string) {
		if value != "" {
			params = append(params, key+"="+queryEscape(value))
		}
	}
	if u.Network == "unix" {
		add("socket", u.Addr)
	}
	add("tls-type", u.TLSType)
	add("tls-hostname", u.TLSHostname)
	add("tls-certificates", u.TLSCertificates)
	if u.TLSVerifyPeer != nil {
		add("tls-verify-peer", map[bool]string{false: "0", true: "1"}[*u.TLSVerifyPeer])
	}
	return strings.Join(params, "&")
}

// queryEscape encodes all characters that a query cannot contain, and leaves slashes
// readable.
func queryEscape(s string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(s))
}
