package check

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// wanted has parts of the texts of a finding that a fault must cause.
type wanted struct{ level, subject, detail, remedy string }

// fault is a fault of a host, and the findings about it.
type fault struct {
	name   string
	inject func(s *scene)
	want   []wanted
	// alone is set if it cannot be combined with other faults.
	alone bool
}

const leftVBD = "11111111-2222-3333-4444-555555555555"

// noCertificate is the finding about the networks' purpose for every unusable certificate.
var noCertificate = wanted{LevelProblem, "network purposes", "no usable certificate", "see certificate"}

var checkFaults = []fault{
	{"unknown key", func(s *scene) { s.toml += "prot = 1\n" },
		[]wanted{{LevelProblem, "configuration", `unknown key "prot"`, "Remove the key"}}, false},
	{"unknown key in a table", func(s *scene) { s.toml += "server.port = 1\n" },
		[]wanted{{LevelProblem, "configuration", `unknown key "server`, "Remove the key"}}, false},
	{"wrong type", func(s *scene) { s.toml += "max_vbds = \"many\"\n" },
		[]wanted{{LevelProblem, "configuration", "max_vbds: incompatible types", "Correct the value"}}, false},
	{"duration without a unit", func(s *scene) { s.toml += "idle_timeout = 30\n" },
		[]wanted{{LevelProblem, "configuration", "idle_timeout: want a duration with a unit", "Correct the value"}}, false},
	{"value out of range", func(s *scene) { s.toml += "linger = \"-1s\"\n" },
		[]wanted{{LevelProblem, "configuration", "linger must be", "Correct the flag or the key"}}, false},
	{"flag of nonsense", func(s *scene) { s.args = append(s.args, "--log-level=loud") },
		[]wanted{{LevelProblem, "configuration", `log_level must be debug, info, warning or error, got "loud"`, "Correct the flag"}}, false},
	{"ignored flag", func(s *scene) { s.args = append(s.args, "--ciphersuites=ALL") },
		[]wanted{{LevelWarning, "configuration", "--ciphersuites is ignored", "Drop the flag"}}, false},
	{"syntax", func(s *scene) { s.toml = "port =\n" },
		[]wanted{{LevelProblem, "configuration", "line 1", "does not start"}}, true},
	{"no such file", func(s *scene) { s.args = append(s.args, "--config=/nonexistent.toml") },
		[]wanted{{LevelProblem, "configuration", "/nonexistent.toml", "--config"}}, true},

	{"not root", func(s *scene) { s.facts.UID = 1000 },
		[]wanted{{LevelProblem, "user", "uid 1000", "as root"}}, true},
	{"lock without a control socket", holdLock,
		[]wanted{{LevelWarning, "service", "does not answer on its control socket", "systemctl restart xapi-nbd"}}, true},

	{"state folder is a file", func(s *scene) { s.args = append(s.args, "--state-dir="+s.file("file", "")) },
		[]wanted{{LevelProblem, "state folder", "is not a folder", "state_dir"}}, true},
	{"state folder below a file", func(s *scene) { s.args = append(s.args, "--state-dir="+s.file("file", "")+"/state") },
		[]wanted{{LevelProblem, "state folder", "not a directory", "state_dir"}}, true},
	{"state folder of somebody else", func(s *scene) { s.facts.Owner++ },
		[]wanted{{LevelProblem, "state folder", "belongs to uid", "chown"}}, false},
	{"state folder for everybody", func(s *scene) { s.must(os.Chmod(s.state, 0o777)) },
		[]wanted{{LevelProblem, "state folder", "others may write", "chmod go-w"}}, false},
	{"disk full", func(s *scene) { s.facts.FreeSpace = func(string) (uint64, error) { return 4096, nil } },
		[]wanted{{LevelProblem, "state folder", "4 KiB are free", "Make room"}}, false},
	{"disk nearly full", func(s *scene) { s.facts.FreeSpace = func(string) (uint64, error) { return 8 << 20, nil } },
		[]wanted{{LevelWarning, "state folder", "8 MiB are free", "Make room"}}, true},
	{"file system fails", func(s *scene) { s.facts.FreeSpace = func(string) (uint64, error) { return 0, unix.EIO } },
		[]wanted{{LevelProblem, "state folder", "input/output error", ""}}, true},
	{"VBD left behind", func(s *scene) { s.journal(leftVBD) },
		[]wanted{{LevelWarning, "journal", leftVBD, "xapi-nbd cleanup"}}, false},
	{"odd journal", func(s *scene) { s.journal("not a uuid") },
		[]wanted{{LevelWarning, "journal", "1 line is", "Nothing has to be done"}}, false},
	{"journal is a folder", func(s *scene) { s.must(os.Mkdir(vdi.JournalPath(s.state), 0o700)) },
		[]wanted{{LevelProblem, "journal", "is a directory", "by hand"}}, true},
	{"unanswered create", func(s *scene) { s.list("VBD_creates_pending", "nonce 1767225600 "+leftVBD) },
		[]wanted{{LevelWarning, "journal", "1 unanswered call may still be executed by xapi: VDI " + leftVBD + " since 2026-01-01T00:00:00Z", "xapi-nbd cleanup"}}, false},
	{"list of creates is a folder", func(s *scene) { s.must(os.Mkdir(filepath.Join(s.state, "VBD_creates_pending"), 0o700)) },
		[]wanted{{LevelProblem, "journal", "is a directory", "found by their tag"}}, true},
	{"tagged VBD", tagVBD,
		[]wanted{{LevelWarning, "journal", "1 VBD is left behind", "xapi-nbd cleanup"}}, true},

	{"writing without the drop-in", func(s *scene) {
		s.toml += "allow_write = true\n"
		s.facts.Unit = "[Service]\nDevicePolicy=closed\nDeviceAllow=block-* r\n"
	}, []wanted{
		{LevelWarning, "writing", "block devices for reading only", "write.conf"},
		{LevelOK, "writing", "blocked-operations:start", ""},
	}, false},
	{"writing", func(s *scene) { s.toml += "allow_write = true\n" },
		[]wanted{{LevelOK, "writing", "blocked-operations:start", ""}}, true},

	{"no xapi", func(s *scene) { s.host.Stop() },
		[]wanted{{LevelProblem, "xapi socket", "does not exist", "systemctl start xapi"}}, true},
	{"xapi's socket is a file", func(s *scene) { s.args = append(s.args, "--xapi-socket="+s.file("x", "")) },
		[]wanted{{LevelProblem, "xapi socket", "is not a socket", "xapi_socket"}}, true},
	{"nobody listens", staleSocket,
		[]wanted{{LevelProblem, "xapi socket", "connection refused", "systemctl status xapi"}}, true},
	{"xapi is booting", func(s *scene) { s.host.Booting(true) },
		[]wanted{{LevelProblem, "xapi login", "HOST_STILL_BOOTING", "Wait"}}, true},
	{"xapi hangs up", func(s *scene) { s.host.DropConnection("session.login_with_password") },
		[]wanted{{LevelProblem, "xapi login", "login_with_password", "does not answer"}}, true},
	{"no inventory", func(s *scene) { s.must(os.Remove(s.host.Inventory())) },
		[]wanted{{LevelProblem, "inventory", "no such file", "xensource-inventory"}}, true},
	{"inventory without host", func(s *scene) {
		s.inventory(func(text string) string { return strings.ReplaceAll(text, "INSTALLATION_UUID", "OTHER") })
	}, []wanted{{LevelProblem, "inventory", "no valid INSTALLATION_UUID", "xe host-list"}}, false},
	{"inventory with a blank behind a quote", func(s *scene) {
		s.inventory(func(text string) string {
			return strings.ReplaceAll(text, s.host.ControlDomainUUID()+"'", s.host.ControlDomainUUID()+"' ")
		})
	}, []wanted{{LevelProblem, "inventory", "no valid CONTROL_DOMAIN_UUID", "xe vm-list"}}, true},
	{"inventory of another host", func(s *scene) {
		s.inventory(func(text string) string { return strings.ReplaceAll(text, s.host.ControlDomainUUID(), leftVBD) })
	}, []wanted{{LevelProblem, "control domain", "xapi does not know " + leftVBD, "xe vm-list"}}, false},
	{"inventory with another host", func(s *scene) {
		s.inventory(func(text string) string { return strings.ReplaceAll(text, s.host.InstallationUUID(), leftVBD) })
	}, []wanted{{LevelProblem, "host", "xapi does not know " + leftVBD, "xe host-list"}}, true},
	{"hosts cannot be asked for", func(s *scene) { s.host.FailAlways("host.get_by_uuid", "INTERNAL_ERROR", "no") },
		[]wanted{{LevelProblem, "host", "INTERNAL_ERROR", "xensource.log"}}, true},
	{"control domain of another host", func(s *scene) { s.host.OtherControlDomain() },
		[]wanted{{LevelProblem, "host", "is not the host of the control domain", "two hosts"}}, true},
	{"xapi fails", func(s *scene) { s.host.FailAlways("VM.get_by_uuid", "INTERNAL_ERROR", "no") },
		[]wanted{{LevelProblem, "control domain", "INTERNAL_ERROR", "xensource.log"}}, true},
	{"VBDs cannot be listed", func(s *scene) { s.host.FailAlways("VBD.get_all_records_where", "INTERNAL_ERROR", "no") },
		[]wanted{{LevelProblem, "journal", "INTERNAL_ERROR", "xensource.log"}}, true},
	{"cannot log out", func(s *scene) { s.host.DropConnection("session.logout") },
		[]wanted{{LevelWarning, "xapi login", "cannot log out", "by itself"}}, false},

	{"contradictory purposes", func(s *scene) { s.host.AddNetwork("insecure_nbd") },
		[]wanted{{LevelProblem, "network purposes", "contradictory", "network-param-remove"}}, false},
	{"no purpose", func(s *scene) { s.host.SetPurposes(s.network) },
		[]wanted{{LevelProblem, "network purposes", "no network has the purpose nbd", "network-param-add"}}, true},
	{"purposes cannot be asked", func(s *scene) { s.host.FailAlways("network.get_all_records", "SESSION_INVALID", s.session(0)) },
		[]wanted{{LevelProblem, "network purposes", "SESSION_INVALID", "refused"}}, true},
	{"TLS switched off", func(s *scene) { s.args = append(s.args, "--tls=off") },
		[]wanted{{LevelWarning, "network purposes", `tls = "off"`, `tls = "xapi"`}}, true},

	{"no certificate set", func(s *scene) { s.certPath = "" },
		[]wanted{{LevelWarning, "certificate", "no certfile is set", "Set certfile"}, noCertificate}, true},
	{"no certificate", func(s *scene) { s.args = append(s.args, "--certfile=/nonexistent.pem") },
		[]wanted{{LevelProblem, "certificate", "/nonexistent.pem", "xe host-reset-server-certificate"}, noCertificate}, true},
	{"TLS required without a certificate", func(s *scene) { s.certPath = ""; s.args = append(s.args, "--tls=require") },
		[]wanted{{LevelProblem, "configuration", "needs a certfile", "Correct"}, {LevelWarning, "certificate", "no certfile", ""}, noCertificate}, true},
	{"certificate of nonsense", func(s *scene) { s.file("host.pem", "nonsense") },
		[]wanted{{LevelProblem, "certificate", "holds no PEM block", "xe host-reset-server-certificate"}, noCertificate}, true},
	{"key of another certificate", mismatch,
		[]wanted{{LevelProblem, "certificate", "does not belong", "xe host-reset-server-certificate"}, noCertificate}, true},
	{"damaged chain", func(s *scene) {
		s.writeCertificate()
		data, err := os.ReadFile(s.certPath)
		s.must(err)
		s.must(os.Remove(s.certPath))
		s.file("host.pem", string(data)+"-----BEGIN CERTIFICATE-----\n")
	}, []wanted{{LevelWarning, "certificate file", "left out: certificate 2: damaged", "Install"}}, true},
	{"certificate first", func(s *scene) { s.certFirst = true },
		[]wanted{{LevelWarning, "certificate file", "before the key", "key first"}}, false},
	{"key for everybody", func(s *scene) { s.certMode = 0o444 },
		[]wanted{{LevelProblem, "certificate file", "can be read by every user", "chmod 0400"}}, false},
	{"expired", func(s *scene) { s.facts.Now = s.facts.Now.AddDate(2, 0, 0) },
		[]wanted{{LevelProblem, "certificate time", "expired on", "Renew"}}, false},
	{"expires soon", func(s *scene) { s.facts.Now = s.template.NotAfter.Add(-10*24*time.Hour - time.Hour) },
		[]wanted{{LevelWarning, "certificate time", "ends in 10 days", "Renew"}}, true},
	{"not valid yet", func(s *scene) { s.facts.Now = s.facts.Now.AddDate(-1, 0, 0) },
		[]wanted{{LevelProblem, "certificate time", "not valid before", "clock"}}, true},
	{"other names", func(s *scene) { s.facts.Hostname, s.facts.Addresses = "host2.example", []string{"192.0.2.2"} },
		[]wanted{{LevelWarning, "certificate names", "host2.example, 192.0.2.2", "verify"}}, false},

	{"no device folder", func(s *scene) { s.args = append(s.args, "--device-dir=/nonexistent") },
		[]wanted{{LevelProblem, "device folder", "no such file", "device_dir"}}, false},
	{"device folder is a file", func(s *scene) { s.args = append(s.args, "--device-dir="+s.file("file", "")) },
		[]wanted{{LevelProblem, "device folder", "is not a folder", "device_dir"}}, true},

	{"port in use", listenThere,
		[]wanted{{LevelProblem, "address", "is in use by process", "choose another"}}, false},
	{"port of metrics in use", func(s *scene) {
		listenThere(s)
		last := len(s.args) - 1
		s.toml += "metrics = \"" + strings.TrimPrefix(s.args[last], "--listen=") + "\"\n"
		s.args = s.args[:last]
	}, []wanted{{LevelProblem, "address", "is in use by process", "choose another"}}, false},
	{"any port", func(s *scene) { s.args = append(s.args, "--listen=127.0.0.1:0") },
		[]wanted{{LevelWarning, "address", "127.0.0.1:0: the system chooses a free port", "10809"}}, false},
	{"socket is a file", func(s *scene) { s.args = append(s.args, "--listen=unix:"+s.file("nosocket", "")) },
		[]wanted{{LevelProblem, "address", "is no socket", "Move it away"}}, false},
	{"socket in use", socketThere,
		[]wanted{{LevelProblem, "address", "is listened on by process", "listen"}}, false},
	{"no folder for the socket", func(s *scene) { s.args = append(s.args, "--listen=unix:/nonexistent/nbd.sock") },
		[]wanted{{LevelProblem, "address", "cannot be made", "Make the folder"}}, false},

	{"few descriptors", func(s *scene) { s.facts.OpenFiles = func(int) (uint64, error) { return 100, nil } },
		[]wanted{{LevelProblem, "open files", "may have 100", "LimitNOFILE=1904"}}, true},
	{"few descriptors for all together", func(s *scene) { s.facts.OpenFiles = func(int) (uint64, error) { return 50, nil } },
		[]wanted{{LevelProblem, "open files", "may have 50", "LimitNOFILE="}}, false},
	{"limit unknown", func(s *scene) { s.facts.OpenFiles = func(int) (uint64, error) { return 0, unix.EPERM } },
		[]wanted{{LevelWarning, "open files", "not permitted", "root"}}, true},
	{"small pipes", func(s *scene) { s.facts.PipeSize = 64 << 10 },
		[]wanted{{LevelWarning, "pipes", "64 KiB", "CAP_SYS_RESOURCE"}}, false},
	{"old kernel", func(s *scene) { s.facts.Kernel = "3.10.0" },
		[]wanted{{LevelWarning, "kernel", "3.10.0 is older than 4.19", "nobody has tried"}}, false},
	{"kernel without splice", func(s *scene) { s.facts.Splice = errors.New("splice: function not implemented") },
		[]wanted{{LevelWarning, "kernel", "splice: function not implemented", "does without"}}, true},
}

