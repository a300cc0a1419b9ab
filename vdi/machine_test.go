package vdi_test

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/auth"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// minSteps is how many random steps a run must take. SOAK_STEPS in the
// environment asks for more; then -timeout has to be raised, too.
const minSteps = 10_000

// recheckEvery is the interval at which the sessions of connections are checked.
const recheckEvery = time.Minute

// TestRandomWalk takes random steps of clients, xapi, the service and other tools.
// check verifies the invariants after each step, finish those of the end.
//
// The service runs in a bubble of fake time, so that pauses take no time and a step is over
// when all goroutines are blocked. The simulated host is outside.
func TestRandomWalk(t *testing.T) {
	want := minSteps
	if text := os.Getenv("SOAK_STEPS"); text != "" {
		var err error
		want, err = strconv.Atoi(text)
		do(t, err)
	}
	// More steps than rapid's defaults, unless the command line has flags for that.
	for name, value := range map[string]string{"rapid.steps": "60", "rapid.checks": "5"} {
		if f := flag.Lookup(name); f.Value.String() == f.DefValue {
			do(t, f.Value.Set(value))
		}
	}
	tally := newTally()
	t.Run("play", func(t *testing.T) {
		players := runtime.GOMAXPROCS(0)
		for i := range players {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				play(t, tally, (want+players-1)/players)
			})
		}
	})
	t.Logf("%d steps in %d sequences; %v; %d of %d transitions taken",
		tally.steps, tally.sequences, tally.counts, len(tally.transitions), len(vdi.Transitions()))
	if t.Failed() || testing.Short() {
		return
	}
	if tally.steps < want {
		t.Errorf("got %d steps, want %d", tally.steps, want)
	}
	if n := tally.counts["connected"]; n < tally.steps/20 {
		t.Errorf("%d steps connected a client, which is not enough for a useful test", n)
	}
}

// play runs sequences until there were enough steps, or the time of the test is over.
func play(t *testing.T, tally *tally, want int) {
	for done := 0; done < want; {
		steps := 0
		rapid.Check(t, func(t *rapid.T) { steps += playSequence(t, tally) })
		done += steps
		deadline, limited := t.Deadline()
		if testing.Short() || limited && time.Until(deadline) < time.Minute {
			return
		}
	}
}

// tally counts what happened in all sequences.
type tally struct {
	mu               sync.Mutex // guards the rest
	steps, sequences int
	counts           map[string]int // by step, and by the prediction of the model
	transitions      map[string]int
}

func (t *tally) add(other *tally) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.steps += other.steps
	t.sequences++
	for what, n := range other.counts {
		t.counts[what] += n
	}
	for transition, n := range other.transitions {
		t.transitions[transition] += n
	}
}

// step counts a transition.
func (t *tally) step(transition string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.transitions[transition]++
}

func newTally() *tally {
	return &tally{counts: make(map[string]int), transitions: make(map[string]int)}
}

// playSequence runs one sequence on a new host and returns its length.
func playSequence(t *rapid.T, all *tally) int {
	dir, err := os.MkdirTemp("", "vdi")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	style := rapid.SampledFrom([]xapitest.DeviceStyle{xapitest.StyleSM, xapitest.StyleXVD, xapitest.StyleNBD}).Draw(t, "style")
	host, err := xapitest.Start(xapitest.Config{Dir: dir, Style: style})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	out := newOutside()
	defer close(out.work)
	m := &machine{tally: newTally(), host: host, style: style, out: out, spy: newSpy(host, out)}
	m.prepare(t, dir)
	rapid.SyncTest(t, func(t *rapid.T) {
		t.Cleanup(m.abandon)
		m.start(t, vdi.NewMemFS())
		t.Repeat(m.actions())
		m.finish(t)
	})
	all.add(m.tally)
	return m.tally.steps
}

