package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/leaks"
)

func TestMain(m *testing.M) {
	segmentSize = 1 << 20 // so that copies in tests have several
	streamGrace = time.Millisecond
	if os.Getenv(listenPIDEnv) != "" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	if os.Getenv(toolEnv) != "" {
		os.Exit(runAsTool())
	}
	leaks.Main(m)
}

// secret is a session's ref, which must not be printed.
const secret = "OpaqueRef:5e55-10n"

// result is the result of a run of the tool.
type result struct {
	code     int
	out, err string
}

// tool runs the program, and fails the test if the output has the secret.
func tool(t *testing.T, args ...string) result {
	t.Helper()
	return toolWith(t, t.Context(), "", args...)
}

func toolWith(t *testing.T, ctx context.Context, stdin string, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	code := run(ctx, args, streams{strings.NewReader(stdin), &out, &errOut})
	if text := out.String() + errOut.String(); strings.Contains(text, "5e55-10n") {
		t.Errorf("%q tells the session:\n%s", args, text)
	}
	return result{code, out.String(), errOut.String()}
}

// succeed runs the program, which must succeed without error output. It returns the output.
func succeed(t *testing.T, args ...string) string {
	t.Helper()
	r := tool(t, args...)
	if r.code != exitOK || r.err != "" {
		t.Fatalf("%q: exit code %d, error output %q", args, r.code, r.err)
	}
	return r.out
}

// fail runs the program, which must fail with the code and an error output that contains all
// of want.
func fail(t *testing.T, code int, want []string, args ...string) {
	t.Helper()
	checkFailure(t, tool(t, args...), code, want...)
}

func checkFailure(t *testing.T, r result, code int, want ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code: got %d, want %d", r.code, code)
	}
	for _, w := range want {
		if !strings.Contains(r.err, w) {
			t.Errorf("got error output %q, want one with %q", r.err, w)
		}
	}
}

// exporterFunc is a function as an exporter.
type exporterFunc func(name string) (nbd.Device, error)

func (f exporterFunc) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	return f(name)
}

// serve serves an exporter until the end of the test and returns the URI up to
// the export name.
func serve(t *testing.T, e nbd.Exporter) string { return "nbd://" + serveTLS(t, e, nil) }

// serveTLS demands TLS if cfg is not nil. It returns host, port and a slash.
func serveTLS(t *testing.T, e nbd.Exporter, cfg *tls.Config) string {
	t.Helper()
	s := &nbd.Server{Exporter: e, TLSConfig: cfg}
	if cfg != nil {
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil }
	}
	nc := nbdtest.Serve(t, s)()
	defer nc.Close()
	return nc.RemoteAddr().String() + "/"
}

// serveRAM serves one device under the name "ram", any number of times.
func serveRAM(t *testing.T, r *nbdtest.RAM) (uri string) {
	t.Helper()
	return serve(t, &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"ram": func() (nbd.Device, error) { return r.Again(), nil },
	}}) + "ram"
}

// serveOne is serveRAM for another kind of device.
func serveOne(t *testing.T, open func() nbd.Device) (uri string) {
	t.Helper()
	return serve(t, exporterFunc(func(string) (nbd.Device, error) { return open(), nil })) + "ram"
}

// writeFile makes a file in a temporary folder.
func writeFile(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content returns n bytes of data with ranges of zeroes, at offsets that are no multiples of
// any block size.
func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for off := 0; off < n; {
		run := min(1+r.IntN(200<<10), n-off)
		nbdtest.Fill(b[off:off+run], int64(off), 7)
		off += run + r.IntN(300<<10)
	}
	return b
}

// sameBytes compares without printing megabytes.
func sameBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: got %d bytes, want %d", what, len(got), len(want))
	} else if at := copying.Difference(want, got); at >= 0 {
		t.Errorf("%s: differs at offset %d of %d", what, at, len(want))
	}
}

// certificateFiles writes the certificate of nbdtest.TLS in the form for other tools: as a CA
// in a folder, and with its key in one file.
func certificateFiles(t *testing.T, cfg *tls.Config) (caDir, pair string) {
	t.Helper()
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cfg.Certificates[0].Certificate[0]})
	der, err := x509.MarshalPKCS8PrivateKey(cfg.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return filepath.Dir(writeFile(t, "ca-cert.pem", cert)), writeFile(t, "pair.pem", append(key, cert...))
}
