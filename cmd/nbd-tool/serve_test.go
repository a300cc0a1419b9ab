package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd/nbdtest"
)

// served is a running nbd-tool serve.
type served struct {
	addr  string // the first that it listens on
	lines chan string
	log   *syncBuffer
	stop  func() (code int, errOut string)
}

// syncBuffer is a buffer for concurrent use.
type syncBuffer struct {
	mu      sync.Mutex // guards b and written
	b       bytes.Buffer
	written chan struct{} // closed by the next Write; nil if nobody waits
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.written != nil {
		close(b.written)
		b.written = nil
	}
	return b.b.Write(p)
}

// wait waits until the content fulfils a condition.
func (b *syncBuffer) wait(t *testing.T, fulfils func(text string) bool) {
	t.Helper()
	for {
		b.mu.Lock()
		if fulfils(b.b.String()) {
			b.mu.Unlock()
			return
		}
		if b.written == nil {
			b.written = make(chan struct{})
		}
		written := b.written
		b.mu.Unlock()
		select {
		case <-written:
		case <-time.After(time.Minute):
			t.Fatalf("waited for a minute:\n%s", b)
		}
	}
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// startServe returns when it listens. It is stopped at the end of the test at
// the latest.
func startServe(t *testing.T, args ...string) *served {
	t.Helper()
	return startServing(t, append([]string{"serve"}, args...)...)
}

// startServing is startServe for any command that serves.
func startServing(t *testing.T, args ...string) *served {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	r, w := io.Pipe()
	errOut := new(syncBuffer)
	ended := make(chan struct{})
	var code int
	go func() {
		defer close(ended)
		code = run(ctx, args, streams{nil, w, errOut})
		w.Close()
	}()
	lines := make(chan string, 100) // the server must not wait for a test that waits for its log
	go func() {
		defer close(lines)
		for scan := bufio.NewScanner(r); scan.Scan(); {
			lines <- scan.Text()
		}
	}()
	s := &served{lines: lines, log: errOut, stop: func() (int, string) {
		cancel()
		<-ended
		return code, errOut.String()
	}}
	t.Cleanup(func() { s.stop() })
	s.addr = s.nextAddr(t)
	return s
}

// nextAddr returns the next address that the server prints.
func (s *served) nextAddr(t *testing.T) string {
	t.Helper()
	line := <-s.lines
	addr, ok := strings.CutPrefix(line, "listening on ")
	if !ok {
		_, text := s.stop()
		t.Fatalf("got %q, error output %q", line, text)
	}
	return addr
}

func TestServe(t *testing.T) {
	want := content(3<<20 + 512)
	file := writeFile(t, "disk", make([]byte, len(want)))
	s := startServe(t, "--listen=127.0.0.1:0", "--writable", "--export=disk", file)
	uri := "nbd://" + s.addr + "/disk"
	succeed(t, "copy", "--verify", writeFile(t, "src", want), uri)
	sameBytes(t, "served file", readFile(t, file), want)
	if got := succeed(t, "copy", uri, "-"); got != string(want) {
		t.Error("copied back: differs")
	}
	if got := succeed(t, "list", "nbd://"+s.addr); !strings.Contains(got, "disk") {
		t.Errorf("list: got %q", got)
	}
	fail(t, exitFailed, []string{"NBD_REP_ERR_UNKNOWN", "no such export"}, "size", "nbd://"+s.addr+"/other")
	code, errOut := s.stop()
	if code != exitOK || strings.Count(errOut, "\n") != 1 || !strings.Contains(errOut, "export refused") {
		t.Errorf("exit code %d, error output %q; want one line about the refusal", code, errOut)
	}
}

// Without --writable clients cannot change the file.
func TestServeReadOnly(t *testing.T) {
	content := nbdtest.Bytes(1<<20, 0, 1)
	file := writeFile(t, "disk", content)
	s := startServe(t, "--listen=localhost:0", file)
	uri := "nbd://" + s.addr
	if got := succeed(t, "info", uri); !strings.Contains(got, "read-only") {
		t.Errorf("got\n%s", got)
	}
	fail(t, exitFailed, []string{"the export is read-only"}, "copy", writeFile(t, "src", make([]byte, 1<<20)), uri)
	sameBytes(t, "file", readFile(t, file), content)
}

func TestServeTLS(t *testing.T) {
	cfg, _ := nbdtest.TLS(t)
	dir, pair := certificateFiles(t, cfg)
	s := startServe(t, "--listen=127.0.0.1:0", "--certfile", pair, writeFile(t, "disk", make([]byte, 512)))
	if got := succeed(t, "size", "nbds://"+s.addr+"?tls-certificates="+dir); got != "512\n" {
		t.Errorf("got %q", got)
	}
	fail(t, exitFailed, []string{"use nbds://"}, "size", "nbd://"+s.addr)
}

// With --cafile a client needs a certificate, and one of the right issuer.
func TestServeToClientsWithCertificates(t *testing.T) {
	serverTLS, _ := nbdtest.TLS(t)
	serverCA, pair := certificateFiles(t, serverTLS)
	ca := filepath.Join(serverCA, "ca-cert.pem")
	friendCA, friend := clientCertificate(t, ca)
	_, stranger := clientCertificate(t, ca)
	s := startServe(t, "--listen=127.0.0.1:0", "--certfile="+pair, "--cafile="+friendCA, writeFile(t, "disk", make([]byte, 512)))
	uri := "nbds://" + s.addr
	for _, args := range [][]string{{uri + "?tls-certificates=" + friend}, {"--tls-certificates=" + friend, uri}, {"--tls-ca=" + ca, "--tls-certificates=" + friend, uri}} {
		if got := succeed(t, append([]string{"size"}, args...)...); got != "512\n" {
			t.Errorf("%q: got %q", args, got)
		}
	}
	fail(t, exitFailed, []string{"certificate required", "--tls-certificates DIR"}, "size", "--tls-ca="+ca, uri)
	fail(t, exitFailed, []string{"tls: unknown certificate authority"}, "size", "--tls-certificates="+stranger, uri)
	// A certificate without its key is an error.
	if err := os.Remove(filepath.Join(stranger, "client-key.pem")); err != nil {
		t.Fatal(err)
	}
	fail(t, exitFailed, []string{"client certificate", "client-key.pem"}, "size", "--tls-certificates="+stranger, uri)
}

// clientCertificate makes a client's certificate that signs itself. It returns the file of
// the certificate alone, and a folder with the certificate, its key and the server's CA.
func clientCertificate(t *testing.T, serverCA string) (issuer, dir string) {
	t.Helper()
	cert := testcert.Sign(&x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, nil, nil)
	dir = t.TempDir()
	for name, content := range map[string][]byte{
		"ca-cert.pem": readFile(t, serverCA), "client-cert.pem": cert.PEM(), "client-key.pem": cert.KeyPEM(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return writeFile(t, "issuer.pem", cert.PEM()), dir
}

// The socket file of a killed process is replaced.
func TestServeAfterKill(t *testing.T) {
	dir, err := os.MkdirTemp("", "nbd-tool") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	killed, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	killed.SetUnlinkOnClose(false)
	killed.Close()
	file := writeFile(t, "disk", make([]byte, 512))
	startServe(t, "--listen=unix:"+socket, file)
	if got := succeed(t, "size", "nbd+unix:///?socket="+socket); got != "512\n" {
		t.Errorf("got %q", got)
	}
	fail(t, exitFailed, []string{"another process listens there"}, "serve", "--listen=unix:"+socket, file)
}

func TestServeErrors(t *testing.T) {
	file := writeFile(t, "disk", make([]byte, 512))
	busy := startServe(t, "--listen=127.0.0.1:0", file)
	tests := []struct {
		name string
		args []string
		code int
		want string
	}{
		{"no file", []string{"/no/such/file"}, exitFailed, "/no/such/file"},
		{"folder", []string{t.TempDir()}, exitFailed, "neither"},
		{"no argument", nil, exitUsage, "want one file"},
		{"two files", []string{file, file}, exitUsage, "for several: --config FILE"},
		{"file and configuration", []string{"--config=x", file}, exitUsage, "--config and FILE exclude each other"},
		{"flag and configuration", []string{"--config=x", "--writable", "--port=1"}, exitUsage, "--config and --writable, --port exclude each other"},
		{"no configuration", []string{"--config=/no/such/file"}, exitFailed, "/no/such/file: no such file or directory\n"},
		{"name and its alias", []string{"--export=a", "--exportname=b", file}, exitUsage, "--export and --exportname exclude each other"},
		{"address and its alias", []string{"--listen=:1", "--port=1", file}, exitUsage, "--listen and --port exclude each other"},
		{"TLS and none", []string{"--no-tls", "--certfile=x", file}, exitUsage, "--no-tls and --certfile exclude each other"},
		{"port too large", []string{"--port=65536", file}, exitUsage, "65536"},
		{"address", []string{"--listen=here", file}, exitUsage, "neither host:port"},
		{"port", []string{"--listen=localhost:nbd", file}, exitUsage, "no valid port"},
		{"no path", []string{"--listen=unix:", file}, exitUsage, "no path"},
		{"in use", []string{"--listen=" + busy.addr, file}, exitFailed, "in use"},
		{"issuers without TLS", []string{"--cafile", file, file}, exitUsage, "--cafile needs --certfile"},
		{"no such flag", []string{"--read-only", file}, exitUsage, "--read-only"},
		{"certificate", []string{"--certfile", file, file}, exitFailed, file},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fail(t, tt.code, []string{tt.want}, append([]string{"serve"}, tt.args...)...)
		})
	}
}
