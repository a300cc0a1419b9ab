package main

import (
	"bytes"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// hostMirror is an nbd-tool mirror between two disks that two hosts export for writing, over
// TLS.
type hostMirror struct {
	t                *testing.T
	source, target   *migrationHost
	primary, second  string // uuids of the VDIs
	tool, ctl, links string // the program; its control socket; the socket for clients
	cmd              *exec.Cmd
	output           bytes.Buffer // read after the process has ended
}

// startHostMirror starts the mirror as a daemon would run, and returns when it serves.
func startHostMirror(t *testing.T, nbdTool string, content []byte, flags ...string) *hostMirror {
	t.Helper()
	dir, err := os.MkdirTemp("", "mirror") // t.TempDir may be too long for a socket
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &hostMirror{
		t: t, source: newMigrationHost(t), target: newMigrationHost(t), tool: nbdTool,
		ctl: filepath.Join(dir, "ctl"), links: filepath.Join(dir, "nbd"),
	}
	m.primary = m.source.addVDI(content, xapitest.VDISpec{NameLabel: "old"})
	m.second = m.target.addVDI(random(1, len(content)), xapitest.VDISpec{NameLabel: "new"})
	uriFile := func(h *migrationHost, name, vdi string) string {
		export := "/" + vdi + "?session_id=" + h.clients[0] + "&mode=rw"
		uri := url.URL{Scheme: "nbds", Host: h.gate.addr, Path: "/" + export}
		uri.RawQuery = url.Values{"tls-certificates": {h.trust.ClientDir}}.Encode()
		return h.file(name, uri.String())
	}
	m.cmd = exec.CommandContext(t.Context(), nbdTool, append([]string{
		"mirror", "--listen=unix:" + m.links, "--control=unix:" + m.ctl, "--timeout=2s",
		"--primary-uri-file=" + uriFile(m.source, "one", m.primary), "--secondary-uri-file=" + uriFile(m.target, "two", m.second),
	}, flags...)...)
	serving, err := m.cmd.StdoutPipe()
	must(t, err)
	m.cmd.Stderr = &m.output
	must(t, m.cmd.Start())
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	})
	line := make([]byte, len("listening on "))
	if _, err := serving.Read(line); err != nil {
		_ = m.cmd.Wait()
		t.Fatalf("%v: %s", err, m.output.String())
	}
	return m
}

// control runs nbd-tool ctl.
func (m *hostMirror) control(args ...string) (out string, err error) {
	b, err := exec.CommandContext(m.t.Context(), m.tool, append([]string{"ctl", m.ctl}, args...)...).CombinedOutput()
	return string(b), err
}

// mustControl runs nbd-tool ctl, which must succeed.
func (m *hostMirror) mustControl(args ...string) string {
	m.t.Helper()
	out, err := m.control(args...)
	if err != nil {
		m.t.Fatalf("ctl %s: %v\n%s", args, err, out)
	}
	return out
}

// hostMirrorStatus is what is needed of the state.
type hostMirrorStatus struct {
	State    string
	Complete bool
	Sent     int64
}

func (m *hostMirror) status() (s hostMirrorStatus) {
	m.t.Helper()
	must(m.t, json.Unmarshal([]byte(m.mustControl("status", "--json")), &s))
	return s
}

// end stops the process, and returns its exit code and its error output. Afterwards no host has
// a VBD of the service.
func (m *hostMirror) end() (code int, errOut string) {
	m.t.Helper()
	must(m.t, m.cmd.Process.Signal(syscall.SIGTERM))
	_ = m.cmd.Wait()
	for _, h := range []*migrationHost{m.source, m.target} {
		h.waitClean(h.p)
	}
	return m.cmd.ProcessState.ExitCode(), m.output.String()
}

// images returns the content of both disks.
func (m *hostMirror) images() (primary, second []byte) {
	m.t.Helper()
	primary, err := os.ReadFile(m.source.host.ImagePath(m.primary))
	must(m.t, err)
	second, err = os.ReadFile(m.target.host.ImagePath(m.second))
	must(m.t, err)
	return primary, second
}

