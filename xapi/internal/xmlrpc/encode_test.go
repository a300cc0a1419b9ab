package xmlrpc

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	kolo "github.com/kolo/xmlrpc"
)

// The bytes that xapi gets, in the forms that it accepts: strings as text or
// <string>, bools only as <boolean>, and always <params>.
func TestEncode(t *testing.T) {
	type ref string
	type spec struct {
		Name  string            `xmlrpc:"name"`
		On    bool              `xmlrpc:"on"`
		Off   bool              `xmlrpc:"off"`
		Extra map[string]string `xmlrpc:"other_config"`
	}
	const head = `<?xml version="1.0" encoding="UTF-8"?><methodCall><methodName>A.b_c</methodName>`
	tests := []struct {
		name string
		args []any
		want string
	}{
		{"no arguments", nil, `<params></params>`},
		{"text is escaped", []any{"<a>&\"'é"}, `<params><param><value><string>&lt;a&gt;&amp;&#34;&#39;é</string></value></param></params>`},
		{"empty text", []any{""}, `<params><param><value><string></string></value></param></params>`},
		{"string type", []any{ref("OpaqueRef:1")}, `<params><param><value><string>OpaqueRef:1</string></value></param></params>`},
		{"blanks are kept", []any{" a "}, `<params><param><value><string> a </string></value></param></params>`},
		{"bools", []any{true, false}, `<params><param><value><boolean>1</boolean></value></param><param><value><boolean>0</boolean></value></param></params>`},
		{"array", []any{[]string{"a", "b"}}, `<params><param><value><array><data><value><string>a</string></value><value><string>b</string></value></data></array></value></param></params>`},
		{"nil slice and map are empty", []any{[]string(nil), map[string]string(nil)}, `<params><param><value><array><data></data></array></value></param><param><value><struct></struct></value></param></params>`},
		{"struct in field order", []any{spec{Name: "n", On: true, Extra: map[string]string{"k:1-x": "v"}}}, `<params><param><value><struct>` +
			`<member><name>name</name><value><string>n</string></value></member>` +
			`<member><name>on</name><value><boolean>1</boolean></value></member>` +
			`<member><name>off</name><value><boolean>0</boolean></value></member>` +
			`<member><name>other_config</name><value><struct><member><name>k:1-x</name><value><string>v</string></value></member></struct></value></member>` +
			`</struct></value></param></params>`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Encode("A.b_c", tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			if want := head + tt.want + `</methodCall>`; string(got) != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func TestEncodeRefuses(t *testing.T) {
	s := "x"
	tests := []struct {
		name string
		arg  any
	}{
		{"nil, which kolo writes as an empty param", nil},
		{"pointer", &s},
		{"nil pointer", (*string)(nil)},
		{"integer, which nothing here needs", 7},
		{"unsigned integer", uint8(7)},
		{"float", 1.5},
		{"bytes, which kolo writes as integers", []byte("x")},
		{"base64, which kolo does not even encode", kolo.Base64("x")},
		{"time, which kolo writes without zone", time.Time{}},
		{"interface elements", []any{nil}},
		{"broken UTF-8", "a\xffb"},
		{"NUL", "a\x00b"},
		{"newline", "a\nb"},
		{"tab", "a\tb"},
		{"delete", "a\x7fb"},
		{"C1 control", "a\u0085b"},
		{"non-character, which is silently replaced", "a\uFFFEb"},
		{"control character in an element", []string{"ok", "\x01"}},
		{"control character in a map value", map[string]string{"k": "\x01"}},
		{"control character in a field", struct{ A string }{"\x01"}},
		{"unexported field, where kolo panics", struct{ a string }{"x"}},
		{"map key that is no string", map[int]string{1: "a"}},
		{"map key empty", map[string]string{"": "v"}},
		{"map key <", map[string]string{"a<b": "v"}},
		{"map key >", map[string]string{"a>b": "v"}},
		{"map key &", map[string]string{"a&b": "v"}},
		{"map key quote", map[string]string{`a"b`: "v"}},
		{"map key apostrophe", map[string]string{"a'b": "v"}},
		{"map key control character", map[string]string{"a\nb": "v"}},
		{"map key broken UTF-8", map[string]string{"a\xff": "v"}},
		{"longer than xapi reads", strings.Repeat("x", MaxCallBytes)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, err := Encode("A.b", "first", tt.arg); !errors.Is(err, ErrArgument) {
				t.Errorf("got %q, %v, want ErrArgument", got, err)
			}
		})
	}
	for _, method := range []string{"", "A.b</methodName>", "A&b", "A\n"} {
		if got, err := Encode(method); !errors.Is(err, ErrArgument) {
			t.Errorf("method %q: got %q, %v, want ErrArgument", method, got, err)
		}
	}
}

// Errors of the encoder must not quote arguments, which may be secret.
func TestEncodeErrorsHideArguments(t *testing.T) {
	_, err := Encode("A.b", "OpaqueRef:secret\x00")
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v, want an error without the argument", err)
	}
}

// The result of Encode is XML whose only text is the argument, unchanged.
func FuzzEncode(f *testing.F) {
	f.Add("OpaqueRef:1", "key")
	f.Add("<&\"'>", "k]]>")
	f.Add("\ufffd", "\u2028")
	f.Fuzz(func(t *testing.T, text, key string) {
		body, err := Encode("A.b", map[string]string{key: text})
		if err != nil {
			if !errors.Is(err, ErrArgument) {
				t.Errorf("got %v, want ErrArgument", err)
			}
			return
		}
		var got []string
		for dec := xml.NewDecoder(strings.NewReader(string(body))); ; {
			tok, err := dec.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v in %q", err, body)
			}
			if data, ok := tok.(xml.CharData); ok {
				got = append(got, string(data))
			}
		}
		want := []string{"A.b", key, text}
		if text == "" {
			want = want[:2]
		}
		if strings.Join(got, "\x00") != strings.Join(want, "\x00") {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}
