package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/xapi/xapitest"
)

// migrationFault is a fault in the middle of a copy.
type migrationFault struct {
	name string
	// fullStorage says that the target's storage has no room at first.
	fullStorage bool
	// prepare is called before the copy begins; or nil.
	prepare func(m *migration)
	// inject is called while the copy stands still, which goes on afterwards; or nil.
	inject func(m *migration)
	// ends is a part of the command's error message. Where it is empty the copy may also
	// succeed.
	ends string
	// noticed is what the service of a host must log.
	noticed string
	by      func(m *migration) *migrationHost
	// final says that nbd-tool cannot succeed, so that it need not try for long.
	final bool
	// goesOn says that nbd-tool connects again, and the command succeeds.
	goesOn bool
	// undisturbed says that it need not even connect again.
	undisturbed bool
	// repair is called before the command is repeated; or nil.
	repair func(m *migration)
	// copiedAgain says that the next repetition only reports that all has to be copied again.
	copiedAgain bool
}

var migrationFaults = []migrationFault{
	{name: "the tool is killed", inject: (*migration).killTool, ends: "the copy is incomplete"},
	{name: "the service of the target is killed", goesOn: true, inject: func(m *migration) { m.target.kill(); m.target.start() }},
	{name: "the service of the source is killed", goesOn: true, inject: func(m *migration) { m.source.kill(); m.source.start() }},
	{name: "the service of the target is restarted", goesOn: true, inject: func(m *migration) { m.target.restart() }},
	{name: "the service of the source is restarted", goesOn: true, inject: func(m *migration) { m.source.restart() }},
	{name: "the service of the target is upgraded", goesOn: true, undisturbed: true, inject: func(m *migration) { m.target.upgrade() }},
	{name: "the service of the source is upgraded", goesOn: true, undisturbed: true, inject: func(m *migration) { m.source.upgrade() }},
	{
		name: "xapi of the target is killed", ends: "the same command goes on",
		inject: func(m *migration) { m.target.host.Stop() },
		repair: func(m *migration) { m.target.xapiReturns() },
	},
	{
		name: "xapi of the source is killed", ends: "the same command goes on",
		inject: func(m *migration) { m.source.host.Stop() },
		repair: func(m *migration) { m.source.xapiReturns() },
	},
	{
		name: "the sessions are logged out", ends: "the same command goes on", final: true,
		inject: func(m *migration) {
			m.source.logOut()
			m.target.logOut()
			m.target.waitReleased()
		},
	},
	{
		name: "no space is left on the target", ends: "the copy is incomplete", fullStorage: true,
		prepare: func(m *migration) { m.target.limitStorage(512 << 10) },
		repair:  func(m *migration) { m.target.limitStorage(migratedSize) },
	},
	{
		name: "the device of the target is taken away", noticed: "the device was taken away", by: (*migration).onTarget,
		inject: func(m *migration) { m.target.takeAway() },
	},
	{
		name: "the VBD of the source is destroyed", noticed: "the device was taken away", by: (*migration).onSource,
		inject: func(m *migration) { m.source.takeAway() },
	},
	{name: "the network stands still", goesOn: true, inject: func(m *migration) { m.target.gate.waitRefused(m.t, 1) }},
	{
		name: "the VM is started on the target", ends: "the VM of the target runs", final: true, copiedAgain: true,
		noticed: "writing ended: the VDI is not ours alone any more", by: (*migration).onTarget,
		inject: func(m *migration) {
			m.startTarget()
			m.target.waitReleased()
		},
		repair: func(m *migration) { must(m.t, m.target.host.StopVM(m.targetVM)) },
	},
	{
		name: "the certificates are rotated",
		inject: func(m *migration) {
			for _, h := range []*migrationHost{m.source, m.target} {
				h.rotateCertificate()
				h.gate.cut()
			}
		},
	},
}

func (m *migration) onSource() *migrationHost { return m.source }
func (m *migration) onTarget() *migrationHost { return m.target }

// TestWarmMigrationFaults has one fault in the first copy and once more in the last one,
// between the shutdown of the VM and its start on the target.
func TestWarmMigrationFaults(t *testing.T) {
	nbdTool := buildTool(t)
	for _, f := range migrationFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			m := newMigration(t, nbdTool)
			if f.fullStorage {
				m.target.ownStorage()
			}
			if f.final {
				m.retryFor = "1s"
			}
			m.guest.run(t)
			m.do("begin", m.vm, m.targetVM, m.sr)
			m.interrupt(f, migratedData/2, "copy")
			m.wantCopied()
			m.guest.burst(t, 2<<20)
			m.interrupt(f, 1<<20, "finish", "--compare")
			m.wantSwitched()
		})
	}
}

var saysWhatToDo = regexp.MustCompile(`the same command goes on|[Cc]opy again|next copy is a full one`)

