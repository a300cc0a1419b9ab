package client

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseURI(t *testing.T) {
	yes, no := true, false
	tests := []struct {
		in   string
		want URI
		out  string // of String; empty: the same as in
	}{
		{"nbd://host", URI{Network: "tcp", Addr: "host:10809"}, "nbd://host/"},
		{"nbd://host/", URI{Network: "tcp", Addr: "host:10809"}, ""},
		{"NBD://host:10809/", URI{Network: "tcp", Addr: "host:10809"}, "nbd://host/"},
		{"nbd://host:/", URI{Network: "tcp", Addr: "host:10809"}, "nbd://host/"},
		{"nbd:///a", URI{Network: "tcp", Addr: "localhost:10809", Export: "a"}, "nbd://localhost/a"},
		{"nbd://host:1/a/b", URI{Network: "tcp", Addr: "host:1", Export: "a/b"}, ""},
		{"nbd://host//a", URI{Network: "tcp", Addr: "host:10809", Export: "/a"}, ""},
		{"nbd://host/%2Fa", URI{Network: "tcp", Addr: "host:10809", Export: "/a"}, "nbd://host//a"},
		{"nbd://host//0e0fba52%3Fsession_id=OpaqueRef:1-2",
			URI{Network: "tcp", Addr: "host:10809", Export: "/0e0fba52?session_id=OpaqueRef:1-2"}, ""},
		{"nbd://host/a%20b+c%25%23%C3%A4",
			URI{Network: "tcp", Addr: "host:10809", Export: "a b+c%#ä"}, ""},
		{"nbd://127.0.0.1:0007/", URI{Network: "tcp", Addr: "127.0.0.1:7"}, "nbd://127.0.0.1:7/"},
		{"nbd://[::1]/a", URI{Network: "tcp", Addr: "[::1]:10809", Export: "a"}, ""},
		{"nbd://[fe80::1%25eth0]:7/", URI{Network: "tcp", Addr: "[fe80::1%eth0]:7"}, ""},
		{"nbd://host/?x-anything=1&x-flag", URI{Network: "tcp", Addr: "host:10809"}, "nbd://host/"},
		{"nbds://host/a", URI{Network: "tcp", Addr: "host:10809", Export: "a", TLS: true}, ""},
		{"nbds://alice@host/", URI{Network: "tcp", Addr: "host:10809", TLS: true, TLSUsername: "alice"}, ""},
		{"nbds://host/?tls-type=x509&tls-hostname=h&tls-certificates=/etc/a%20b+c%26&tls-verify-peer=0",
			URI{Network: "tcp", Addr: "host:10809", TLS: true, TLSType: "x509", TLSHostname: "h",
				TLSCertificates: "/etc/a b+c&", TLSVerifyPeer: &no},
			"nbds://host/?tls-type=x509&tls-hostname=h&tls-certificates=/etc/a%20b%2Bc%26&tls-verify-peer=0"},
		{"nbds://host/?tls-verify-peer=1", URI{Network: "tcp", Addr: "host:10809", TLS: true, TLSVerifyPeer: &yes}, ""},
		{"nbd+unix:///?socket=/run/a", URI{Network: "unix", Addr: "/run/a"}, ""},
		{"nbd+unix://?socket=/run/a", URI{Network: "unix", Addr: "/run/a"}, "nbd+unix:///?socket=/run/a"},
		{"nbd+unix:////a%3Fb?socket=rel", URI{Network: "unix", Addr: "rel", Export: "/a?b"}, ""},
		{"nbds+unix://bob@/a?socket=/s", URI{Network: "unix", Addr: "/s", Export: "a", TLS: true, TLSUsername: "bob"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := ParseURI(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, *got); diff != "" {
				t.Errorf("want -, got +\n%s", diff)
			}
			want := tt.out
			if want == "" {
				want = tt.in
			}
			if s := got.String(); s != want {
				t.Errorf("String: got %s, want %s", s, want)
			}
			again, err := ParseURI(got.String())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got, again); diff != "" {
				t.Errorf("after String: first -, second +\n%s", diff)
			}
		})
	}
}

func TestParseURIErrors(t *testing.T) {
	// A secret in an export name or query, which no error may contain.
	const secret = "s3cr3t"
	tests := []struct{ name, in, want string }{
		{"empty", "", "not an NBD URI"},
		{"path", "/tmp/" + secret, "not an NBD URI"},
		{"scheme", "http://host/" + secret, "nbds+unix"},
		{"old syntax", "nbd:host:10809:exportname=" + secret, "two slashes"},
		{"no authority", "nbd:/" + secret, "two slashes"},
		{"fragment", "nbd://host/a#" + secret, "%23"},
		{"empty fragment", "nbd://host/" + secret + "#", "%23"},
		{"escape", "nbd://host/%zz" + secret, "hexadecimal"},
		{"escape in the query", "nbds://host/?tls-hostname=%z" + secret, "hexadecimal"},
		{"control character", "nbd://host/" + secret + "\n", "malformed"},
		{"NUL", "nbd://host/" + secret + "%00", "NUL"},
		{"not UTF-8", "nbd://host/" + secret + "%ff", "UTF-8"},
		{"long name", "nbd://host/" + strings.Repeat(secret, 1000), "4096"},
		{"port", "nbd://host:" + secret + "/", "malformed"},
		{"large port", "nbd://host:65536/" + secret, "65535"},
		{"port zero", "nbd://host:0/" + secret, "65535"},
		{"IPv6 without brackets", "nbd://::1/" + secret, "brackets"},
		{"brackets without IPv6", "nbd://[host]/" + secret, "brackets"},
		{"password", "nbds://u:" + secret + "@host/", "password"},
		{"session behind a bare question mark", "nbd://host//uuid?session_id=" + secret, "session_id; a ? in an export name is written %3F"},
		{"bare question mark", "nbd://host/a?" + secret, "%3F"},
		{"unknown with a strange name", "nbd://host/a?" + secret + ":1=2", "unknown query parameter; "},
		{"unknown", "nbd://host/?tls-fast=" + secret, "tls-fast"},
		{"twice", "nbd+unix:///?socket=/a&socket=/" + secret, "twice"},
		{"no socket", "nbd+unix:///" + secret, "socket"},
		{"empty socket", "nbd+unix:///" + secret + "?socket=", "socket"},
		{"socket over TCP", "nbd://host/?socket=/" + secret, "nbd+unix"},
		{"host and socket", "nbd+unix://host/" + secret + "?socket=/a", "no host"},
		{"TLS without TLS", "nbd://host/?tls-hostname=" + secret, "nbds"},
		{"type", "nbds://host/?tls-type=" + secret, "x509"},
		{"verify", "nbds://host/?tls-verify-peer=" + secret, "0 or 1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, err := ParseURI(tt.in)
			if err == nil {
				t.Fatalf("got %+v, want an error", u)
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), secret) {
				t.Errorf("got %q, want one with %q and without the secret", err, tt.want)
			}
		})
	}
}

func TestURIServer(t *testing.T) {
	for in, want := range map[string]string{
		"nbd://host//a%3Fsession_id=1":      "nbd://host:10809",
		"nbds+unix:///secret?socket=/run/a": "nbds+unix:/run/a",
	} {
		u, err := ParseURI(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := u.Server(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://host//a%3Fb", "nbds://u@[::1]:7/a?tls-type=x509", "nbd+unix:///a?socket=/x&x-y=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		u, err := ParseURI(in)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q became %q: %v", in, u, err)
		}
		if diff := cmp.Diff(u, again); diff != "" {
			t.Errorf("first -, after String +\n%s", diff)
		}
	})
}
