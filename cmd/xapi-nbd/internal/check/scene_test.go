package check

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// scene is a host without faults. Tests inject faults and then call check.
type scene struct {
	t       *testing.T
	dir     string
	host    *xapitest.Host
	network string
	secrets []string // session refs that must not be printed

	facts Facts
	state string   // folder
	toml  string   // the configuration file
	args  []string // further flags

	template  x509.Certificate
	certFirst bool
	certMode  os.FileMode
	certPath  string
}

func newScene(t *testing.T) *scene {
	t.Helper()
	// Not t.TempDir: the path of a unix socket is short.
	dir, err := os.MkdirTemp("", "xn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	host, err := xapitest.Start(xapitest.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	now := time.Now()
	s := &scene{
		t: t, dir: dir, host: host, network: host.AddNetwork("nbd"),
		state: filepath.Join(dir, "state"), certMode: 0o400, certPath: filepath.Join(dir, "host.pem"),
		facts: Facts{
			Now: now, UID: 0, Owner: os.Geteuid(), UnitCertfile: "/nonexistent/xapi-ssl.pem",
			Hostname: "host1.example", Addresses: []string{"192.0.2.1", "2001:db8::1"},
			FreeSpace: func(string) (uint64, error) { return 1 << 30, nil },
			OpenFiles: func(int) (uint64, error) { return 4096, nil },
			PipeSize:  wantedPipe, Kernel: "4.19.0+1",
		},
		template: x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "host1.example"},
			DNSNames:    []string{"host1.example"},
			IPAddresses: []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")},
			NotBefore:   now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		},
	}
	if err := os.Mkdir(s.state, 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

// flags returns the flags of check for this scene.
func (s *scene) flags() []string {
	return append([]string{
		"--certfile=" + s.certPath, "--xapi-socket=" + s.host.Socket(), "--inventory=" + s.host.Inventory(),
		"--device-dir=" + s.host.DeviceDir(), "--state-dir=" + s.state,
		"--listen=unix:" + filepath.Join(s.dir, "nbd.sock"),
	}, s.args...)
}

// check runs the check on the scene.
func (s *scene) check() Report {
	s.t.Helper()
	s.writeCertificate()
	cfg := config.Default()
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	config.BindFlags(flags, &cfg)
	flags.String("ciphersuites", "", "")
	file := flags.String("config", s.file("xapi-nbd.toml", s.toml), "")
	if err := flags.Parse(s.flags()); err != nil {
		s.t.Fatal(err)
	}
	return *Run(s.t.Context(), s.facts, flags, *file)
}

// writeCertificate makes the file, unless a fault has made another.
func (s *scene) writeCertificate() {
	s.t.Helper()
	if _, err := os.Lstat(s.certPath); err == nil || s.certPath == "" {
		return
	}
	cert := testcert.Sign(&s.template, nil, nil)
	first, second := cert.KeyPEM(), cert.PEM()
	if s.certFirst {
		first, second = second, first
	}
	if err := os.WriteFile(s.certPath, append(first, second...), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chmod(s.certPath, s.certMode); err != nil { // independent of the umask
		s.t.Fatal(err)
	}
}

// inventory rewrites the host's inventory.
func (s *scene) inventory(change func(string) string) {
	s.t.Helper()
	text, err := os.ReadFile(s.host.Inventory())
	if err == nil {
		err = os.WriteFile(s.host.Inventory(), []byte(change(string(text))), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// journal writes lines to the journal.
func (s *scene) journal(lines ...string) {
	s.t.Helper()
	s.list(filepath.Base(vdi.JournalPath(s.state)), lines...)
}

// list writes lines to a list in the state folder.
func (s *scene) list(name string, lines ...string) {
	s.t.Helper()
	f, err := os.OpenFile(filepath.Join(s.state, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Join(lines, "\n") + "\n"); err != nil {
		s.t.Fatal(err)
	}
}

// found returns the findings about subject.
func (r *Report) found(subject string) (all []Finding) {
	for _, f := range r.Findings {
		if f.Subject == subject {
			all = append(all, f)
		}
	}
	return all
}

// file writes a file in the folder of the scene and returns its path.
func (s *scene) file(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	s.must(os.WriteFile(path, []byte(text), 0o600))
	return path
}

// session makes a session whose ref must not be printed.
func (s *scene) session(role xapitest.Role) string {
	ref := s.host.NewSession(role)
	s.secrets = append(s.secrets, ref, strings.TrimPrefix(ref, "OpaqueRef:"))
	return ref
}
