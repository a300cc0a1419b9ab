package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// migrationHost is a host of a migration: xapi, the service, and the network between it and
// the clients.
type migrationHost struct {
	*world
	p       *process
	gate    *gate
	config  string // path
	logins  string // path of the file with the sessions for logins
	clients []string
}

// loginsAtOnce is how many sessions are there for logins: enough for all commands of a test.
const loginsAtOnce = 40

func newMigrationHost(t *testing.T) *migrationHost {
	t.Helper()
	cfg := xapitest.Config{Style: xapitest.StyleNBD}
	if os.Getuid() == 0 {
		requires.LoopDevices(t)
		cfg.Loop = true
	}
	h := &migrationHost{world: newWorld(t, cfg), gate: newGate(t)}
	h.host.SetPurposes(h.network, "nbd")
	h.config = h.file("service.toml", "allow_write = true\nsession_recheck = \"200ms\"\n")
	h.allowLogins()
	h.start()
	return h
}

// allowLogins makes new sessions for the next logins.
func (h *migrationHost) allowLogins() {
	for range loginsAtOnce {
		h.clients = append(h.clients, h.session(xapitest.RoleVMAdmin))
	}
	h.logins = h.file("logins", strings.Join(h.clients, "\n"))
}

// start starts the service, and makes it the one that clients reach.
func (h *migrationHost) start() {
	h.t.Helper()
	h.p = h.world.start("--config=" + h.config)
	h.gate.lead(h.p.addr)
}

func (h *migrationHost) kill() { h.p.kill() }

// logOut ends the sessions of all clients, and makes new ones for later logins.
func (h *migrationHost) logOut() {
	for _, ref := range h.clients {
		h.host.ExpireSession(ref)
	}
	h.clients = nil
	h.allowLogins()
}

// forXenAPI describes the host to testdata/XenAPI.py.
func (h *migrationHost) forXenAPI() map[string]any {
	_, port, _ := net.SplitHostPort(h.gate.addr)
	number, _ := strconv.Atoi(port)
	return map[string]any{
		"socket": h.host.Socket(), "address": "127.0.0.1", "port": number, "sessions": h.logins,
		"certificate": filepath.Join(h.trust.ClientDir, "ca-cert.pem"),
	}
}

// ownVBD waits until the service has attached a disk, and returns its VBD.
func (h *migrationHost) ownVBD() xapitest.VBD {
	h.t.Helper()
	for _, b := range h.host.VBDs() {
		if b.CurrentlyAttached {
			return b
		}
	}
	h.t.Fatalf("no VBD is attached: %+v", h.host.VBDs())
	return xapitest.VBD{}
}

// migration is a VM with a disk on one host, to which its guest writes all the time, and a VM
// without disks on another host.
type migration struct {
	t              *testing.T
	source, target *migrationHost
	vm, targetVM   string // uuids
	disk           string // uuid of the VM's disk
	sr             string // uuid of the storage repository of the target
	guest          *guest
	dir, program   string
	retryFor       string // of nbd-tool
	env            []string
}

// migratedSize is larger than the buffers on the way. The guest writes to the beginning only,
// of which migratedData bytes have data at first.
const (
	migratedSize    = 32 << 20
	migratedWritten = 16 << 20
	migratedData    = 8 << 20
)

// buildTool builds nbd-tool for the migrations of a test.
func buildTool(t *testing.T) (path string) {
	t.Helper()
	requires.Tool(t, "python3")
	path = filepath.Join(t.TempDir(), "nbd-tool")
	tool(t, "go", "build", "-o", path, "xapi-nbd/cmd/nbd-tool")
	return path
}

