package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

func TestURIFile(t *testing.T) {
	uri := serveOne(t, func() nbd.Device { return nbdtest.NewMem(512, 1) })
	uri = strings.TrimSuffix(uri, "ram") + "/0e0fba52%3Fsession_id=" + secret
	file := writeFile(t, "uri", []byte("\n  "+uri+" \n\n"))
	if got := succeed(t, "size", "--uri-file", file); got != "512\n" {
		t.Errorf("from a file: got %q", got)
	}
	if r := toolWith(t, t.Context(), uri, "size", "--uri-file=-"); r.code != exitOK || r.out != "512\n" {
		t.Errorf("from standard input: %+v", r)
	}
	if r := toolWith(t, t.Context(), uri, "copy", "--uri-file=-", "-"); r.code != exitOK || len(r.out) != 512 {
		t.Errorf("copy: %+v", r)
	}
	ram := nbdtest.NewRAM(make([]byte, 512))
	succeed(t, "copy", "--uri-file", file, "--dst-uri-file", writeFile(t, "dst", []byte(serveRAM(t, ram))))
	sameBytes(t, "copied", ram.Content(), nbdtest.Bytes(512, 0, 1))

	tests := []struct {
		name, text string
		code       int
		want       string
	}{
		{"empty", "\n", exitUsage, "holds no URI"},
		{"two", uri + "\n" + uri, exitUsage, "more than one line"},
		{"malformed", "nbd://h/%zz" + secret, exitUsage, "malformed"},
		{"no URI", secret, exitUsage, "not an NBD URI"},
		{"endless", strings.Repeat("x", maxURI+1), exitFailed, "reading the URI"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fail(t, tt.code, []string{tt.want}, "size", "--uri-file", writeFile(t, "uri", []byte(tt.text)))
		})
	}
	fail(t, exitFailed, []string{"no such file"}, "size", "--uri-file=/no/such/file")
	fail(t, exitUsage, []string{"want one URI, or --uri-file"}, "size", "--uri-file", file, uri)
	fail(t, exitUsage, []string{"want one URI, or --uri-file"}, "size")
}

func TestUnixSocket(t *testing.T) {
	file := writeFile(t, "disk", make([]byte, 4096))
	dir, err := os.MkdirTemp("", "nbd-tool") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	s := startServe(t, "--listen", "unix:"+socket, file)
	if s.addr != "unix:"+socket {
		t.Errorf("listening on %q", s.addr)
	}
	if got := succeed(t, "size", "nbd+unix:///?socket="+socket); got != "4096\n" {
		t.Errorf("got %q", got)
	}
}

func TestTLS(t *testing.T) {
	serverTLS, _ := nbdtest.TLS(t)
	dir, _ := certificateFiles(t, serverTLS)
	ca := filepath.Join(dir, "ca-cert.pem")
	addr := serveTLS(t, exporterFunc(func(string) (nbd.Device, error) { return nbdtest.NewMem(512, 1), nil }), serverTLS)
	port := addr[strings.LastIndex(addr, ":"):]
	other, _ := nbdtest.TLS(t)
	otherDir, _ := certificateFiles(t, other)
	clear := serveOne(t, func() nbd.Device { return nbdtest.NewMem(512, 1) })
	tests := []struct {
		name string
		args []string
		code int
		want string
	}{
		{"flag", []string{"--tls-ca", ca, "nbds://" + addr}, exitOK, ""},
		{"folder", []string{"nbds://" + addr + "?tls-certificates=" + dir}, exitOK, ""},
		{"flag beats folder", []string{"--tls-ca", ca, "nbds://" + addr + "?tls-certificates=" + otherDir}, exitOK, ""},
		{"name", []string{"--tls-ca", ca, "nbds://localhost" + port + "?tls-hostname=" + nbdtest.ServerName}, exitOK, ""},
		{"insecure", []string{"--tls-insecure", "nbds://" + addr}, exitOK, ""},
		{"not verified", []string{"nbds://" + addr + "?tls-verify-peer=0"}, exitOK, ""},
		{"a CA is verified all the same", []string{"--tls-ca", filepath.Join(otherDir, "ca-cert.pem"), "nbds://" + addr + "?tls-verify-peer=0"}, exitFailed, "TLS handshake"},
		{"system", []string{"nbds://" + addr}, exitFailed, "--tls-ca FILE"},
		{"other CA", []string{"nbds://" + addr + "?tls-certificates=" + otherDir}, exitFailed, "TLS handshake"},
		{"other name", []string{"--tls-ca", ca, "nbds://localhost" + port}, exitFailed, "tls-hostname=NAME"},
		{"clear to TLS", []string{"nbd://" + addr}, exitFailed, "(use nbds://127.0.0.1:"},
		{"TLS to clear", []string{"--tls-insecure", "nbds" + strings.TrimPrefix(clear, "nbd")}, exitFailed, "NBD_OPT_STARTTLS"},
		{"no CA file", []string{"--tls-ca=/no/such/file", "nbds://" + addr}, exitFailed, "/no/such/file"},
		{"no CA in folder", []string{"nbds://" + addr + "?tls-certificates=/no/such"}, exitFailed, "/no/such/ca-cert.pem"},
		{"empty CA file", []string{"--tls-ca", writeFile(t, "ca", nil), "nbds://" + addr}, exitFailed, "holds no certificate"},
		{"contradiction", []string{"--tls-ca", ca, "--tls-insecure", "nbds://" + addr}, exitUsage, "contradict"},
		{"CA without TLS", []string{"--tls-ca", ca, clear}, exitUsage, "begins with nbds"},
		{"psk", []string{"nbds://" + addr + "?tls-type=psk"}, exitUsage, "only x509"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"info", "--json"}, tt.args...)
			if tt.code != exitOK {
				fail(t, tt.code, []string{tt.want}, args...)
				return
			}
			var report infoReport
			if err := json.Unmarshal([]byte(succeed(t, args...)), &report); err != nil {
				t.Fatal(err)
			}
			if report.Protocol.TLS == nil || report.Protocol.TLS.Version != "TLS 1.3" {
				t.Errorf("got %+v, want TLS 1.3", report.Protocol)
			}
		})
	}
	got := succeed(t, "info", "--tls-insecure", "nbds://"+addr)
	if !strings.Contains(got, "protocol:      TLS 1.3 (TLS_") {
		t.Errorf("got\n%s", got)
	}
}

// Flags for TLS apply to the end with TLS.
func TestCopyToTLS(t *testing.T) {
	serverTLS, _ := nbdtest.TLS(t)
	want := content(1 << 20)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	addr := serveTLS(t, exporterFunc(func(string) (nbd.Device, error) { return ram.Again(), nil }), serverTLS)
	src := serveRAM(t, nbdtest.NewRAM(want))
	succeed(t, "copy", "--verify", "--tls-insecure", src, "nbds://"+addr)
	sameBytes(t, "copied", ram.Stable(), want)
}

func TestNobodyListens(t *testing.T) {
	fail(t, exitFailed, []string{"nbd+unix:/no/such/socket", "no such file"}, "info", "nbd+unix:///x?socket=/no/such/socket")
}
