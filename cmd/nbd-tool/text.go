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

// sessions finds what is secret in export names: the value of session_id, also
// percent-encoded as in a URI, and the refs of the Xen API wherever they stand.
var sessions = regexp.MustCompile(`(?i)(session_id(?:=|%3d))[^&\s"\\]*|OpaqueRef(?::|%3a)[0-9a-z-]*`)

// redact makes text fit for terminals, logs and mails.
func redact(p []byte) []byte { return sessions.ReplaceAll(p, []byte("${1}<session>")) }

// secrets are the words that were read from files that hold secrets.
type secrets struct{ words []string }

// references finds the session in a URI, or in a line of its own.
var references = regexp.MustCompile(`(?i)OpaqueRef(?::|%3a)([0-9a-z-]{8,})`)

// add takes the sessions out of a line.
func (s *secrets) add(line string) {
	for _, found := range references.FindAllStringSubmatch(line, -1) {
		s.words = append(s.words, found[1])
	}
}

// redact leaves out the secrets that were read.
func (s *secrets) redact(p []byte) []byte {
	for _, word := range s.words {
		p = bytes.ReplaceAll(p, []byte(word), []byte("<session>"))
	}
	return p
}

// redactor redacts what is written. A message must come in one Write.
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

// printJSON writes v for scripts, in one Write.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printable is a server's text without what a terminal might obey.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// quantity is a number of bytes for people, and exactly.
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
