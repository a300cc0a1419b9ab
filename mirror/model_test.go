package mirror

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

const (
	modelGranule = 16
	modelSize    = modelGranule*31 + 8
	modelRegion  = modelGranule * 4
)

// modelClient is a request of a client that has not ended.
type modelClient struct {
	command string
	off     int64
	p       []byte // the data of a write; nil: unknown
	racy    bool   // another change overlaps it, or the device has lost something: the result is not known
	lost    bool   // a flush: something was lost before
	done    chan error
}

// modelRun drives a Mirror over simulated devices, one step at a time, and checks the invariant
// after each.
type modelRun struct {
	t       *testing.T
	rng     *rand.Rand
	ends    [2]*simDevice
	intent  *simIntent // nil: none
	m       *Mirror
	stop    context.CancelFunc // of Run
	ran     chan error
	clients []*modelClient

	completing chan error
	abort      context.CancelFunc // of Complete
	ended      bool               // the state has been seen to have ended
	untouched  int                // changes of the primary when the mirror pivoted

	known    []bool // what clients must read; false: any byte
	expected []byte
	lost     bool // bytes that clients had written were lost, and no flush has failed since

	trace []string
	steps int
	calm  int // if above 0: clients do little

	broken int // so many steps all operations of the secondary fail
	seen   map[string]int
}

func newModelRun(t *testing.T, seed uint64) *modelRun {
	r := &modelRun{t: t, rng: rand.New(rand.NewPCG(seed, 0)), seen: make(map[string]int)}
	data := make([]byte, modelSize)
	for g := 0; g < modelSize; g += modelGranule {
		if r.rng.IntN(3) > 0 {
			r.fill(data[g:min(g+modelGranule, modelSize)])
		}
	}
	blocks := [][2]int64{{1, 1}, {1, 8}, {4, 1}, {8, 4}}[seed%4]
	r.ends[primary] = newSimDevice(t, "primary", r.rng, blocks[0], data)
	zero := seed%3 == 0
	other := make([]byte, modelSize)
	if !zero {
		r.fill(other)
	}
	r.ends[secondary] = newSimDevice(t, "secondary", r.rng, blocks[1], other)
	if seed%2 == 0 {
		r.intent = newSimIntent(t, r.rng, modelSize, modelRegion)
	}
	r.start(zero)
	return r
}

func (r *modelRun) fill(p []byte) {
	for i := range p {
		p[i] = byte(r.rng.Uint32())
	}
}

// start makes a mirror of the ends.
func (r *modelRun) start(zero bool) {
	cfg := Config{
		Primary: r.ends[primary], Secondary: r.ends[secondary], SecondaryIsZero: zero,
		Requests: giveWay * (1 + r.rng.IntN(3)), OnError: OnError(r.rng.IntN(2)),
		RetryFor: 5 * time.Second, granule: modelGranule, copySize: modelGranule * int64(1+r.rng.IntN(4)),
	}
	if r.intent != nil {
		cfg.Intent, cfg.Dirty = r.intent, r.intent.dirty(modelSize)
	}
	m, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.m, r.ended, r.lost = m, false, false
	r.known, r.expected = make([]bool, modelSize), make([]byte, modelSize)
	ctx, stop := context.WithCancel(r.t.Context())
	r.stop, r.ran = stop, make(chan error, 1)
	r.check("at the beginning")
	go func() { r.ran <- m.Run(ctx) }()
}

// serving returns the device that clients use.
func (r *modelRun) serving() *simDevice {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	return r.ends[r.m.serving()]
}

