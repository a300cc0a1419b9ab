package xmlrpc

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// xapi does not escape member names. Any key is read, and so are the members around it.
func TestDecodeUnescapedNames(t *testing.T) {
	tests := []struct{ name, key, want string }{
		{"ampersand", "R&D", "R&D"},
		{"less than", "a<b", "a<b"},
		{"greater than", "a>b]]>", "a>b]]>"},
		{"quotes", `"a'`, `"a'`},
		{"element", "<fault>x</fault>", "<fault>x</fault>"},
		{"start of an element", "<struct>", "<struct>"},
		{"start of a name", "a<name>b", "a<name>b"},
		{"end of a name", "a</name>b", "a</name>b"},
		{"ends of names", "</name></name>", "</name></name>"},
		{"end of the reply", "</value></member></struct>", "</value></member></struct>"},
		{"start of a comment", "a<!--", "a<!--"},
		{"start of CDATA", "<![CDATA[", "<![CDATA["},
		{"processing instruction", "<?x", "<?x"},
		{"unknown entity", "&nbsp;", "&nbsp;"},
		{"half an entity", "&amp", "&amp"},
		{"character reference", "&#1;", "&#1;"},
		{"escaped by the server", "R&amp;D &lt;", "R&D <"},
		{"control characters", "a\x01\x1bb", "a\uFFFD\uFFFDb"},
		{"invalid UTF-8", "a\xff\xc3b", "a\uFFFD\uFFFDb"},
		{"what XML excludes", "\uFFFE\uFFFF", "\uFFFD\uFFFD"},
		{"line breaks", "a\nb\t", "a\nb\t"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Decode[record](success(`<value><struct>` +
				member("uuid", `<value>u</value>`) +
				member("other_config", `<value><struct>`+member("before", `<value>b</value>`)+member(tt.key, `<value>v</value>`)+member("xapi-nbd", `<value>tag</value>`)+`</struct></value>`) +
				member("mode", `<value>RO</value>`) + `</struct></value>`))
			if err != nil {
				t.Fatal(err)
			}
			want := record{UUID: "u", Mode: "RO", Extra: map[string]string{"before": "b", tt.want: "v", "xapi-nbd": "tag"}}
			if diff := cmp.Diff(want, got.Value); diff != "" {
				t.Errorf("record (-want +got):\n%s", diff)
			}
		})
	}
}

// Two keys that together look like a comment must not hide the text between them, the end of
// one record and the beginning of another.
func TestDecodeNamesThatLookLikeRecords(t *testing.T) {
	one := func(uuid, key, attached string) string {
		return `<value><struct>` + member("uuid", `<value>`+uuid+`</value>`) +
			member("other_config", `<value><struct>`+member(key, `<value>v</value>`)+`</struct></value>`) +
			member("currently_attached", `<value><boolean>`+attached+`</boolean></value>`) + `</struct></value>`
	}
	for _, keys := range [][2]string{{"<!--", "-->"}, {"<![CDATA[", "]]>"}, {"<?", "?>"}} {
		got, err := Decode[map[string]record](success(`<value><struct>` +
			member("OpaqueRef:1", one("1", keys[0], "0")) + member("OpaqueRef:2", one("2", keys[1], "1")) + `</struct></value>`))
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]record{
			"OpaqueRef:1": {UUID: "1", Extra: map[string]string{keys[0]: "v"}},
			"OpaqueRef:2": {UUID: "2", Extra: map[string]string{keys[1]: "v"}, Attached: true},
		}
		if diff := cmp.Diff(want, got.Value); diff != "" {
			t.Errorf("%q: records (-want +got):\n%s", keys, diff)
		}
	}
}

func TestDecodeOddTexts(t *testing.T) {
	tests := []struct{ name, value, want string }{
		{"control character", "a\x01b", "a\uFFFDb"},
		{"invalid UTF-8", "a\xff\xed\xa0\x80b", "a\uFFFD\uFFFD\uFFFD\uFFFDb"},
		{"cut in the middle of a character", "caf\xc3", "caf\uFFFD"},
		{"what XML excludes", "\uFFFE\uFFFF", "\uFFFD\uFFFD"},
		{"the replacement character", "\uFFFD", "\uFFFD"},
		{"a name, escaped", "&lt;name&gt;R&amp;D", "<name>R&D"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Decode[string](success(`<value>` + tt.value + `</value>`))
			if err != nil || got.Value != tt.want {
				t.Errorf("got %q, %v, want %q", got.Value, err, tt.want)
			}
		})
	}
}

// A key that looks like other members may add members, but not replace one of xapi's.
func TestDecodeInjectedMembers(t *testing.T) {
	const key = `x</name><value>v</value></member></struct></value></member>` +
		`<member><name>mode</name><value>RW</value></member>` +
		`<member><name>y</name><value><struct><member><name>z`
	got, err := Decode[record](success(`<value><struct>` +
		member("other_config", `<value><struct>`+member(key, `<value>v</value>`)+`</struct></value>`) +
		member("mode", `<value>RO</value>`) + `</struct></value>`))
	if !errors.Is(err, ErrMalformed) {
		t.Errorf("got %+v, %v, want ErrMalformed", got.Value, err)
	}
}
