package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xapi-nbd/test/requires"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// point is a moment in the life of a service: before or after the n-th, from 1,
// xapi call of a method, or operation of one kind on one file.
type point struct {
	what  string // a method of xapi, or a system call
	file  string // of an operation: its name in the world, or imageFile
	n     int
	after bool
}

func (p point) String() string {
	text := "before "
	if p.after {
		text = "after "
	}
	text += fmt.Sprintf("%s %d", p.what, p.n)
	if p.file != "" {
		text += " " + filepath.Base(p.file)
	}
	return text
}

// crashWorld is a world with disks for the service and VBDs of others, which
// must stay as they are.
type crashWorld struct {
	*world
	vdi, second string // uuids
	data        []byte // of both
	foreign     []xapitest.VBD
	life        life
	killed      bool   // at some point the service will be
	config      string // a pipe
	strace      string

	// Closed when a service that outlives it is disturbed, and when that is over.
	disturbed, over chan struct{}
}

// ourDevice is the device that the host plugs for the service, after three other VBDs.
const ourDevice = "dev/xvdd"

func newCrashWorld(t *testing.T, life life) *crashWorld {
	t.Helper()
	w := &crashWorld{
		world: newWorld(t, xapitest.Config{}), data: random(5, 64<<10), life: life,
		disturbed: make(chan struct{}), over: make(chan struct{}),
	}
	w.strace = requires.Tool(t, "strace")
	w.vdi = w.addVDI(w.data, xapitest.VDISpec{})
	w.second = w.addVDI(w.data, xapitest.VDISpec{})
	// As another host's instance of this service tags them.
	elsewhere := map[string]string{"xapi-nbd": "8e3b3b0e-5f0f-4a45-9a0f-0d8f2b7b7f10 NONCE"}
	w.addForeign(w.addVDI(w.data, xapitest.VDISpec{}), elsewhere, true)
	shared := w.vdi
	if life == writing { // nobody else may use that one
		shared = w.second
	}
	w.addForeign(shared, nil, true)
	w.addForeign(w.vdi, elsewhere, false)
	w.foreign = w.host.VBDs()
	w.host.ResetEvents()
	if life == recovering {
		w.leaveBehind()
	}
	w.host.ResetCalls()
	w.config = filepath.Join(w.dir, "config.toml")
	if err := syscall.Mkfifo(w.config, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *crashWorld) addForeign(vdi string, otherConfig map[string]string, plug bool) {
	w.t.Helper()
	uuid, err := w.host.AddForeignVBD(vdi, otherConfig)
	if err == nil && plug {
		err = w.host.PlugForeign(uuid)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// leaveBehind makes the leftovers of killed services: a VBD that is plugged and in the
// journal, and one that is in no journal but has this host's tag.
func (w *crashWorld) leaveBehind() {
	w.t.Helper()
	client := xapi.New(xapi.Config{Socket: w.host.Socket()})
	defer client.Close()
	s, err := client.Login(w.t.Context(), vdi.Originator)
	if err != nil {
		w.t.Fatal(err)
	}
	listed := w.leaveVBD(s, w.vdi, nil)
	if err := s.PlugVBD(w.t.Context(), listed); err != nil {
		w.t.Fatal(err)
	}
	uuid, err := s.VBDUUID(w.t.Context(), listed)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(w.dir, "state"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.file("state/VBDs_to_clean_up", uuid+"\n")
	w.leaveVBD(s, w.second, map[string]string{"xapi-nbd": w.host.InstallationUUID() + " NONCE"})
	if err := s.Logout(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *crashWorld) leaveVBD(s *xapi.Session, vdiUUID string, otherConfig map[string]string) xapi.VBDRef {
	w.t.Helper()
	dom0, err := s.VMByUUID(w.t.Context(), w.host.ControlDomainUUID())
	if err != nil {
		w.t.Fatal(err)
	}
	disk, err := s.VDIByUUID(w.t.Context(), vdiUUID)
	if err != nil {
		w.t.Fatal(err)
	}
	ref, err := s.CreateVBD(w.t.Context(), xapi.VBDSpec{VM: dom0, VDI: disk, OtherConfig: otherConfig})
	if err != nil {
		w.t.Fatal(err)
	}
	return ref
}

// launchHeld starts a service that waits for its configuration, before it does
// anything, until cycle gives it.
func (w *crashWorld) launchHeld() *process {
	w.t.Helper()
	return w.launch("--config=" + w.config)
}

// cycle runs a service of launchHeld: start, recovery, a client that reads or writes and ends with
// NBD_CMD_DISC, detach, stop. It reports whether the service was stopped and not killed, and
// fails the test if it did not stop cleanly.
func (w *crashWorld) cycle(p *process) (alive bool) {
	w.t.Helper()
	w.configure(p)
	if !w.until(p, "recovery", func() bool { return w.hasRecovered(p) && w.isClean() }) {
		return false
	}
	p.addr = p.waitAddr()
	if w.life != recovering {
		err := w.use(p)
		if !w.until(p, "the detach", w.isClean) {
			return false
		}
		if err != nil && !w.killed && !isClosed(w.disturbed) {
			w.t.Errorf("a client that nothing disturbed: %v", err)
		}
	}
	w.checkOthers(p)
	if isClosed(w.disturbed) {
		// It goes on as without the interruption.
		<-w.over
		w.mustServe(p)
	}
	return w.stopped(p)
}

// configure lets a service of launchHeld go on.
func (w *crashWorld) configure(p *process) {
	w.t.Helper()
	given := make(chan error, 1)
	config := "session_recheck = \"0s\"\n" // no periodic calls
	if w.life == writing {
		config += "allow_write = true\n"
	}
	go func() { given <- os.WriteFile(w.config, []byte(config), 0o600) }()
	select {
	case err := <-given:
		if err != nil {
			w.t.Fatal(err)
		}
	case <-p.ended:
		w.t.Fatalf("the service ended before it read its configuration:\n%s", p.output())
	}
}

// hasRecovered reports whether the service has finished its first search for leftovers, at
// the end of which it logs out.
func (w *crashWorld) hasRecovered(p *process) bool {
	if strings.Contains(p.output(), "cannot look for VBDs that were left behind") {
		return true
	}
	for _, c := range w.host.Calls() {
		if c.Method == "session.logout" {
			return true
		}
	}
	return false
}

// crashPatience is shorter than patience: there are many points to fail at.
const crashPatience = time.Minute

// until waits for done and returns true, or false if the process ends first. It kills the
// process if that takes too long.
func (w *crashWorld) until(p *process, what string, done func() bool) bool {
	w.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(crashPatience)
	defer limit.Stop()
	for !done() {
		select {
		case <-p.ended:
			return false
		case <-tick.C:
		case <-limit.C:
			w.t.Errorf("waited too long for %s: journal %q, VBDs %+v", what, w.journal(), w.host.VBDs())
			p.kill()
		}
	}
	return true
}

// use is a client that reads all of the disk; with life writing it first writes the bytes that
// the disk has already. It may be refused or cut off, but the bytes that it gets must be right.
func (w *crashWorld) use(p *process) error {
	w.t.Helper()
	name := w.export(w.vdi)
	if w.life == writing {
		name += "&mode=rw"
	}
	conn, err := w.open(p, name, false)
	if err != nil {
		return err
	}
	defer conn.Close()
	if w.life == writing {
		if err := conn.Write(w.t.Context(), w.data, 0, false); err != nil {
			return err
		}
		if err := conn.Flush(w.t.Context()); err != nil {
			return err
		}
	}
	got := make([]byte, len(w.data))
	if _, err := conn.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, w.data) {
		w.t.Error("the client got wrong data")
	}
	return nil
}

// isClean reports whether no VBD of the service is on the host or in the journal.
func (w *crashWorld) isClean() bool {
	for _, v := range w.host.VBDs() {
		if !v.Foreign {
			return false
		}
	}
	return w.journal() == ""
}

// checkOthers requires that the other VBDs are unchanged, and that no device is open.
func (w *crashWorld) checkOthers(p *process) {
	w.t.Helper()
	if vbds := w.host.VBDs(); !reflect.DeepEqual(vbds, w.foreign) {
		w.t.Errorf("VBDs of others: got %+v, want %+v", vbds, w.foreign)
	}
	for _, e := range w.host.Events() {
		for _, v := range w.foreign {
			if e.VBD == v.UUID {
				w.t.Errorf("a VBD of another tool was %s", e.Change)
			}
		}
	}
	if open := p.openDevices(w.world); len(open) != 0 {
		w.t.Errorf("devices still open: %q", open)
	}
}

// mustServe requires that a client is served as usual.
func (w *crashWorld) mustServe(p *process) {
	w.t.Helper()
	if err := w.use(p); err != nil {
		w.t.Errorf("the next client: %v", err)
	}
	if !w.until(p, "the next detach", w.isClean) {
		w.t.Error("the service has ended")
	}
	w.checkOthers(p)
}

// stopped stops the service; false means that it was killed.
func (w *crashWorld) stopped(p *process) bool {
	w.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		w.t.Fatal(err)
	}
	w.until(p, "the end of the service", func() bool { return false })
	code := p.cmd.ProcessState.ExitCode()
	pending, _ := os.ReadFile(filepath.Join(w.dir, "state", "VBD_creates_pending"))
	if len(pending) > 0 && code == exitLeft {
		return true // a VBD.create was not answered, and is recorded as pending
	}
	if code > 0 {
		w.t.Errorf("exit code: got %d, want 0", code)
	}
	return code >= 0
}

// restart has a new service remove the leftovers of a killed one, and reports whether there
// were any.
func (w *crashWorld) restart() (left bool) {
	w.t.Helper()
	w.checkJournal("after the kill")
	left = !w.isClean()
	p := w.start()
	if !w.until(p, "recovery", w.isClean) {
		w.t.Fatal("the service has ended")
	}
	w.checkOthers(p)
	if !w.stopped(p) {
		w.t.Error("the service was killed")
	}
	return left
}

// checkJournal requires every VBD of the service that was ever plugged to be in the journal.
// Recovery alone would not show a missing entry, as it finds VBDs by their tags too.
func (w *crashWorld) checkJournal(when any) {
	plugged := make(map[string]bool)
	for _, e := range w.host.Events() {
		plugged[e.VBD] = plugged[e.VBD] || e.Change == "plugged"
	}
	journal := w.journal()
	// Listed now, as VBDs that have been removed may have left the journal too.
	for _, v := range w.host.VBDs() {
		if !v.Foreign && plugged[v.UUID] && !strings.Contains(journal, v.UUID) {
			w.t.Errorf("%v: VBD %s is not in the journal: %q", when, v.UUID, journal)
		}
	}
}

// watch has the host call f for every call of the service.
func (w *crashWorld) watch(p *process, f func(point) xapitest.Verdict) {
	var mu sync.Mutex
	methods := make(map[string]int) // how many calls
	number := make(map[int]int)     // of a call, among those of its method
	w.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		mu.Lock()
		if !c.After {
			methods[c.Method]++
			number[c.N] = methods[c.Method]
		}
		at := point{what: c.Method, n: number[c.N], after: c.After}
		mu.Unlock()
		w.checkJournal(at)
		if c.Method == "VBD.unplug" && !c.After {
			if open := p.openDevices(w.world); len(open) != 0 {
				w.t.Errorf("unplugging with the device open: %q", open)
			}
		}
		return f(at)
	})
}

// atCall calls act at a call, and applies its verdict to the call.
func (w *crashWorld) atCall(p *process, call point, act func() xapitest.Verdict) {
	w.watch(p, func(at point) xapitest.Verdict {
		if at != call {
			return xapitest.Proceed
		}
		return act()
	})
}

// killAtCall kills the service at a call: before its execution, or before its answer.
func (w *crashWorld) killAtCall(p *process, call point) {
	w.atCall(p, call, func() xapitest.Verdict {
		p.kill()
		return xapitest.Drop
	})
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
