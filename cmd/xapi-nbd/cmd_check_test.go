package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/check"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/internal/testcert"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// TestCheckBesideTheService: check finds no problem beside a running service, whose lock,
// sockets and journal it leaves alone.
func TestCheckBesideTheService(t *testing.T) {
	s := newCheckScene(t)
	image := random(1, 1<<20)
	vdi := s.addVDI(image, xapitest.VDISpec{})
	socket := filepath.Join(s.dir, "nbd.sock")
	p := s.start("--state-dir="+s.state, "--listen=unix:"+socket)
	conn, err := s.open(p, s.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	report := s.check("--listen=" + p.addr)
	for _, f := range report.Findings {
		if f.Level != check.LevelOK {
			t.Errorf("found, and not wanted: %+v", f)
		}
	}
	for what, detail := range map[string]string{
		"service": "running, process", "journal": "1 VBD, which the running service uses or removes", "open files": "the running service",
	} {
		if f := found(report, what); len(f) != 1 || !strings.Contains(f[0].Detail, detail) {
			t.Errorf("%s: got %+v, want %q", what, f, detail)
		}
	}
	for _, f := range found(report, "address") {
		if !strings.Contains(f.Detail, "is listened on by the running service") {
			t.Errorf("got %+v", f)
		}
	}
	got := make([]byte, len(image))
	if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
		t.Errorf("read beside check: %v", err)
	}
}

func TestCheckCommand(t *testing.T) {
	requires.Root(t)
	s := newCheckScene(t)
	tests := []struct {
		name string
		args []string
		code int
		want string // on standard output
	}{
		// This machine may give reasons for warnings.
		{"fine", nil, 0, "\n0 problems, "},
		{"problem", []string{"--state-dir=" + s.file("file", "")}, exitFailed, "problem  state folder — "},
		{"JSON", []string{"--json"}, 0, `"problems": 0`},
		{"unknown flag", []string{"--nonsense"}, exitUsage, ""},
		{"argument", []string{"everything"}, exitUsage, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			args := append([]string{"check", "--config=" + s.file("xapi-nbd.toml", "")}, append(s.flags(), tt.args...)...)
			if code := run(t.Context(), args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code: got %d, want %d\n%s%s", code, tt.code, stdout.String(), stderr.String())
			}
			if !strings.Contains(stdout.String(), tt.want) {
				t.Errorf("got %q, want it to contain %q", stdout.String(), tt.want)
			}
		})
	}
}

// checkScene is a host without faults, for check and for a service.
type checkScene struct {
	*world
	cert  string // file
	state string // folder
}

func newCheckScene(t *testing.T) *checkScene {
	t.Helper()
	w := newWorld(t, xapitest.Config{})
	w.host.SetPurposes(w.network, "nbd")
	s := &checkScene{world: w, cert: filepath.Join(w.dir, "host.pem"), state: filepath.Join(w.dir, "state")}
	cert := testcert.Sign(testcert.Server("host1.example", "192.0.2.1"), nil, nil)
	if err := errors.Join(os.Mkdir(s.state, 0o755), os.WriteFile(s.cert, append(cert.KeyPEM(), cert.PEM()...), 0o400)); err != nil {
		t.Fatal(err)
	}
	return s
}

// flags returns the flags of check for this scene.
func (s *checkScene) flags() []string {
	return []string{
		"--certfile=" + s.cert, "--xapi-socket=" + s.host.Socket(), "--inventory=" + s.host.Inventory(),
		"--device-dir=" + s.host.DeviceDir(), "--state-dir=" + s.state,
		"--listen=unix:" + filepath.Join(s.dir, "nbd.sock"),
	}
}

// check runs the check, with the facts of a machine without faults.
func (s *checkScene) check(more ...string) *check.Report {
	s.t.Helper()
	cfg := config.Default()
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	config.BindFlags(flags, &cfg)
	if err := flags.Parse(append(s.flags(), more...)); err != nil {
		s.t.Fatal(err)
	}
	f := check.Observe()
	f.UID, f.Hostname, f.Addresses = 0, "host1.example", []string{"192.0.2.1"}
	f.FreeSpace = func(string) (uint64, error) { return 1 << 30, nil }
	f.PipeSize, f.Kernel, f.Splice, f.Nowait = 2<<20, "4.19.0+1", nil, nil
	return check.Run(s.t.Context(), f, flags, s.file("xapi-nbd.toml", ""))
}

// found returns the findings about subject.
func found(r *check.Report, subject string) (all []check.Finding) {
	for _, f := range r.Findings {
		if f.Subject == subject {
			all = append(all, f)
		}
	}
	return all
}