func newMigration(t *testing.T, nbdTool string) *migration {
	t.Helper()
	m := &migration{t: t, source: newMigrationHost(t), target: newMigrationHost(t), dir: t.TempDir(), retryFor: "60s"}
	var err error
	m.disk, err = m.source.host.AddVDI(xapitest.VDISpec{Size: migratedSize, VHD: true, NameLabel: "root"})
	must(t, err)
	m.vm, err = m.source.host.AddVM("web", m.disk)
	must(t, err)
	m.targetVM, err = m.target.host.AddVM("web")
	must(t, err)
	must(t, m.source.host.StartVM(m.vm))
	m.sr = m.target.host.AddSR("ext")
	m.guest = &guest{host: m.source.host, vm: m.vm, content: make([]byte, migratedSize)}
	for at := range migratedData / (2 << 20) { // every other block
		must(t, m.guest.write(random(uint64(at), 2<<20), int64(at)*(4<<20)))
	}
	m.prepare(nbdTool)
	return m
}

// prepare writes the program of the document, and makes the variables that it needs.
func (m *migration) prepare(nbdTool string) {
	m.t.Helper()
	bin := filepath.Join(m.dir, "bin")
	must(m.t, os.Mkdir(bin, 0o755))
	script := "#!/bin/sh\necho $$ >\"$TOOL_PID\"\nexec \"" + nbdTool + "\" \"$@\" $MORE_FLAGS\n"
	must(m.t, os.WriteFile(filepath.Join(bin, "nbd-tool"), []byte(script), 0o755))
	module, err := os.ReadFile("testdata/XenAPI.py")
	must(m.t, err)
	must(m.t, os.WriteFile(filepath.Join(bin, "XenAPI.py"), module, 0o644))
	found := pythonBlock.FindStringSubmatch(document(m.t, "examples/warm-migration.md"))
	m.program = filepath.Join(m.dir, found[1])
	program := strings.TrimSuffix(strings.TrimPrefix(found[0], "```python\n"), "```")
	must(m.t, os.WriteFile(m.program, []byte(program), 0o644))
	hosts, err := json.Marshal(map[string]any{"https://a": m.source.forXenAPI(), "https://b": m.target.forXenAPI()})
	must(m.t, err)
	m.env = append(os.Environ(),
		"PATH="+bin+":"+os.Getenv("PATH"), "PYTHONPATH="+bin, "PYTHONDONTWRITEBYTECODE=1",
		"XAPI_HOSTS="+string(hosts), "SOURCE=https://a", "TARGET=https://b",
		"VM="+m.vm, "TARGET_VM="+m.targetVM, "TARGET_SR="+m.sr,
		"TOOL_PID="+filepath.Join(m.dir, "pid"))
}

// result is the end of a command.
type result struct {
	output string // standard output and standard error
	code   int
}

// begin starts a step of the migration, such as "copy". The limits of nbd-tool are short, so
// that a network that stands still does not need a real minute.
func (m *migration) begin(step ...string) (ended <-chan result) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), "python3", append([]string{m.program, "vm.json"}, step...)...)
	cmd.Dir, cmd.Env = m.dir, append(m.env, "MORE_FLAGS=--timeout=2s --retry-for="+m.retryFor)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	must(m.t, cmd.Start())
	done := make(chan result, 1)
	go func() {
		_ = cmd.Wait()
		done <- result{output.String(), cmd.ProcessState.ExitCode()}
	}()
	return done
}

// do takes a step, and requires success.
func (m *migration) do(step ...string) {
	m.t.Helper()
	if r := <-m.begin(step...); r.code != 0 {
		m.t.Fatalf("%s: exit code %d\n%s", step, r.code, r.output)
	}
}

// killTool kills nbd-tool.
func (m *migration) killTool() {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "pid"))
	must(m.t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	must(m.t, err)
	must(m.t, syscall.Kill(pid, syscall.SIGKILL))
}

// diskProgress is the record of a disk in vm.json.
type diskProgress struct{ Source, Target, Copied, Snapshot string }

// progress returns the state of the disk that the guest writes to.
func (m *migration) progress() diskProgress { return m.diskProgress("0") }