// interrupt takes a step of the migration, with a fault when the target has got n bytes, and
// repeats it as the document says. At the end the step is done.
func (m *migration) interrupt(f migrationFault, n int64, step ...string) {
	m.t.Helper()
	if f.prepare != nil {
		f.prepare(m)
	}
	if f.by != nil {
		defer f.by(m).mustLog(f.noticed)()
	}
	reached := m.target.gate.closeAfter(n)
	if f.inject == nil {
		m.target.gate.letPass()
	}
	ended := m.begin(step...)
	if f.inject != nil {
		select {
		case <-reached:
		case r := <-ended:
			m.t.Fatalf("%s: ended with %d before the fault\n%s", step, r.code, r.output)
		}
		f.inject(m)
		m.target.gate.letPass()
	}
	r := <-ended
	m.t.Logf("%s: exit code %d\n%s", step, r.code, r.output)
	if f.goesOn && r.code != 0 {
		m.t.Errorf("%s: exit code %d, want that the command goes on by itself", step, r.code)
	}
	if f.undisturbed && strings.Contains(r.output, "connecting again") {
		m.t.Errorf("%s: nbd-tool has lost a connection", step)
	}
	if r.code == 0 && f.ends == "" {
		m.wantClean()
		return
	}
	m.wantReport(step, r, f.ends)
	if f.repair != nil {
		f.repair(m)
	}
	m.wantClean()
	r = <-m.begin(step...)
	if f.copiedAgain {
		m.wantReport(step, r, "The next copy is a full one")
		m.wantClean()
		r = <-m.begin(step...)
	}
	if r.code != 0 {
		m.t.Fatalf("%s, again: exit code %d\n%s", step, r.code, r.output)
	}
	m.wantClean()
}

// wantReport requires that a step has failed, and has said so.
func (m *migration) wantReport(step []string, r result, text string) {
	m.t.Helper()
	if r.code == 0 || !strings.Contains(r.output, text) || !saysWhatToDo.MatchString(r.output) {
		m.t.Fatalf("%s: exit code %d, want a failure with %q, and what to do:\n%s", step, r.code, text, r.output)
	}
}

// restart stops the service as its unit does, while clients are connected, and starts it.
func (h *migrationHost) restart() {
	h.t.Helper()
	must(h.t, h.p.cmd.Process.Signal(syscall.SIGTERM))
	h.p.waitLine("msg=stopping")
	h.gate.letPass() // requests in flight end
	if code := h.p.exitCode(patience, "SIGTERM"); code != 0 {
		h.t.Errorf("exit code of the service: %d", code)
	}
	h.start()
}

// upgrade replaces the service by a new process, while the old one serves its clients on.
func (h *migrationHost) upgrade() {
	h.t.Helper()
	must(h.t, adoptOrphans())
	w := &upgradeWorld{world: h.world, p: h.p, codes: make(map[int]unix.WaitStatus)}
	w.upgrade()
	h.t.Cleanup(w.killAll)
}

// xapiReturns makes xapi start again. It has no session any more.
func (h *migrationHost) xapiReturns() {
	h.t.Helper()
	h.host.Restart()
	must(h.t, h.host.Resume())
	h.clients = nil
	h.allowLogins()
}

// mustLog requires that the service logs the text before the returned function is called, or
// soon afterwards.
func (h *migrationHost) mustLog(text string) (wait func()) {
	p := h.p
	before := strings.Count(p.output(), text)
	return func() {
		h.t.Helper()
		eventually(h.t, func() (missing string) { // the log comes through a pipe
			if strings.Count(p.output(), text) == before {
				return "the service does not log " + text
			}
			return ""
		})
	}
}

// takeAway unplugs and destroys the service's VBD, as another client of xapi can do. When it
// returns the device leads nowhere.
func (h *migrationHost) takeAway() {
	h.t.Helper()
	vbd := h.ownVBD()
	unplugged := make(chan error, 1)
	go func() { // ends when the service has closed the device
		err := h.host.UnplugVBD(h.t.Context(), vbd.UUID)
		if err == nil {
			err = h.host.DestroyVBD(h.t.Context(), vbd.UUID)
		}
		unplugged <- err
	}()
	h.t.Cleanup(func() { <-unplugged }) // the service may have been first
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	must(h.t, h.host.Wait(ctx, func([]xapitest.VBD) bool {
		_, err := os.Lstat(filepath.Join(h.host.DeviceDir(), vbd.Device))
		return errors.Is(err, fs.ErrNotExist)
	}))
}

// waitReleased waits until the service has detached the disk by itself, while its client
// still waits.
func (h *migrationHost) waitReleased() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	if err := h.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		h.t.Fatalf("the service does not release the disk: %+v\n%s", h.host.VBDs(), h.p.output())
	}
}

// startTarget starts the VM of the target, as somebody who does not know of the migration,
// and lets it write to its disk.
func (m *migration) startTarget() {
	m.t.Helper()
	must(m.t, m.target.host.UnblockVM(m.targetVM))
	must(m.t, m.target.host.StartVM(m.targetVM))
	must(m.t, m.target.host.WriteVM(m.targetVM, 0, random(99, 1<<20), 5<<20))
}

// rotateCertificate gives the host a new certificate, as xapi does.
func (h *migrationHost) rotateCertificate() {
	h.t.Helper()
	cert := testcert.SelfSigned("localhost", "127.0.0.1")
	must(h.t, os.Rename(h.file("new.pem", string(cert.PairPEM())), h.trust.Server))
	must(h.t, os.Rename(h.file("new-ca.pem", string(cert.PEM())), filepath.Join(h.trust.ClientDir, "ca-cert.pem")))
}
