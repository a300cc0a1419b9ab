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
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

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
	vdi.SetGuardEvery(t, 10*time.Second) // each check costs time that is not fake
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
	for count, least := range map[string]int{"connected": tally.steps / 20, "connected for writing": tally.steps / 200, "wrote well": tally.steps / 200} {
		if n := tally.counts[count]; n < least {
			t.Errorf("%s: %d steps, which is not enough for a useful test", count, n)
		}
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

// tally counts the events of all sequences.
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
	m := &machine{tally: newTally(), host: host, style: style, out: out, spy: newSpy(host, out), shared: make(map[string]bool)}
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
	shared  map[string]bool // VDIs that another tool has plugged or unplugged since we attached them
	owed    bool            // a VBD may have been left for a recovery
}

// modelDisk is a VDI and its content.
type modelDisk struct {
	uuid    string
	image   string // path of the file with its bytes
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
	writable  *vdi.WritableDisk // nil if it only reads
	unwatch   func()
	undoubted bool // there was no restart of xapi before it
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
		d.image = filepath.Join(dir, "image"+strconv.Itoa(i))
		must(os.WriteFile(d.image, d.content, 0o600))
		var err error
		d.uuid, err = m.host.AddVDI(xapitest.VDISpec{Image: d.image})
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
			delete(m.shared, d.uuid)
		}
	}
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
