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

// The parameters of an export name.
const (
	sessionParameter = "session_id"
	modeParameter    = "mode"
)

// The values of the parameter mode.
const (
	modeReadOnly  = "ro"
	modeReadWrite = "rw"
)

// Request is a parsed export name.
type Request struct {
	VDI     string // uuid, lower case
	Session xapi.SessionRef
	Write   bool // mode=rw
}

// ParseExportName parses "/<vdi uuid>?session_id=<session ref>", the form in which
// VDI.get_nbd_info returns export names, with "&mode=rw" or "&mode=ro" if the client adds
// it; ro is the default. Errors match ErrExportName and name the malformed part without
// quoting it: the session ref is a secret, and in a malformed name it could be anywhere.
//
// Percent-escapes are decoded once, in the path and in the parameters; a plus
// stays a plus, because a ref is opaque and not a form field. The leading slash
// is required and the first question mark ends the path. Exactly one session_id,
// at most one mode and no other parameter is allowed: with two, different parsers could
// check one session and use the other.
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
	r := Request{VDI: vdi}
	if err := r.parseQuery(query); err != nil {
		return Request{}, err
	}
	return r, nil
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

// parseQuery sets the fields that are parameters.
func (r *Request) parseQuery(query string) error {
	seen := make(map[string]bool)
	// An ampersand inside the ref would have to be escaped, like anywhere else.
	for parameter := range strings.SplitSeq(query, "&") {
		escaped, value, _ := strings.Cut(parameter, "=")
		key, err := url.PathUnescape(escaped)
		switch {
		case err != nil || key != sessionParameter && key != modeParameter:
			return malformed("parameter other than session_id and mode")
		case seen[key] && key == sessionParameter:
			return malformed("more than one session_id")
		case seen[key]:
			return malformed("more than one mode")
		}
		seen[key] = true
		if key == sessionParameter {
			r.Session, err = parseSession(value)
		} else {
			r.Write, err = parseMode(value)
		}
		if err != nil {
			return err
		}
	}
	if !seen[sessionParameter] {
		return malformed("no session_id")
	}
	return nil
}

func parseSession(value string) (xapi.SessionRef, error) {
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

func parseMode(value string) (write bool, err error) {
	switch mode, err := url.PathUnescape(value); {
	case err == nil && mode == modeReadOnly:
		return false, nil
	case err == nil && mode == modeReadWrite:
		return true, nil
	}
	return false, malformed("mode is neither ro nor rw")
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
