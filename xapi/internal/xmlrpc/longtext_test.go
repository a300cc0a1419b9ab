package xmlrpc

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// decodeLong decodes a document and collects the long text.
func decodeLong(body []byte, limit int) (string, Reply[string], error) {
	var text strings.Builder
	reply, err := DecodeLongText(iotest.OneByteReader(bytes.NewReader(body)), limit, func(r io.Reader) error {
		_, err := io.Copy(&text, r)
		return err
	})
	return text.String(), reply, err
}

func TestDecodeLongText(t *testing.T) {
	long := strings.Repeat("oEA=", 100_000)
	tests := []struct{ name, body, want string }{
		{"as xapi writes it", string(success("<value>" + long + "</value>")), long},
		{"empty", string(success("<value></value>")), ""},
		{"with type", string(success("<value><string>" + long + "</string></value>")), long},
		{"indented", strings.Replace(string(success("<value>AA==</value>")), "<name>Value</name>", "<name>Value</name>\n  ", 1), "AA=="},
		{"status behind", prefix + "<member><name>Value</name><value>AA==</value></member><member><name>Status</name><value>Success</value></member>" + suffix, "AA=="},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text, reply, err := decodeLong([]byte(tt.body), 1000)
			if err != nil || reply.Status != Success || text != tt.want || reply.Value != "" {
				t.Errorf("got %d bytes, %+v, %v, want %d bytes and success", len(text), reply, err, len(tt.want))
			}
		})
	}
}

func TestDecodeLongTextFailure(t *testing.T) {
	text, reply, err := decodeLong(failure("SR_BACKEND_FAILURE_460", "", "unrelated"), 1000)
	if err != nil || text != "" || reply.Status != Failure || reply.ErrorDescription[0] != "SR_BACKEND_FAILURE_460" {
		t.Errorf("got %q, %+v, %v", text, reply, err)
	}
}

func TestDecodeLongTextMalformed(t *testing.T) {
	tests := []struct{ name, body string }{
		{"nothing", ""},
		{"no value", prefix + "<member><name>Status</name><value>Success</value></member>" + suffix},
		{"another type", string(success("<value><boolean>1</boolean></value>"))},
		{"empty element", string(success("<value/>"))},
		{"comment inside", string(success("<value>AA<!-- -->AA</value>"))},
		{"CDATA", string(success("<value><![CDATA[AAAA]]></value>"))},
		{"ends in the text", string(success("<value>AA"))[:len(prefix)+len("<member><name>Status</name><value>Success</value></member><member><name>Value</name><value>AA")]},
		{"ends behind the text", strings.TrimSuffix(string(success("<value>AAAA</value>")), "</methodResponse>")},
		{"in another member", prefix + "<member><name>Status</name><value>Success</value></member><member><name>x<name>Value</name><value>AAAA</value></member>" + suffix},
		{"no status", prefix + "<member><name>Value</name><value>AAAA</value></member>" + suffix},
		{"long head", strings.Repeat(" ", 1000) + string(success("<value>AAAA</value>"))},
		{"long rest", string(success("<value>AAAA</value>")) + strings.Repeat(" ", 1000)},
		{"long name", prefix + "<member><name>" + strings.Repeat("x", 1000)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, reply, err := decodeLong([]byte(tt.body), 900)
			if err == nil || !errors.Is(err, ErrMalformed) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("got %+v, %v, want ErrMalformed", reply, err)
			}
		})
	}
}

// An error of consume is returned, and so is one of the reader.
func TestDecodeLongTextErrors(t *testing.T) {
	mine, body := errors.New("mine"), success("<value>AAAA</value>")
	_, err := DecodeLongText(bytes.NewReader(body), 1000, func(io.Reader) error { return mine })
	if !errors.Is(err, mine) {
		t.Errorf("got %v, want the error of consume", err)
	}
	for n := range body {
		r := io.MultiReader(bytes.NewReader(body[:n]), iotest.ErrReader(mine))
		_, err := DecodeLongText(r, 1000, func(text io.Reader) error { _, err := io.Copy(io.Discard, text); return err })
		if !errors.Is(err, mine) {
			t.Fatalf("%d bytes: got %v, want the error of the reader", n, err)
		}
	}
}

// No more is read than the limit allows, with or without a text.
func TestDecodeLongTextReadsLittle(t *testing.T) {
	for _, head := range []string{"", "<name>", string(success("<value>AAAA</value>"))} {
		endless := bytes.NewReader(append([]byte(head), make([]byte, 1<<20)...))
		_, err := DecodeLongText(endless, 1000, func(text io.Reader) error { _, err := io.Copy(io.Discard, text); return err })
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: got %v, want ErrMalformed", head, err)
		}
		if read := endless.Size() - int64(endless.Len()); read > 128<<10 {
			t.Errorf("%q: %d bytes were read", head, read)
		}
	}
}

// Decode has the same result for everything that DecodeLongText accepts.
func FuzzDecodeLongText(f *testing.F) {
	f.Add(success("<value>oEA=</value>"))
	f.Add(success("<value><string>oEA=</string></value>"))
	f.Add(failure("VDI_IN_USE", "OpaqueRef:1", "list_changed_blocks"))
	f.Add(success("<value>AA<!-- -->AA</value>"))
	f.Add([]byte(prefix + "<member><name>x<name>Value</name><value>AAAA</value></member>" + suffix))
	f.Fuzz(func(t *testing.T, body []byte) {
		text, reply, err := decodeLong(body, 1<<16)
		if err != nil || bytes.ContainsAny([]byte(text), "&\r") || !isPlain(text) {
			return // the function does not support escaped characters
		}
		want, err := Decode[string](body)
		if err != nil || want.Status != reply.Status {
			t.Fatalf("got %+v, Decode %+v, %v", reply, want, err)
		}
		if reply.Status == Success && want.Value != text {
			t.Fatalf("got text %q, Decode %q", text, want.Value)
		}
	})
}

func isPlain(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}
