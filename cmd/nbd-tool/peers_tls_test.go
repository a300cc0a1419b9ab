package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/test/requires"
)

// localCertificate returns a server's configuration whose certificate has the names by
// which a test reaches a loopback listener: other clients insist on the name that they
// connect to.
func localCertificate() *tls.Config {
	return testcert.SelfSigned("localhost", "127.0.0.1", "::1").ServerConfig()
}

// tlsServed is a writable file that is served over TLS, under the name "disk".
// Its second MiB is a hole.
type tlsServed struct {
	file, addr, port, ca string
}

func serveSparseTLS(t *testing.T) tlsServed {
	t.Helper()
	_, file := serveSparse(t) // in the clear elsewhere, which nobody uses
	ca, pair := certificateFiles(t, localCertificate())
	addr := startServe(t, "--listen=localhost:0", "--writable", "--certfile="+pair, "--export=disk", file).addr
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return tlsServed{file, addr, port, ca}
}

// uri is for libnbd's programs, which trust the CA of a folder.
func (s tlsServed) uri() string { return "nbds://localhost:" + s.port + "/disk" + s.query() }

func (s tlsServed) query() string { return "?tls-certificates=" + s.ca }

// qemu returns the arguments of qemu's programs in place of a format and a name.
func (s tlsServed) qemu(host string) []string {
	return []string{
		"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + s.ca,
		"--image-opts", "driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + s.port + ",export=disk,tls-creds=tls0",
	}
}

// refusedPeer runs a foreign client, which must fail, and returns its output.
func refusedPeer(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), requires.Tool(t, name), args...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Errorf("%s %q: got error %v, want a failure; it printed:\n%s", name, args, err, out)
	}
	return string(out)
}

// libnbd's programs over TLS, by either name of the certificate.
func TestPeersTLSLibnbd(t *testing.T) {
	s := serveSparseTLS(t)
	want := readFile(t, s.file)
	for _, uri := range []string{s.uri(), "nbds://" + s.addr + "/disk" + s.query()} {
		if got := peer(t, "nbdinfo", uri); !strings.Contains(got, "with TLS") || !strings.Contains(got, "export-size: 3145728") {
			t.Errorf("nbdinfo %s:\n%s", uri, got)
		}
	}
	got := strings.Join(strings.Fields(peer(t, "nbdinfo", "--json", "--map", s.uri())), "")
	if n := strings.Count(got, `"description":"hole,zero"`); n != 1 || !strings.Contains(got, `"offset":1048576,"length":1048576,"type":3`) {
		t.Errorf("nbdinfo --map: %s", got)
	}
	if got := peer(t, "nbdinfo", "--list", "nbds://localhost:"+s.port+"/"+s.query()); !strings.Contains(got, `export="disk"`) {
		t.Errorf("nbdinfo --list: %s", got)
	}
	out := filepath.Join(t.TempDir(), "out")
	peer(t, "nbdcopy", s.uri(), out)
	sameBytes(t, "nbdcopy", readFile(t, out), want)
	src := writeFile(t, "src", append(make([]byte, 1<<20), content(2<<20)...))
	peer(t, "nbdcopy", "--flush", src, s.uri())
	sameBytes(t, "nbdcopy back", readFile(t, s.file), readFile(t, src))
}

// qemu's programs over TLS, by either name of the certificate.
func TestPeersTLSQemu(t *testing.T) {
	s := serveSparseTLS(t)
	want := readFile(t, s.file)
	out := filepath.Join(t.TempDir(), "out")
	host, _, _ := net.SplitHostPort(s.addr)
	for _, host := range []string{"localhost", host} {
		peer(t, "qemu-img", append(append([]string{"convert"}, s.qemu(host)...), "-O", "raw", out)...)
		sameBytes(t, "qemu-img convert from "+host, readFile(t, out), want)
	}
	got := peer(t, "qemu-img", append([]string{"map", "--output=json"}, s.qemu("localhost")...)...)
	if !strings.Contains(got, `"start": 1048576, "length": 1048576, "depth": 0, "present": true, "zero": true, "data": false`) {
		t.Errorf("qemu-img map: %s", got)
	}
	steps := []string{"write -P 0x5a 512 1024", "write -f -P 0x5b 4096 4096", "write -z 65536 65536", "flush", "read -P 0x5a 512 1024", "read -P 0 64k 64k"}
	var args []string
	for _, step := range steps {
		args = append(args, "-c", step)
	}
	peer(t, "qemu-io", append(args, s.qemu("localhost")...)...)
	copy(want[512:], bytes.Repeat([]byte{0x5a}, 1024))
	copy(want[4096:], bytes.Repeat([]byte{0x5b}, 4096))
	clear(want[65536:131072])
	sameBytes(t, "after qemu-io", readFile(t, s.file), want)
}

// A client that does not start TLS is refused with the reason, and a client that does not
// trust the certificate ends the connection.
func TestPeersTLSRefused(t *testing.T) {
	s := serveSparseTLS(t)
	before := readFile(t, s.file)
	if got := refusedPeer(t, "nbdinfo", "nbd://"+s.addr+"/disk"); !strings.Contains(got, "TLS") {
		t.Errorf("nbdinfo in the clear does not speak of TLS:\n%s", got)
	}
	if got := refusedPeer(t, "qemu-io", "-f", "raw", "-c", "write 0 512", "nbd://"+s.addr+"/disk"); !strings.Contains(got, "TLS") {
		t.Errorf("qemu-io in the clear does not speak of TLS:\n%s", got)
	}
	other, _ := certificateFiles(t, localCertificate())
	if got := refusedPeer(t, "nbdinfo", "nbds://localhost:"+s.port+"/disk?tls-certificates="+other); !strings.Contains(got, "certificate verification") {
		t.Errorf("nbdinfo with another CA does not speak of the certificate:\n%s", got)
	}
	sameBytes(t, "after the refusals", readFile(t, s.file), before)
}
