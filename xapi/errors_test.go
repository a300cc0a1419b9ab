package xapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// formats returns v in all formats in which it may be logged.
func formats(v any) []string {
	var out []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T"} {
		out = append(out, fmt.Sprintf(verb, v))
	}
	text, _ := json.Marshal(v)
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
	return append(out, string(text), log.String())
}

func TestSessionRefIsRedacted(t *testing.T) {
	ref := SessionRef(secret)
	s := New(Config{Socket: "/nowhere"}).Bind(ref)
	hidden := hex(secret)
	for name, v := range map[string]any{
		"ref":        ref,
		"pointer":    &ref,
		"session":    s,
		"value":      *s,
		"in struct":  struct{ Ref SessionRef }{ref},
		"in slice":   []SessionRef{ref},
		"unexported": struct{ s *Session }{s},
		"nested":     struct{ S Session }{*s},
	} {
		for _, text := range formats(v) {
			if strings.Contains(text, "5ec7e75e") || strings.Contains(strings.ToLower(text), hidden) {
				t.Errorf("%s: secret in %q", name, text)
			}
		}
	}
	if got := string(s.Ref()); got != secret {
		t.Errorf("got %q, want the ref itself", got)
	}
}

func hex(s string) string { return fmt.Sprintf("%x", s[len("OpaqueRef:"):len("OpaqueRef:")+8]) }

func TestNewError(t *testing.T) {
	tests := []struct {
		name        string
		description []string
		secret      string
		want        []string
	}{
		{"no parameters", []string{"HOST_STILL_BOOTING"}, secret, nil},
		{"ordinary", []string{"UUID_INVALID", "VDI", "x"}, secret, []string{"VDI", "x"}},
		{"session", []string{"SESSION_INVALID", "whatever was sent"}, secret, []string{"<session>"}},
		{"handle of a session", []string{"HANDLE_INVALID", "session", "another"}, secret, []string{"session", "<session>"}},
		{"handle of a Session", []string{"HANDLE_INVALID", "Session", "another"}, secret, []string{"Session", "<session>"}},
		{"handle of something else", []string{"HANDLE_INVALID", "VBD", "OpaqueRef:1"}, secret, []string{"VBD", "OpaqueRef:1"}},
		{"ref inside a text", []string{"INTERNAL_ERROR", "no " + secret + " here", ""}, secret, []string{"<session>", ""}},
		{"call without session", []string{"INTERNAL_ERROR", "text"}, "", []string{"text"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := newError("A.b", tt.description, tt.secret)
			if diff := cmp.Diff(tt.want, got.Params); diff != "" || string(got.Code) != tt.description[0] {
				t.Errorf("got code %s, params (-want +got):\n%s", got.Code, diff)
			}
		})
	}
}

func TestErrorMatching(t *testing.T) {
	err := fmt.Errorf("attach: %w", newError("VBD.plug", []string{"SR_BACKEND_FAILURE_46", "", "in use"}, ""))
	tests := []struct {
		target error
		want   bool
	}{
		{SRBackendFailure, true},
		{ErrorCode("SR_BACKEND_FAILURE_46"), true},
		{ErrorCode("SR_BACKEND_FAILURE_4"), false},
		{SessionInvalid, false},
		{errors.New("SR_BACKEND_FAILURE_46"), false},
	}
	for _, tt := range tests {
		if got := errors.Is(err, tt.target); got != tt.want {
			t.Errorf("errors.Is(%v): got %v, want %v", tt.target, got, tt.want)
		}
	}
	if e, ok := errors.AsType[*Error](err); !ok || e.Method != "VBD.plug" {
		t.Errorf("got %v, want an *Error of VBD.plug", err)
	}
	if e := newError("A.b", []string{"SR_BACKEND_FAILURE"}, ""); !errors.Is(e, SRBackendFailure) {
		t.Error("the code without a number does not match")
	}
}

func TestErrorText(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want string
	}{
		{"no parameters", newError("A.b", []string{"HOST_STILL_BOOTING"}, ""), "xapi: A.b: HOST_STILL_BOOTING"},
		{"quoted", newError("A.b", []string{"C", "", "a\nb"}, ""), `xapi: A.b: C ["", "a\nb"]`},
		{"clipped at a rune", newError("A.b", []string{"C", "x" + strings.Repeat("é", 200)}, ""), `xapi: A.b: C ["x` + strings.Repeat("é", 127) + `…"]`},
		{"not sent", &TransportError{Method: "A.b", Err: errEmpty}, "xapi: A.b: not sent: empty result"},
		{"sent", &TransportError{Method: "A.b", Sent: true, Err: errEmpty}, "xapi: A.b: empty result"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.err.Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
