package main

import (
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

const vdiUUID = "0E0FBA52-7b2e-4b1e-8d3b-5d3a1f1c2b3a"

// hostExport serves the VDI to the session as a XenServer host names them.
func hostExport() nbd.Exporter {
	return exporterFunc(func(name string) (nbd.Device, error) {
		if name == "/"+strings.ToLower(vdiUUID)+"?session_id="+secret {
			return nbdtest.NewMem(4096, 1), nil
		}
		return nil, nbd.Refuse(nbd.ErrPolicy, "no such disk", nil)
	})
}

// hostArgs are the flags for a server of the test.
func hostArgs(t *testing.T, addr string, more ...string) []string {
	t.Helper()
	host, port, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(addr, "nbd://"), "/"), ":")
	return append([]string{"--host=" + host, "--port=" + port}, more...)
}

func TestHost(t *testing.T) {
	session := "--session-file=" + writeFile(t, "session", []byte("\n "+secret+"\n"))
	vdi := "--vdi=" + vdiUUID
	clear := hostArgs(t, serve(t, hostExport()), "--no-tls", vdi, session)
	want := string(nbdtest.Bytes(4096, 0, 1))
	if got := succeed(t, append([]string{"size"}, clear...)...); got != "4096\n" {
		t.Errorf("size: got %q", got)
	}
	if got := succeed(t, append([]string{"info"}, clear...)...); !strings.Contains(got, "/"+strings.ToLower(vdiUUID)+"?session_id=<session>\n") {
		t.Errorf("info: got\n%s", got)
	}
	if got := succeed(t, append([]string{"map"}, clear...)...); !strings.Contains(got, "data") {
		t.Errorf("map: got\n%s", got)
	}
	if got := succeed(t, append([]string{"copy", "-"}, clear...)...); got != want {
		t.Error("copy: wrong data")
	}
	dst := writeFile(t, "dst", []byte(serveRAM(t, nbdtest.NewRAM(make([]byte, 4096)))))
	succeed(t, append([]string{"copy", "--verify", "--dst-uri-file=" + dst}, clear...)...)
	fail(t, exitFailed, []string{"NBD_OPT_LIST", "NBD_REP_ERR_POLICY"}, append([]string{"list"}, clear[:3]...)...)

	stdin := append([]string{"size"}, clear[:4]...)
	if r := toolWith(t, t.Context(), secret+"\n", append(stdin, "--session-file=-")...); r.code != exitOK || r.out != "4096\n" {
		t.Errorf("session from standard input: %+v", r)
	}
}

// Without --no-tls the session is not sent to a server without TLS.
func TestHostOverTLS(t *testing.T) {
	serverTLS, _ := nbdtest.TLS(t)
	dir, _ := certificateFiles(t, serverTLS)
	session := "--session-file=" + writeFile(t, "session", []byte(secret))
	encrypted := hostArgs(t, serveTLS(t, hostExport(), serverTLS), "--vdi="+vdiUUID, session)
	for _, trust := range [][]string{
		{"--tls-ca=" + dir + "/ca-cert.pem"}, {"--tls-certificates=" + dir}, {"--tls-insecure"},
		{"--tls-certificates=" + dir, "--tls-hostname=" + nbdtest.ServerName},
	} {
		if got := succeed(t, append(append([]string{"size"}, encrypted...), trust...)...); got != "4096\n" {
			t.Errorf("%q: got %q", trust, got)
		}
	}
	fail(t, exitFailed, []string{"--tls-ca FILE"}, append([]string{"size"}, encrypted...)...)
	fail(t, exitFailed, []string{"--tls-hostname NAME"}, append([]string{"size", "--tls-certificates=" + dir, "--tls-hostname=other"}, encrypted...)...)
	fail(t, exitFailed, []string{"NBD_REP_ERR_TLS_REQD", "without --no-tls"}, append([]string{"size", "--no-tls"}, encrypted...)...)

	clear := hostArgs(t, serve(t, hostExport()), "--vdi="+vdiUUID, session)
	fail(t, exitFailed, []string{"NBD_OPT_STARTTLS", "--no-tls"}, append([]string{"size", "--tls-insecure"}, clear...)...)
}

