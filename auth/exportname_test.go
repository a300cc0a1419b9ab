package auth_test

import (
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"xapi-nbd/auth"
	"xapi-nbd/xapi"
)

const (
	maxExportName = 4096 // NBD specification, "Values": maximum string length

	vdi = "7a2e8f00-1234-4abc-9def-0123456789ab"
	ref = "OpaqueRef:91c4e1d2-aaaa-4bbb-8ccc-1234567890ab"
)

func TestParseExportName(t *testing.T) {
	tests := []struct{ name, export, wantVDI, wantRef string }{
		{"as get_nbd_info hands it out", "/" + vdi + "?session_id=" + ref, vdi, ref},
		{"colon escaped", "/" + vdi + "?session_id=" + strings.Replace(ref, ":", "%3A", 1), vdi, ref},
		{"colon escaped in lower case", "/" + vdi + "?session_id=" + strings.Replace(ref, ":", "%3a", 1), vdi, ref},
		{"upper-case uuid", "/" + strings.ToUpper(vdi) + "?session_id=" + ref, vdi, ref},
		{"escapes in the path", "/" + strings.ReplaceAll(vdi, "-", "%2D") + "?session_id=" + ref, vdi, ref},
		{"escapes in the key", "/" + vdi + "?session%5Fid=" + ref, vdi, ref},
		{"a plus is a plus", "/" + vdi + "?session_id=a+b", vdi, "a+b"},
		{"decoded once", "/" + vdi + "?session_id=a%2541", vdi, "a%41"},
		{"separators inside the ref", "/" + vdi + "?session_id=a=b?c%26d#e", vdi, "a=b?c&d#e"},
		{"ref that is no OpaqueRef", "/" + vdi + "?session_id=é", vdi, "é"},
		{"longest", "/" + vdi + "?session_id=" + strings.Repeat("x", maxExportName-len("/?session_id=")-len(vdi)), vdi, strings.Repeat("x", maxExportName-len("/?session_id=")-len(vdi))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := auth.ParseExportName(tt.export)
			if err != nil {
				t.Fatal(err)
			}
			if got.VDI != tt.wantVDI || string(got.Session) != tt.wantRef {
				t.Errorf("got %q %q, want %q %q", got.VDI, string(got.Session), tt.wantVDI, tt.wantRef)
			}
		})
	}
}

// The parameter mode may stand on either side of session_id.
func TestParseExportNameMode(t *testing.T) {
	for query, want := range map[string]bool{
		"session_id=" + ref:                  false,
		"session_id=" + ref + "&mode=ro":     false,
		"session_id=" + ref + "&mode=rw":     true,
		"mode=rw&session_id=" + ref:          true,
		"session_id=" + ref + "&mod%65=%72w": true,
	} {
		got, err := auth.ParseExportName("/" + vdi + "?" + query)
		if err != nil {
			t.Errorf("%s: %v", query, err)
		}
		if got != (auth.Request{VDI: vdi, Session: ref, Write: want}) {
			t.Errorf("%s: got write %t, want %t", query, got.Write, want)
		}
	}
}

