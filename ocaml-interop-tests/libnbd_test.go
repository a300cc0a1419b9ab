package interop

import (
	"context"
	"crypto/md5"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdfile"
	"xapi-nbd/nbd/nbdtest"
)

var libnbdClient = program{
	name:    "libnbd_client",
	library: library{"nbd", "mlnbd.cmxa", "libnbd-ocaml-dev"},
}

// libnbdPeer is the log line with the name of the peer.
func libnbdPeer(t *testing.T) string {
	t.Helper()
	said, failure := libnbdClient.run(t, "version")
	if failure != "" {
		t.Fatal(failure)
	}
	return fmt.Sprintf("peer: libnbd %s, bindings for OCaml %s", said["libnbd"], said["ocaml"])
}

// The size of the disk is no multiple of any block size.
const (
	diskSize = 2<<20 + 12_345
	diskSeed = 11
	badSpot  = 1 << 20 // 512 bytes that cannot be read, of the export "faulty"
)

// disks are the exports of one test: the disk under a name like xapi's, and the same disk
// with faults. All devices must be closed at the end of the test, when the server is shut
// down.
type disks struct {
	nbdtest.Exporter
	held *nbdtest.Faulty // the export "held"
	file []byte          // content of the export "file"

	mu     sync.Mutex // guards opened
	opened []*nbdtest.Mem
}

func newDisks(t *testing.T) *disks {
	d := new(disks)
	heldDisk := nbdtest.NewMem(diskSize, diskSeed)
	d.held = nbdtest.NewFaulty(heldDisk)
	path := d.writeFile(t)
	d.Exports = map[string]func() (nbd.Device, error){
		export: func() (nbd.Device, error) { return d.disk(), nil },
		"faulty": func() (nbd.Device, error) {
			f := nbdtest.NewFaulty(d.disk())
			f.Fail(badSpot, 512, errors.New("medium error"))
			return f, nil
		},
		"held":   func() (nbd.Device, error) { d.remember(heldDisk); return d.held, nil },
		"file":   func() (nbd.Device, error) { return nbdfile.Open(path, nbdfile.Options{ReadOnly: true}) },
		"secret": func() (nbd.Device, error) { return nil, nbd.Refuse(nbd.ErrPolicy, "not for you", nil) },
	}
	t.Cleanup(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, m := range d.opened {
			if m.Closes() != 1 || m.Misuse() != nil {
				t.Errorf("a device was closed %d times, want once; misuse: %v", m.Closes(), m.Misuse())
			}
		}
	})
	return d
}

func (d *disks) disk() *nbdtest.Mem {
	m := nbdtest.NewMem(diskSize, diskSeed)
	d.remember(m)
	return m
}

func (d *disks) remember(m *nbdtest.Mem) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opened = append(d.opened, m)
}

// writeFile makes the file: data, a hole, and data.
func (d *disks) writeFile(t *testing.T) (path string) {
	t.Helper()
	d.file = nbdtest.Bytes(5<<19, 0, diskSeed+1)
	clear(d.file[1<<20 : 2<<20])
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := f.WriteAt(d.file[:1<<20], 0)
	_, err2 := f.WriteAt(d.file[2<<20:], 2<<20)
	if err := errors.Join(err1, err2, f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// world is our server with its disks, and the client's way to it.
type world struct {
	mode  mode
	disks *disks
	port  string
	tls   *tls.Config // nil in the clear
	ca    string      // folder with the CA of the server's certificate; "" in the clear
}

// mode is the way in which the client opens exports, and whether the server requires TLS.
type mode struct {
	name string
	how  string // see libnbd_client.ml
	tls  bool
}

// EXPORT_NAME over TLS is missing: libnbd uses it only with servers without GO. The dialogues
// of the original have it.
var modes = []mode{
	{name: "clear GO", how: "go"},
	{name: "clear GO simple replies", how: "go-simple"},
	{name: "clear EXPORT_NAME", how: "export-name"},
	{name: "clear EXPORT_NAME without zeroes", how: "export-name-no-zeroes"},
	{name: "TLS GO", how: "go", tls: true},
	{name: "TLS GO simple replies", how: "go-simple", tls: true},
}

func (m mode) isGo() bool { return m.how == "go" || m.how == "go-simple" }

// serve starts our server for the rest of the test.
func serve(t *testing.T, m mode) *world {
	t.Helper()
	w := &world{mode: m, disks: newDisks(t)}
	if m.tls {
		w.tls, w.ca = certificate(t)
	}
	w.start(t, w.disks)
	return w
}

// start starts a server, which replaces the previous one.
func (w *world) start(t *testing.T, exports nbd.Exporter) {
	t.Helper()
	s := &nbd.Server{Exporter: exports}
	if w.mode.tls {
		s.TLSConfig = w.tls
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil }
	}
	nc := nbdtest.Serve(t, s)()
	nc.Close()
	w.port = strconv.Itoa(nc.RemoteAddr().(*net.TCPAddr).Port)
}

// uri returns the URI of an export for the client. In the clear ca is "".
func (w *world) uri(export, ca string) string {
	u := client.URI{Network: "tcp", Addr: "localhost:" + w.port, Export: export, TLS: ca != "", TLSCertificates: ca}
	return u.String()
}

// run runs the client on an export. Single actions may fail, but not the client.
func (w *world) run(t *testing.T, action, export string, args ...string) facts {
	t.Helper()
	said, failure := libnbdClient.run(t, append([]string{action, w.mode.how, w.uri(export, w.ca)}, args...)...)
	if failure != "" {
		t.Fatalf("%s: %s", action, failure)
	}
	return said
}

// certificate makes a self-signed certificate for localhost, the only name that libnbd's
// client accepts here. It returns the configuration of a server that presents it, and the
// folder from which libnbd reads the CA that it trusts.
func certificate(t *testing.T) (server *tls.Config, caDir string) {
	t.Helper()
	cert := testcert.SelfSigned("localhost")
	caDir = t.TempDir()
	if err := cert.WriteCA(caDir); err != nil {
		t.Fatal(err)
	}
	return cert.ServerConfig(), caDir
}

// digest returns the client's output for bytes that it has read.
func digest(p []byte) string {
	sum := md5.Sum(p)
	return hex.EncodeToString(sum[:])
}