// request begins a request of a client.
func (r *modelRun) request() {
	block := r.ends[primary].block
	blocks := modelSize / block
	first := r.rng.Int64N(blocks)
	n := min(1+r.rng.Int64N(5*modelGranule/block), blocks-first) * block
	if r.rng.IntN(3) == 0 { // few places are written often
		first, n = r.rng.Int64N(8), min(n, 24/block*block)
		n = max(n, block)
	}
	c := &modelClient{off: first * block, done: make(chan error, 1)}
	var do func() error
	switch k := r.rng.IntN(12); {
	case k < 7:
		c.command, c.p = "write", make([]byte, n)
		r.fill(c.p)
		p := bytes.Clone(c.p)
		do = func() error {
			err := r.m.WriteAt(r.t.Context(), p, c.off)
			clear(p) // the buffer belongs to the client again
			return err
		}
	case k < 9:
		c.command, c.p = "zero", make([]byte, n)
		do = func() error { return r.m.WriteZeroes(r.t.Context(), c.off, n) }
	case k < 10:
		c.command, c.p, c.racy = "trim", make([]byte, n), true
		do = func() error { return r.m.Trim(r.t.Context(), c.off, n) }
	default:
		for _, other := range r.clients {
			if other.command == "flush" {
				return
			}
		}
		c.command, c.lost = "flush", r.lost
		do = func() error { return r.m.Flush(r.t.Context()) }
	}
	for _, other := range r.clients {
		if len(c.p) > 0 && other.off < c.off+int64(len(c.p)) && c.off < other.off+int64(len(other.p)) {
			other.racy, c.racy = true, true
		}
	}
	for i := range c.p {
		r.known[c.off+int64(i)] = false
	}
	r.note("client %s %d+%d", c.command, c.off, len(c.p))
	r.clients = append(r.clients, c)
	go func() { c.done <- do() }()
}

// note remembers a step for the message of a failure.
func (r *modelRun) note(format string, args ...any) {
	if len(r.trace) > 60 {
		r.trace = r.trace[30:]
	}
	r.trace = append(r.trace, fmt.Sprintf(format, args...))
}

// answers looks at the requests that have ended.
func (r *modelRun) answers() {
	r.clients = slices.DeleteFunc(r.clients, func(c *modelClient) bool {
		select {
		case err := <-c.done:
			r.answered(c, err)
			return true
		default:
			return false
		}
	})
}

func (r *modelRun) answered(c *modelClient, err error) {
	r.note("answer %s %d+%d: %v", c.command, c.off, len(c.p), err)
	if c.command == "flush" {
		if err == nil && c.lost && r.lost {
			r.fail("a flush succeeded although changes were lost before")
		}
		if err != nil {
			r.lost = false
		}
		return
	}
	for i, b := range c.p {
		r.known[c.off+int64(i)], r.expected[c.off+int64(i)] = err == nil && !c.racy, b
	}
}

// forget makes bytes unknown that a device has lost.
func (r *modelRun) forget(before, after []byte) {
	for i := range before {
		if before[i] != after[i] {
			r.lost = r.lost || r.known[i]
			r.known[i] = false
		}
	}
	for _, c := range r.clients {
		c.racy = true
	}
}

// device does something with an operation that waits at a device.
func (r *modelRun) device() {
	var all []*simOp
	devices := []*simDevice{r.ends[0], r.ends[1]}
	if r.intent != nil {
		devices = append(devices, r.intent.disk)
	}
	for _, d := range devices {
		d.mu.Lock()
		all = append(all, d.pending...)
		d.mu.Unlock()
	}
	if len(all) == 0 {
		return
	}
	o := all[r.rng.IntN(len(all))]
	serving := o.dev == r.serving()
	before := bytes.Clone(o.dev.data)
	switch {
	case !o.applied && (r.rng.IntN(100) == 0 || r.broken > 0 && o.dev == r.ends[secondary]):
		r.note("error of %v", o)
		o.dev.finish(o, errInjected)
		if serving && o.command == "flush" {
			r.forget(before, o.dev.data)
		}
	case !o.applied && r.rng.IntN(2) == 0:
		r.note("carried out: %v", o)
		o.dev.carryOut(o)
	default:
		r.note("returned: %v", o)
		o.dev.finish(o, nil)
	}
}

// step does one thing. There are times of calm, so that the mirror converges.
func (r *modelRun) step() {
	r.steps++
	if r.calm--; r.calm < -200 {
		r.calm = r.rng.IntN(400)
	}
	if r.broken--; r.rng.IntN(1000) == 0 {
		r.broken = r.rng.IntN(300)
	}
	switch k := r.rng.IntN(2000); {
	case k < 400 && (r.calm < 0 || k < 10):
		if len(r.clients) < 6 {
			r.request()
		}
	case k < 1880:
		r.device()
	case k < 1910:
		d := time.Duration(r.rng.Int64N(int64(3 * time.Second)))
		r.note("wait %v", d)
		time.Sleep(d)
	case k < 1930:
		r.loss()
	case k < 1945:
		r.note("pause or resume")
		if r.rng.IntN(5) == 0 {
			r.m.Pause()
		} else {
			r.m.Resume()
		}
	case k < 1985:
		r.complete()
	case k < 1986:
		r.note("cancel")
		_ = r.m.Cancel()
	case k < 1989 || r.ended && k < 1996:
		r.crash()
	default:
		r.m.SetRate(r.rng.Int64N(2) * (100 + r.rng.Int64N(5000)))
	}
	synctest.Wait()
	r.answers()
	r.check("")
}