// machine has the model, and the host and the service that it describes.
type machine struct {
	tally *tally
	host  *xapitest.Host
	style xapitest.DeviceStyle
	out   *outside
	spy   *spy
	cfg   vdi.Config

	disks   []*modelDisk
	foreign []*foreignVBD
	clients []*client
	conns   []*conn
	service *service
	owed    bool // a VBD may have been left for a recovery
}

// modelDisk is a VDI and its content.
type modelDisk struct {
	uuid    string
	content []byte
}

// foreignVBD is a VBD of another tool.
type foreignVBD struct {
	uuid    string
	disk    *modelDisk
	plugged bool
}

// client is a client with a session.
type client struct {
	ref      xapi.SessionRef
	role     xapitest.Role
	restarts int // of xapi before it began
	expired  bool
}

// conn is a connection.
type conn struct {
	client    *client
	model     *modelDisk
	disk      *vdi.Disk
	unwatch   func()
	undoubted bool // there was no restart of xapi before it
}

// service is a manager with the parts that the program adds to it.
type service struct {
	*process
	local     *xapi.Local
	sessions  *auth.Authorizer
	rechecks  *auth.Rechecker
	endChecks func() // ends the rechecks of sessions and waits for them
}

// prepare makes the VDIs and VBDs of the host. It is called outside.
func (m *machine) prepare(t *rapid.T, dir string) {
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	noise := rand.NewChaCha8([32]byte{})
	for i := range 4 {
		d := &modelDisk{content: make([]byte, 64<<10)}
		_, _ = noise.Read(d.content) // never fails
		image := filepath.Join(dir, "image"+strconv.Itoa(i))
		must(os.WriteFile(image, d.content, 0o600))
		var err error
		d.uuid, err = m.host.AddVDI(xapitest.VDISpec{Image: image})
		must(err)
		m.disks = append(m.disks, d)
	}
	// Another tool also uses the first disk. Only it uses the last one, and never unplugs
	// that.
	for _, d := range []*modelDisk{m.disks[0], m.disks[3]} {
		uuid, err := m.host.AddForeignVBD(d.uuid, map[string]string{"xapi-nbd": "11111111-2222-3333-4444-555555555555 nonce"})
		must(err)
		m.foreign = append(m.foreign, &foreignVBD{uuid: uuid, disk: d})
	}
	must(m.host.PlugForeign(m.foreign[1].uuid))
	m.foreign[1].plugged = true
	m.disks = m.disks[:3]
	m.cfg = vdi.Config{
		MaxVBDs: rapid.SampledFrom([]int{16, 2}).Draw(t, "max VBDs"),
		Linger:  rapid.SampledFrom([]time.Duration{0, 20 * time.Millisecond}).Draw(t, "linger"),
	}
}

// start starts the service on the files, and again if it is killed meanwhile.
func (m *machine) start(t *rapid.T, files *vdi.MemFS) {
	for {
		m.launch(t, files)
		if !m.wasKilled() {
			return
		}
		files = m.bury(t)
	}
}

func (m *machine) launch(t *rapid.T, files *vdi.MemFS) {
	p, err := newProcess(m.host, files)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{process: p, local: xapi.NewLocal(p.client, vdi.Originator)}
	s.sessions = auth.NewAuthorizer(p.client, s.local)
	s.rechecks = auth.NewRechecker(s.local, recheckEvery, nil)
	ctx, cancel := context.WithCancel(context.Background())
	var checking sync.WaitGroup
	checking.Go(func() { s.rechecks.Run(ctx) })
	s.endChecks = func() { cancel(); checking.Wait() }
	m.service, m.owed = s, true
	m.spy.with(func() { m.spy.service, m.spy.killed = s, false })
	files.OnOp(m.spy.onFile)
	calm := m.spy.calm()
	for tries := 0; s.manager == nil; tries++ {
		err := s.open(func(c *vdi.Config) { *c = m.config(*c, s.local) })
		switch {
		case m.wasKilled():
			return
		case err != nil && (calm || tries > 0):
			t.Fatalf("opening the manager: %v", err)
		}
	}
	s.manager.OnTransition(m.tally.step)
	m.recover(t)
}

