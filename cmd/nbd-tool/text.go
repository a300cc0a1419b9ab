package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode"
)

// sessions matches the secrets in export names: the value of session_id, also
// percent-encoded as in a URI, and the refs of the Xen API anywhere.
var sessions = regexp.MustCompile(`(?i)(session_id(?:=|%3d))[^&\s"\\]*|OpaqueRef(?::|%3a)[0-9a-z-]*`)

// redact replaces sessions, so that the text can be shown and logged.
func redact(p []byte) []byte { return sessions.ReplaceAll(p, []byte("${1}<session>")) }

// secrets are the secrets that were read from arguments and files.
type secrets struct{ words []string }

// references matches the session in a URI or in a file.
var references = regexp.MustCompile(`(?i)OpaqueRef(?::|%3a)([0-9a-z-]{8,})`)

// add adds the sessions in a line to the secrets.
func (s *secrets) add(line string) {
	for _, found := range references.FindAllStringSubmatch(line, -1) {
		s.words = append(s.words, found[1])
	}
}

// redact replaces the secrets in p.
func (s *secrets) redact(p []byte) []byte {
	for _, word := range s.words {
		p = bytes.ReplaceAll(p, []byte(word), []byte("<session>"))
	}
	return p
}

// redactor redacts all written text. A message must be written with one Write.
type redactor struct {
	w       io.Writer
	secrets *secrets
}

// Write implements io.Writer.
func (r redactor) Write(p []byte) (int, error) {
	if _, err := r.w.Write(r.secrets.redact(redact(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// printJSON writes v as JSON, with one Write.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printable returns a text of a server without control characters, which a terminal might
// interpret.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// quantity returns a number of bytes as text, exact and in a larger unit.
func quantity(n int64) string {
	v, unit := float64(n), ""
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "" {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%d bytes (%.1f %s)", n, v, unit)
}