// loss makes a device lose what it has not flushed.
func (r *modelRun) loss() {
	d := r.ends[r.rng.IntN(8)/7^1] // mostly the secondary
	r.note("loss of %s", d.name)
	before := bytes.Clone(d.data)
	d.lose()
	if d == r.serving() {
		r.forget(before, d.data)
	}
}

// complete begins to complete the mirror, or gives up.
func (r *modelRun) complete() {
	if r.completing != nil {
		if r.rng.IntN(8) == 0 {
			r.note("complete given up")
			r.abort()
		}
		return
	}
	how, verify := Ending(r.rng.IntN(2)), r.rng.IntN(2) == 0
	r.note("complete %d, verify %t", how, verify)
	r.completing = make(chan error, 1)
	ctx, abort := context.WithCancel(r.t.Context())
	r.abort = abort
	go func(m *Mirror, result chan<- error) { result <- m.Complete(ctx, how, verify) }(r.m, r.completing)
}

// crash ends the process that mirrors, half of the time with a loss of power, and begins
// again.
func (r *modelRun) crash() {
	power := r.rng.IntN(2) == 0
	r.note("crash, loss of power %t", power)
	state := r.m.Status().State
	r.finish(power)
	if state == Pivoted || state == Stopped || r.intent != nil && r.intent.ended {
		if r.ends[0].block == r.ends[1].block || r.rng.IntN(2) == 0 {
			r.ends[0], r.ends[1] = r.ends[1], r.ends[0]
			r.ends[0].name, r.ends[1].name = "primary", "secondary"
		}
		if r.intent != nil {
			r.intent = newSimIntent(r.t, r.rng, modelSize, modelRegion)
		}
	}
	r.start(false)
}

// kill makes everything of the process end.
func (r *modelRun) kill(power bool) {
	for _, d := range r.ends {
		d.kill(power)
	}
	if r.intent != nil {
		r.intent.disk.kill(false)
	}
	r.stop()
	if r.abort != nil {
		r.abort()
	}
}

// finish ends the mirror and all requests.
func (r *modelRun) finish(power bool) {
	r.kill(power)
	for s, d := range r.ends {
		r.ends[s] = d.successor(d.name)
	}
	for _, c := range r.clients {
		<-c.done
	}
	r.clients = nil
	if r.completing != nil {
		<-r.completing
		r.completing = nil
	}
	<-r.ran
	if l := r.intent; l != nil {
		ended := l.ended
		r.intent = newSimIntent(r.t, r.rng, modelSize, modelRegion)
		copy(r.intent.disk.data, l.disk.data)
		r.intent.ended = ended
	}
}

// TestModel: random requests of clients, copies, errors and losses at both ends, stalls,
// completions and crashes, where each operation of a device is carried out, and returns, when
// the test wants it. The invariant of the package documentation is true after each step, and
// what clients have written stays. SOAK_STEPS sets the steps of each of the 100 seeds.
func TestModel(t *testing.T) {
	seeds, steps := uint64(100), 2000
	if testing.Short() {
		seeds, steps = 16, 2000
	}
	if text := os.Getenv("SOAK_STEPS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("SOAK_STEPS: %v", err)
		}
		seeds, steps = 100, n
	}
	seen := make(map[string]int)
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newModelRun(t, seed)
				for r.steps < steps {
					r.step()
				}
				r.finish(false)
				for what, n := range r.seen {
					seen[what] += n
				}
			})
		})
	}
	if t.Failed() {
		return
	}
	t.Log(seen)
	for _, what := range []string{"pivoted", "stopped", "cancelled", "detached", "failed", "changes at both ends", "in sync", "stalls", "clear bits"} {
		if seen[what] == 0 {
			t.Errorf("%s was never seen", what)
		}
	}
}