// TestMirrorBetweenHosts: fio writes through a mirror between two writable exports, and goes on
// on the second one after the pivot. Both disks have what fio expects.
func TestMirrorBetweenHosts(t *testing.T) {
	fio := requires.Tool(t, "fio")
	const size = 16 << 20
	m := startHostMirror(t, buildTool(t), random(2, size))
	job := func(name, offset string, more ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), fio, append([]string{
			"--name=" + name, "--offset=" + offset, "--size=8m", "--bs=4k", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1",
		}, more...)...)
		cmd.Dir = t.TempDir()
		return cmd
	}
	through := []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + m.links, "--iodepth=8"}
	if out, err := job("first", "0", through...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.mustControl("wait")
	before := m.status().Sent
	second := job("second", "8m", append(through, "--rate_iops=500")...)
	var output bytes.Buffer
	second.Stdout, second.Stderr = &output, &output
	must(t, second.Start())
	for m.status().Sent < before+200*4096 { // each takes a process
	}
	m.mustControl("complete", "--pivot", "--verify")
	old, _ := m.images()
	if err := second.Wait(); err != nil { // it verifies what it has written
		t.Fatalf("%v\n%s", err, output.String())
	}
	if code, errOut := m.end(); code != 0 {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	primary, _ := m.images()
	if !bytes.Equal(primary, old) {
		t.Error("the primary was written after the pivot")
	}
	verify := []string{"--verify_only", "--ioengine=psync"}
	target := m.target.host.ImagePath(m.second)
	for _, cmd := range []*exec.Cmd{
		job("first", "0", append(verify, "--filename="+m.source.host.ImagePath(m.primary))...),
		job("first", "0", append(verify, "--filename="+target)...),
		job("second", "8m", append(verify, "--filename="+target)...),
	} {
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%q: %v\n%s", cmd.Args, err, out)
		}
	}
	if job("second", "8m", append(verify, "--filename="+m.source.host.ImagePath(m.primary))...).Run() == nil {
		t.Error("fio has written nothing after the pivot: that is no test")
	}
}

// TestMirrorBetweenHostsFaults: after one fault each the primary has what its client wrote, and the
// secondary is equal or is not called complete.
func TestMirrorBetweenHostsFaults(t *testing.T) {
	nbdTool := buildTool(t)
	for _, tt := range []struct {
		name   string
		fault  func(m *hostMirror)
		goesOn bool // the mirror can be completed
	}{
		{"the service of the target is killed", func(m *hostMirror) { m.target.kill(); m.target.start() }, true},
		{"the service of the source is killed", func(m *hostMirror) { m.source.kill(); m.source.start() }, true},
		{"connections to the target are cut", func(m *hostMirror) { m.target.gate.cut() }, true},
		{"connections to the source are cut", func(m *hostMirror) { m.source.gate.cut() }, true},
		{"the device of the target is taken away", func(m *hostMirror) { m.target.takeAway() }, true},
		{"the session of the target is logged out", func(m *hostMirror) { m.target.logOut(); m.target.waitReleased() }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			want := random(3, 8<<20)
			retry := "60s"
			if !tt.goesOn {
				retry = "1s"
			}
			m := startHostMirror(t, nbdTool, want, "--retry-for="+retry)
			c, err := client.Dial(t.Context(), "unix", m.links, nil)
			must(t, err)
			conn, err := c.Go(t.Context(), "")
			must(t, err)
			write := func(seed uint64) {
				t.Helper()
				for off := int64(0); off < int64(len(want)); off += 1 << 20 {
					p := random(seed+uint64(off), 64<<10)
					must(t, conn.Write(t.Context(), p, off+512, false))
					copy(want[off+512:], p)
				}
			}
			m.mustControl("wait")
			write(4)
			tt.fault(m)
			write(5)
			_ = conn.Flush(t.Context()) // may report that writes may have been lost
			if tt.goesOn {
				m.mustControl("complete", "--pivot", "--verify")
			} else if out, err := m.control("complete", "--pivot"); err == nil || !strings.Contains(out, "complete: ") {
				t.Errorf("complete: got %v, %q, want an error", err, out)
			}
			complete := m.status().Complete
			must(t, conn.Close())
			code, errOut := m.end()
			if complete != tt.goesOn || (code == 0) != complete || strings.Contains(errOut, "NOT complete") == complete {
				t.Errorf("complete: %v, exit code %d, error output %s", complete, code, errOut)
			}
			primary, second := m.images()
			if !bytes.Equal(primary, want) {
				t.Error("the primary does not have what was written")
			}
			if complete && !bytes.Equal(second, want) {
				t.Error("the secondary is called complete, and differs")
			}
		})
	}
}