func TestParseExportNameRefuses(t *testing.T) {
	good := "/" + vdi + "?session_id=" + ref
	tests := []struct{ name, export, part string }{
		{"empty", "", "slash"},
		{"default export of other servers", "default", "slash"},
		{"no slash", good[1:], "slash"},
		{"slash escaped", "%2F" + good[1:], "slash"},
		{"two slashes", "/" + good, "uuid"},
		{"trailing slash", "/" + vdi + "/?session_id=" + ref, "uuid"},
		{"no uuid", "/?session_id=" + ref, "uuid"},
		{"short uuid", "/" + vdi[1:] + "?session_id=" + ref, "uuid"},
		{"long uuid", "/0" + vdi + "?session_id=" + ref, "uuid"},
		{"uuid without dashes", "/" + strings.ReplaceAll(vdi, "-", "0") + "?session_id=" + ref, "uuid"},
		{"uuid with a g", "/g" + vdi[1:] + "?session_id=" + ref, "uuid"},
		{"uuid in braces", "/{" + vdi + "}?session_id=" + ref, "uuid"},
		{"broken escape in the path", "/%zz" + vdi + "?session_id=" + ref, "uuid"},
		{"question mark escaped", "/" + vdi + "%3Fsession_id=" + ref, "uuid"},
		{"no query", "/" + vdi, "no session_id"},
		{"empty query", "/" + vdi + "?", "parameter"},
		{"other parameter", "/" + vdi + "?x=1", "parameter"},
		{"other parameter first", "/" + vdi + "?x=1&session_id=" + ref, "parameter"},
		{"other parameter last", good + "&x=1", "parameter"},
		{"empty parameter", good + "&", "parameter"},
		{"ref without a key", "/" + vdi + "?" + ref, "parameter"},
		{"key in capitals", "/" + vdi + "?SESSION_ID=" + ref, "parameter"},
		{"broken escape in the key", "/" + vdi + "?session_id%=" + ref, "parameter"},
		{"two session_ids", good + "&session_id=" + ref, "more than one"},
		{"three session_ids", good + "&session_id=a&session_id=b", "more than one"},
		{"no session_id but a mode", "/" + vdi + "?mode=rw", "no session_id"},
		{"other mode", good + "&mode=w", "mode is neither"},
		{"mode in capitals", good + "&mode=RW", "mode is neither"},
		{"empty mode", good + "&mode=", "mode is neither"},
		{"mode without a value", good + "&mode", "mode is neither"},
		{"mode with a broken escape", good + "&mode=r%", "mode is neither"},
		{"mode that holds the ref", good + "&mode=" + ref, "mode is neither"},
		{"two modes", good + "&mode=rw&mode=ro", "more than one mode"},
		{"the same mode twice", good + "&mode=rw&mode=rw", "more than one mode"},
		{"mode with a session_id behind it", good + "&mode=rw&session_id=" + ref, "more than one session_id"},
		{"key only", "/" + vdi + "?session_id", "empty"},
		{"empty ref", "/" + vdi + "?session_id=", "empty"},
		{"broken escape", good + "%4", "percent-escape"},
		{"blank", good + " x", "session_id"},
		{"escaped blank", good + "%20", "session_id"},
		{"no-break space", good + "\u00a0", "session_id"},
		{"quote", good + `%22`, "session_id"},
		{"apostrophe", good + `'`, "session_id"},
		{"angle bracket", good + `%3Cfault%3E`, "session_id"},
		{"escaped NUL", good + "%00", "session_id"},
		{"escaped newline", good + "%0a", "session_id"},
		{"escaped broken UTF-8", good + "%ff", "session_id"},
		{"NUL", good + "\x00", "UTF-8"},
		{"newline", good + "\n", "UTF-8"},
		{"C1 control", good + "\u0085", "UTF-8"},
		{"broken UTF-8", good + "\xff", "UTF-8"},
		{"non-character", good + "\uffff", "UTF-8"},
		{"too long", good + strings.Repeat("x", maxExportName), "4096"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := auth.ParseExportName(tt.export)
			if !errors.Is(err, auth.ErrExportName) {
				t.Fatalf("got %v, %v, want ErrExportName", got.VDI, err)
			}
			if !strings.Contains(err.Error(), tt.part) {
				t.Errorf("got %q, want it to name %q", err, tt.part)
			}
			if strings.Contains(err.Error(), "91c4") {
				t.Errorf("the ref is in %q", err)
			}
			if got != (auth.Request{}) {
				t.Errorf("got a request together with the error")
			}
		})
	}
}

func FuzzParseExportName(f *testing.F) {
	f.Add("/" + vdi + "?session_id=" + ref)
	f.Add("/" + vdi + "?session_id=OpaqueRef%3A1&session_id=2")
	f.Add("/" + vdi + "?session_id=" + ref + "&mode=rw")
	f.Add("/" + strings.ToUpper(vdi) + "?x=1")
	f.Add("/%37a2e8f00-1234-4abc-9def-0123456789ab?session_id=%00")
	f.Fuzz(func(t *testing.T, name string) {
		got, err := auth.ParseExportName(name)
		if err != nil {
			if !errors.Is(err, auth.ErrExportName) {
				t.Errorf("got %v, want ErrExportName", err)
			}
			// Error texts are constants: no part of the name can be in them.
			if len(err.Error()) > 120 {
				t.Errorf("got a text of %d bytes", len(err.Error()))
			}
			return
		}
		if len(name) > maxExportName {
			t.Errorf("accepted %d bytes", len(name))
		}
		if !xapi.IsUUID(got.VDI) || got.VDI != strings.ToLower(got.VDI) {
			t.Errorf("got uuid %q", got.VDI)
		}
		s := string(got.Session)
		if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) || strings.ContainsAny(s, "\"'<> ") {
			t.Errorf("got ref %q", s)
		}
		// An accepted ref can be sent in XML.
		if strings.ContainsFunc(s, func(r rune) bool { return r == 0xfffe || r == 0xffff }) {
			t.Errorf("got ref %q, which XML cannot carry", s)
		}
		// The canonical form of a request parses to the same request.
		canonical := "/" + got.VDI + "?session_id=" + escapeAll(s)
		if got.Write {
			canonical += "&mode=rw"
		}
		again, err := auth.ParseExportName(canonical)
		if len(s)*3+len(vdi)+28 < maxExportName && (err != nil || again != got) {
			t.Errorf("%q parses, its canonical form gives %v", name, err)
		}
	})
}

func escapeAll(s string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		b.WriteByte('%')
		b.WriteByte(digits[s[i]>>4])
		b.WriteByte(digits[s[i]&15])
	}
	return b.String()
}