func (s *scene) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// holdLock has this process hold the lock of the state folder.
func holdLock(s *scene) {
	f, err := os.Create(vdi.LockPath(s.state))
	s.must(err)
	s.t.Cleanup(func() { f.Close() })
	s.must(unix.Flock(int(f.Fd()), unix.LOCK_EX))
}

// tagVBD makes a VBD with the service's tag that is in no journal, and one of another tool.
func tagVBD(s *scene) {
	const tagKey = "xapi-nbd"
	disk, err := s.host.AddVDI(xapitest.VDISpec{Image: s.file("image", string(make([]byte, 4096)))})
	s.must(err)
	for _, config := range []map[string]string{{tagKey: s.host.InstallationUUID() + " nonce"}, {tagKey: "another-host nonce"}, nil} {
		_, err := s.host.AddForeignVBD(disk, config)
		s.must(err)
	}
}

// staleSocket puts a socket without a listener at the path of xapi's socket.
func staleSocket(s *scene) {
	path := filepath.Join(s.dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	s.must(err)
	l.SetUnlinkOnClose(false)
	s.must(l.Close())
	s.args = append(s.args, "--xapi-socket="+path)
}

// mismatch puts the key of one certificate before another one.
func mismatch(s *scene) {
	s.writeCertificate()
	first, err := os.ReadFile(s.certPath)
	s.must(err)
	s.must(os.Remove(s.certPath))
	s.writeCertificate()
	second, err := os.ReadFile(s.certPath)
	s.must(err)
	const begin = "-----BEGIN CERTIFICATE"
	key, _, _ := strings.Cut(string(first), begin)
	_, cert, _ := strings.Cut(string(second), begin)
	s.must(os.Remove(s.certPath))
	s.file("host.pem", key+begin+cert)
}

func listenThere(s *scene) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	s.must(err)
	s.t.Cleanup(func() { l.Close() })
	s.args = append(s.args, "--listen="+l.Addr().String())
}

func socketThere(s *scene) {
	path := filepath.Join(s.dir, "taken")
	l, err := net.Listen("unix", path)
	s.must(err)
	s.t.Cleanup(func() { l.Close() })
	s.args = append(s.args, "--listen=unix:"+path)
}