func (m *migration) diskProgress(slot string) diskProgress {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "vm.json"))
	must(m.t, err)
	var state struct{ Disks map[string]diskProgress }
	must(m.t, json.Unmarshal(text, &state))
	return state.Disks[slot]
}

// wantCopied requires that the target is equal to the snapshot that counts as copied.
func (m *migration) wantCopied() {
	m.t.Helper()
	p := m.progress()
	want, err := os.ReadFile(m.source.host.ImagePath(p.Copied))
	must(m.t, err)
	wantFile(m.t, m.target.host.ImagePath(p.Target), want)
}

// wantClean requires that nothing is left attached, and that the source has the writes of its
// guest.
func (m *migration) wantClean() {
	m.t.Helper()
	m.source.waitClean(m.source.p)
	m.target.waitClean(m.target.p)
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	wantFile(m.t, m.source.host.ImagePath(m.disk), m.guest.content)
}

// wantSwitched requires the end of a migration: the VM runs on the target, with the disk
// that it had at its shutdown, and not on the source.
func (m *migration) wantSwitched() {
	m.t.Helper()
	m.wantClean()
	wantFile(m.t, m.target.host.ImagePath(m.progress().Target), m.guest.content)
	if err := m.source.host.StartVM(m.vm); err == nil || !strings.Contains(err.Error(), "OPERATION_BLOCKED") {
		m.t.Errorf("a start of the VM on the source: %v, want that it is blocked", err)
	}
	if err := m.target.host.StopVM(m.targetVM); err != nil {
		m.t.Errorf("the VM does not run on the target: %v", err)
	}
	if left := m.source.host.Chain(m.progress().Copied); len(left) != 0 {
		m.t.Errorf("the last snapshot is left: %q", left)
	}
}

// guest is the program in a VM: it writes to the disk, and keeps the expected content.
type guest struct {
	host *xapitest.Host
	vm   string

	mu      sync.Mutex // guards content
	content []byte
}

func (g *guest) write(p []byte, at int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.host.WriteVM(g.vm, 0, p, at)
	if err == nil {
		copy(g.content[at:], p)
	}
	return err
}

// run writes pieces to random places until the VM is shut down, or the test ends.
func (g *guest) run(t *testing.T) {
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = g.host.StopVM(g.vm) // which may be halted
		<-done
	})
	go func() {
		defer close(done)
		tick := time.NewTicker(5 * time.Millisecond) // leaves the processor to the others
		defer tick.Stop()
		for seed := uint64(1000); ; seed++ {
			p := random(seed, 512*(1+rand.IntN(16)))
			if seed%8 == 0 {
				clear(p)
			}
			if g.write(p, rand.Int64N((migratedWritten-int64(len(p)))/512)*512) != nil {
				return
			}
			<-tick.C
		}
	}()
}

// burst writes n bytes to blocks that had no data, in pieces of 64 KiB, so that the next
// increment has at least these, and needs room for them.
func (g *guest) burst(t *testing.T, n int) {
	t.Helper()
	seed := rand.Uint64()
	for i := range n / (64 << 10) {
		must(t, g.write(random(seed+uint64(i), 64<<10), migratedWritten+int64(i)*(128<<10)))
	}
}

// ownStorage puts the images of the host, which has none yet, on a file system of its own
// until the end of the test.
func (h *migrationHost) ownStorage() {
	h.t.Helper()
	requires.Root(h.t)
	dir := filepath.Join(h.dir, "images")
	must(h.t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	h.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// limitStorage leaves the file system of ownStorage room for so many more bytes.
func (h *migrationHost) limitStorage(more int64) {
	h.t.Helper()
	dir := filepath.Join(h.dir, "images")
	var st unix.Statfs_t
	must(h.t, unix.Statfs(dir, &st))
	size := int64(st.Blocks-st.Bfree)*st.Bsize + more
	must(h.t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", size)))
}
