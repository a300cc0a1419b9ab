package auth

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"

	"xapi-nbd/xapi"
)

// ErrExportName is matched by the errors of ParseExportName.
var ErrExportName = errors.New("malformed export name")

// maxExportName is the longest string that NBD allows ("Values", maximum string
// length).
const maxExportName = 4096

const sessionParameter = "session_id"

// Request is a parsed export name.
type Request struct {
	VDI     string // uuid, lower case
	Session xapi.SessionRef
}

// ParseExportName parses "/<vdi uuid>?session_id=<session ref>", the form in which
// VDI.get_nbd_info returns export names. Errors match ErrExportName and name the
// malformed part without quoting it: the session ref is a secret, and in a malformed
// name it could be anywhere.
//
// Percent-escapes are decoded once, in the path and in the parameter; a plus
// stays a plus, because a ref is opaque and not a form field. The leading slash
// is required and the first question mark ends the path. Exactly one session_id
// and no other parameter is allowed: with two, different parsers could check one session
// and use the other.
func ParseExportName(name string) (Request, error) {
	if len(name) > maxExportName {
		return Request{}, malformed("longer than %d bytes", maxExportName)
	}
	if !plainText(name) {
		return Request{}, malformed("not UTF-8 text without control characters")
	}
	path, query, found := strings.Cut(name, "?")
	vdi, err := parsePath(path)
	if err != nil {
		return Request{}, err
	}
	if !found {
		return Request{}, malformed("no session_id; in a URI the ? before it is written %%3F")
	}
	ref, err := parseQuery(query)
	if err != nil {
		return Request{}, err
	}
	return Request{VDI: vdi, Session: ref}, nil
}

func parsePath(path string) (string, error) {
	escaped, found := strings.CutPrefix(path, "/")
	if !found {
		return "", malformed("no slash at the start")
	}
	uuid, err := url.PathUnescape(escaped) // its error quotes the name
	if err != nil || !xapi.IsUUID(uuid) {
		return "", malformed("VDI uuid is not of the form 8-4-4-4-12 in hexadecimal")
	}
	return strings.ToLower(uuid), nil
}

func parseQuery(query string) (xapi.SessionRef, error) {
	// An ampersand inside the ref would have to be escaped, like anywhere else.
	first, rest, more := strings.Cut(query, "&")
	ref, err := parseParameter(first)
	if err != nil {
		return "", err
	}
	if !more {
		return ref, nil
	}
	for parameter := range strings.SplitSeq(rest, "&") {
		if _, err := parseParameter(parameter); err != nil {
			return "", err
		}
	}
	return "", malformed("more than one session_id")
}

func parseParameter(parameter string) (xapi.SessionRef, error) {
	key, value, _ := strings.Cut(parameter, "=")
	if key, err := url.PathUnescape(key); err != nil || key != sessionParameter {
		return "", malformed("parameter other than session_id")
	}
	ref, err := url.PathUnescape(value)
	switch {
	case err != nil:
		return "", malformed("session_id has a broken percent-escape")
	case ref == "":
		return "", malformed("session_id is empty")
	case !plainText(ref) || strings.ContainsFunc(ref, neverInRef):
		return "", malformed("session_id holds a character that no session ref has")
	}
	return xapi.SessionRef(ref), nil
}

// plainText reports whether s can be sent to xapi, which answers invalid UTF-8 with HTTP
// 500 and drops control characters; the other excluded characters are not allowed in XML.
func plainText(s string) bool {
	unfit := func(r rune) bool { return unicode.IsControl(r) || r == '\uFFFE' || r == '\uFFFF' }
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unfit)
}

// neverInRef reports whether a character would need quoting in XML or in xapi's filter
// expressions. xapi makes refs of letters, digits, a colon and dashes.
func neverInRef(r rune) bool {
	return unicode.IsSpace(r) || strings.ContainsRune(`"'<>\`+"`", r)
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrExportName, fmt.Sprintf(format, args...))
}