// config adds the settings that were drawn for the sequence.
func (m *machine) config(c vdi.Config, local *xapi.Local) vdi.Config {
	c.MaxVBDs, c.Linger, c.Local = m.cfg.MaxVBDs, m.cfg.Linger, local
	return c
}

func (m *machine) wasKilled() (killed bool) {
	m.spy.with(func() { killed = m.spy.killed })
	return killed
}

// bury ends the goroutines of a service that was cut off, and returns the files for the next
// one.
func (m *machine) bury(t *rapid.T) *vdi.MemFS {
	m.tally.counts["killed"]++
	m.endService()
	m.conns = nil
	if n := rapid.IntRange(-1, len(vdi.Survivals)-1).Draw(t, "what survives"); n >= 0 {
		return m.service.files.AfterPowerCut(vdi.Survivals[n])
	}
	return m.service.files.AfterKill()
}

// endService ends all goroutines of a service that was cut off.
func (m *machine) endService() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m.service.endChecks()
	m.service.bury()
	_ = m.service.local.Close(ctx) // cannot log out
}

// abandon ends the service, in whatever state it is.
func (m *machine) abandon() {
	if m.service == nil {
		return
	}
	m.out.do(func() {
		m.host.OnCall(nil)
		m.service.cut()
	})
	m.endService()
}

// settle waits until all goroutines are blocked, and starts the service again if it was
// killed.
func (m *machine) settle(t *rapid.T) {
	for {
		synctest.Wait()
		m.out.do(m.spy.waitIdle)
		if !m.wasKilled() {
			break
		}
		m.start(t, m.bury(t))
	}
	for _, d := range m.disks {
		if !slices.ContainsFunc(m.service.manager.Attachments(), func(a vdi.Attachment) bool { return a.VDI == d.uuid }) {
			m.spy.with(func() { delete(m.spy.disturbed, d.uuid) })
		}
	}
}

func (m *machine) isDisturbed(d *modelDisk) (disturbed bool) {
	m.spy.with(func() { disturbed = m.spy.disturbed[d.uuid] })
	return disturbed
}

// undisturbed reports whether nobody has interfered with any disk.
func (m *machine) undisturbed() bool {
	return !slices.ContainsFunc(m.disks, m.isDisturbed)
}

// recover runs a recovery, as the service does at its start and from time to time.
func (m *machine) recover(t *rapid.T) {
	sure := m.spy.calm() && m.undisturbed() && len(m.service.files.Creates(memStateDir)) == 0
	_, err := m.service.manager.Recover(context.Background())
	if err != nil && sure {
		t.Fatalf("recovery: %v", err)
	}
	if err == nil {
		m.owed = false
	}
}

// check verifies the invariants that hold when all goroutines are blocked.
func (m *machine) check(t *rapid.T) {
	m.spy.look("rest")
	m.spy.with(func() {
		if m.spy.wrong != "" {
			t.Fatal(m.spy.wrong)
		}
	})
	attachments := m.service.manager.Attachments()
	vbds := m.host.VBDs()
	m.checkForeign(t, vbds)
	m.checkOurs(t, vbds, attachments)
	m.checkAttachments(t, attachments)
	m.checkSessions(t)
}

// checkForeign checks that VBDs of other tools were not changed.
func (m *machine) checkForeign(t *rapid.T, vbds []xapitest.VBD) {
	for _, f := range m.foreign {
		i := slices.IndexFunc(vbds, func(v xapitest.VBD) bool { return v.UUID == f.uuid })
		if i < 0 || vbds[i].CurrentlyAttached != f.plugged {
			t.Fatalf("foreign VBD %s, plugged: %t, was touched; VBDs: %+v", f.uuid, f.plugged, vbds)
		}
	}
}