func TestHostUsage(t *testing.T) {
	session := "--session-file=" + writeFile(t, "session", []byte(secret))
	vdi := "--vdi=" + vdiUUID
	file := func(text string) string { return "--session-file=" + writeFile(t, "session", []byte(text)) }
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"no host", []string{"size", vdi, session, "nbd://h"}, "need --host"},
		{"no host for the port", []string{"size", "--port=1", "nbd://h"}, "need --host"},
		{"no VDI", []string{"size", "--host=h", session}, "--host needs --vdi and --session-file"},
		{"no session", []string{"map", "--host=h", vdi}, "--host needs --vdi and --session-file"},
		{"URI too", []string{"size", "--host=h", vdi, session, "nbd://h"}, "want one URI"},
		{"URI file too", []string{"size", "--host=h", "--uri-file=/dev/null", vdi, session}, "both name the server"},
		{"name for a UUID", []string{"size", "--host=h", "--vdi=my disk", session}, "--vdi is a UUID"},
		{"session for a UUID", []string{"size", "--host=h", "--vdi=5e55-10n", session}, "--vdi is a UUID"},
		{"port in the host", []string{"size", "--host=h:10809", vdi, session}, "the port is --port"},
		{"URI for a host", []string{"size", "--host=nbd://h/", vdi, session}, "the port is --port"},
		{"port 0", []string{"size", "--host=h", "--port=0", vdi, session}, "1 to 65535"},
		{"port too large", []string{"size", "--host=h", "--port=65536", vdi, session}, "65536"},
		{"empty session", []string{"size", "--host=h", vdi, file("\n")}, "holds no session"},
		{"another session", []string{"size", "--host=h", vdi, file("session=" + secret)}, "holds no session"},
		{"two sessions", []string{"size", "--host=h", vdi, file(secret + "\n" + secret)}, "more than one line"},
		{"TLS flags without TLS", []string{"size", "--host=h", "--no-tls", "--tls-insecure", vdi, session}, "need TLS"},
		{"one standard input", []string{"copy", "--host=h", vdi, "--session-file=-", "--dst-uri-file=-"}, "standard input can hold only one"},
		{"arguments", []string{"copy", "--host=h", vdi, session, "a", "b"}, "want SRC and DST"},
		{"negative timeout", []string{"size", "--timeout=-1s", "nbd://h"}, "--timeout must be 0 or more"},
		{"timeout without a unit", []string{"copy", "--timeout=60", "a", "b"}, "--timeout"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { fail(t, exitUsage, []string{tt.want}, tt.args...) })
	}
	fail(t, exitFailed, []string{"no such file"}, "size", "--host=h", vdi, "--session-file=/no/such/file")
}

func TestHostNames(t *testing.T) {
	for host, want := range map[string]string{
		"xs1": "xs1:1", "xs1.example.com": "xs1.example.com:1", "192.0.2.1": "192.0.2.1:1", "::1": "[::1]:1", "[::1]": "[::1]:1",
		"fe80::1%eth0": "[fe80::1%eth0]:1", "": "", "h:1": "", "h/x": "", "a b": "", "[h]": "", "[192.0.2.1]": "", "h%3F": "",
	} {
		f := hostFlags{host: host, port: 1}
		if !f.given() || !isHost(host) {
			if want != "" {
				t.Errorf("%q is refused", host)
			}
			continue
		}
		u, err := f.uri(nil)
		if err != nil || u.Addr != want {
			t.Errorf("%q: got %v, %v; want %q", host, u, err, want)
		}
	}
}

// A session from the command line is redacted wherever a server repeats it, also without the
// prefix that marks a session.
func TestHostSessionStaysSecret(t *testing.T) {
	addr := serve(t, exporterFunc(func(name string) (nbd.Device, error) {
		_, bare, _ := strings.Cut(name, "OpaqueRef:")
		return nil, nbd.Refuse(nbd.ErrPolicy, bare+" is unknown", nil)
	}))
	uri := addr + "x%3Fsession_id=OpaqueRef%3A5e55-10n"
	session := writeFile(t, "session", []byte(secret))
	for _, args := range [][]string{
		hostArgs(t, addr, "--no-tls", "--vdi="+vdiUUID, "--session-file="+session),
		{"--uri-file=" + writeFile(t, "uri", []byte(uri))},
		{uri},
	} {
		checkFailure(t, tool(t, append([]string{"size"}, args...)...), exitFailed, ": <session> is unknown")
		checkFailure(t, tool(t, append(append([]string{"copy"}, args...), "-")...), exitFailed)
	}
}
