package vdi_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"xapi-nbd/test/leaks"
	"xapi-nbd/vdi"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// fixture is a simulated host with one VDI and a manager on it.
type fixture struct {
	t        *testing.T
	host     *xapitest.Host
	client   *xapi.Client
	manager  *vdi.Manager
	cfg      vdi.Config
	vdi      string // uuid
	stateDir string
	content  []byte
}

// newFixture starts a host and opens a manager; change adjusts its
// configuration. At the end of the test nothing may be left on the host.
func newFixture(t *testing.T, change ...func(*vdi.Config)) *fixture {
	t.Helper()
	dir := shortDir(t)
	host, err := xapitest.Start(xapitest.Config{Dir: dir, Style: xapitest.StyleSM})
	if err != nil {
		t.Fatal(err)
	}
	return newFixtureOn(t, host, dir, change...)
}

// newFixtureOn is newFixture for a host that was started already, below dir.
func newFixtureOn(t *testing.T, host *xapitest.Host, dir string, change ...func(*vdi.Config)) *fixture {
	t.Helper()
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{t: t, host: host, content: pattern(1 << 20), stateDir: filepath.Join(dir, "state")}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, f.content, 0o600); err != nil {
		t.Fatal(err)
	}
	f.vdi = f.addVDI(xapitest.VDISpec{Image: image, NameLabel: "a disk"})
	f.client = xapi.New(xapi.Config{Socket: host.Socket()})
	t.Cleanup(f.client.Close)
	f.cfg = vdi.Config{
		Client: f.client, StateDir: f.stateDir, DeviceDir: host.DeviceDir(), Inventory: host.Inventory(),
		Roots: blockdev.Roots{Sys: host.SysDir(), NBD: host.NBDDir()},
	}
	for _, c := range change {
		c(&f.cfg)
	}
	f.manager = f.open()
	return f
}

// shortDir is a temporary folder whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vdi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// pattern is n bytes in which every position is recognisable.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8*13 + i>>16)
	}
	return b
}

func (f *fixture) addVDI(spec xapitest.VDISpec) string {
	f.t.Helper()
	uuid, err := f.host.AddVDI(spec)
	if err != nil {
		f.t.Fatal(err)
	}
	return uuid
}

// open opens a manager. If the test does not close it, because it has failed, the cleanup
// closes it without waiting for leftovers.
func (f *fixture) open() *vdi.Manager {
	f.t.Helper()
	m, err := vdi.Open(f.cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(m.Kill)
	return m
}

func (f *fixture) session(role xapitest.Role) *xapi.Session {
	return f.client.Bind(xapi.SessionRef(f.host.NewSession(role)))
}

func (f *fixture) attach(s *xapi.Session) *vdi.Disk {
	f.t.Helper()
	d, err := f.manager.Attach(f.t.Context(), s, f.vdi)
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

// recover removes all leftovers.
func (f *fixture) recover() {
	f.t.Helper()
	if _, err := f.manager.Recover(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// closeManager closes the manager and requires that nothing was left.
func (f *fixture) closeManager() {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	if err := f.manager.Close(ctx); err != nil {
		f.t.Error(err)
	}
}

// wantClean requires that the host has no VBD of this service and the journal is empty.
func (f *fixture) wantClean() {
	f.t.Helper()
	for _, v := range f.host.VBDs() {
		if !v.Foreign {
			f.t.Errorf("VBD left behind: %+v", v)
		}
	}
	if j := f.journal(); j != "" {
		f.t.Errorf("journal: got %q, want it empty", j)
	}
}

func (f *fixture) journal() string {
	f.t.Helper()
	data, err := os.ReadFile(filepath.Join(f.stateDir, "VBDs_to_clean_up"))
	if err != nil && !os.IsNotExist(err) {
		f.t.Fatal(err)
	}
	return string(data)
}

func (f *fixture) writeJournal(text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.stateDir, "VBDs_to_clean_up"), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// wait waits for a state of the host.
func (f *fixture) wait(event string, condition func([]xapitest.VBD) bool) {
	f.t.Helper()
	// Not the test's own context: cleanups wait too.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := f.host.Wait(ctx, condition); err != nil {
		f.t.Fatalf("waiting for %s: %v; VBDs: %+v", event, err, f.host.VBDs())
	}
}

// block is Host.Block. At the end of a test that failed the calls go on, as they would
// keep the manager from closing.
func (f *fixture) block(method string) (release func()) {
	release = f.host.Block(method)
	f.t.Cleanup(release)
	return release
}

// blockWork is Host.BlockWork, also released at the end of a test that failed.
func (f *fixture) blockWork(operation string) (reached <-chan struct{}, release func()) {
	reached, release = f.host.BlockWork(operation)
	f.t.Cleanup(release)
	return reached, release
}

func noVBDs(vbds []xapitest.VBD) bool { return len(vbds) == 0 }

// called reports whether the host has seen n calls of a method.
func (f *fixture) called(method string, n int) func([]xapitest.VBD) bool {
	return func([]xapitest.VBD) bool { return f.count(method) >= n }
}

func (f *fixture) count(method string) int {
	n := 0
	for _, c := range f.host.Calls() {
		if c.Method == method {
			n++
		}
	}
	return n
}

func (f *fixture) wantContent(d *vdi.Disk) {
	f.t.Helper()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		f.t.Error(err)
	}
	if !bytes.Equal(got, f.content) {
		f.t.Error("the disk's content differs from the image's")
	}
}