// checkOurs checks that every VBD of this service is tagged and belongs to an attachment,
// unless a recovery is due, and that no attachment has two.
func (m *machine) checkOurs(t *rapid.T, vbds []xapitest.VBD, attachments []vdi.Attachment) {
	owners := make(map[string]string)
	for _, v := range vbds {
		if v.Foreign {
			continue
		}
		tag := strings.Fields(v.OtherConfig["xapi-nbd"])
		if len(tag) != 3 {
			t.Fatalf("VBD %s is not tagged: %v", v.UUID, v.OtherConfig)
		}
		installation, nonce := tag[0], tag[1]
		if installation != m.host.InstallationUUID() || nonce == "" {
			t.Fatalf("VBD %s is not tagged: %v", v.UUID, v.OtherConfig)
		}
		owned := slices.ContainsFunc(attachments, func(a vdi.Attachment) bool { return a.Nonce == nonce && a.VDI == v.VDI }) ||
			slices.Contains(m.service.manager.LeftNonces(), nonce)
		if !owned && !m.owed {
			t.Fatalf("VBD %+v belongs to no attachment, and is not being removed: %+v", v, attachments)
		}
		if owners[nonce] != "" {
			t.Fatalf("VBDs %s and %s are of one attachment", owners[nonce], v.UUID)
		}
		owners[nonce] = v.UUID
	}
}

// checkAttachments checks that each attachment has the right number of users, and a stage
// that is possible with them.
func (m *machine) checkAttachments(t *rapid.T, attachments []vdi.Attachment) {
	users := make(map[string]int)
	for _, c := range m.conns {
		users[c.model.uuid]++
	}
	for _, a := range attachments {
		n := users[a.VDI]
		delete(users, a.VDI)
		ok := false
		switch a.Stage {
		case "attached", "lost":
			ok = n > 0 && a.Users == n
		case "lingering":
			ok = n == 0 && a.Users == 0
		case "plugging", "detaching", "forgetting": // between two tries
			ok = n == 0
		}
		if !ok {
			t.Fatalf("with %d connections %+v is idle", n, a)
		}
	}
	if len(users) > 0 {
		t.Fatalf("connections without an attachment: %v", users)
	}
}

// checkSessions checks that only the kept local session exists, apart from those that could
// not be ended.
func (m *machine) checkSessions(t *rapid.T) {
	m.spy.mu.Lock()
	defer m.spy.mu.Unlock()
	if n := m.host.Sessions(); m.spy.known && n > 1+m.spy.excused {
		t.Fatalf("local sessions: got %d, want at most 1 and %d that could not be ended", n, m.spy.excused)
	}
}

// finish ends the sequence. When xapi runs and there are no more events, no VBD and no entry
// of this service is left.
func (m *machine) finish(t *rapid.T) {
	m.calmDown(t)
	for len(m.conns) > 0 {
		m.hangUp(m.conns[0], nil)
	}
	m.settle(t)
	for len(m.service.manager.Attachments()) > 0 {
		time.Sleep(time.Second) // the pause between two tries of a detach
		synctest.Wait()
	}
	m.settle(t)
	time.Sleep(2 * time.Hour) // a VBD.create that was not answered is not expected any more
	m.settle(t)
	m.recover(t)
	m.settle(t)
	m.check(t)
	if left := m.service.manager.Leftovers(); len(left) > 0 {
		t.Fatalf("still to be removed: %+v", left)
	}
	if m.owed {
		t.Fatal("a recovery is still to be done")
	}
	for _, v := range m.host.VBDs() {
		if !v.Foreign {
			t.Fatalf("VBD left behind: %+v", v)
		}
	}
	if journal := m.service.files.Journal(memStateDir); len(journal) > 0 {
		t.Fatalf("journal: got %q, want it empty", journal)
	}
	m.stopService(t)
	m.spy.mu.Lock()
	defer m.spy.mu.Unlock()
	if n := m.host.Sessions(); m.spy.known && n > m.spy.excused {
		t.Fatalf("local sessions: got %d, want at most %d that could not be ended", n, m.spy.excused)
	}
}
