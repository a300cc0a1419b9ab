package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/xapi/xapitest"
)

// The size of the stress test. There are more VDIs than may be plugged and more
// clients than may be served, so that both limits are hit.
const (
	stressClients  = 64
	stressVDIs     = 16
	stressWriters  = 6 // clients, each of which has one of the last VDIs for itself most of the time
	stressShared   = 4 // the first VDIs, which readers choose often
	stressDiskSize = 1 << 20
	stressMaxVBDs  = 12
	stressMaxConns = 56
)

// TestStress: sixty-four clients connect, read, write and disconnect at random while xapi
// fails, restarts and closes connections, and other tools plug and unplug the same
// disks. Clients write the content that the disk has already, so every byte that was read is right, and
// a write that reaches another disk is seen. Once the faults stop nothing is left: no
// VBD, no journal entry, no open device, no connection, no memory.
//
// SOAK=1h makes each of the stress tests last that long, STRESS_SEED=n repeats the
// draws of a run, though not its timing.
func TestStress(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	length, seed := 8*time.Second, rand.Uint64()
	if text := os.Getenv("SOAK"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("SOAK: %v", err)
		}
	}
	if text := os.Getenv("STRESS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("STRESS_SEED: %v", err)
		}
	}
	// Two kinds of hosts: one refuses to unplug an open device, the other does it and
	// gives the node to the next VBD.
	for name, style := range map[string]xapitest.DeviceStyle{"xvd": xapitest.StyleXVD, "nbd": xapitest.StyleNBD} {
		t.Run(name, func(t *testing.T) {
			t.Logf("STRESS_SEED=%d", seed)
			newStress(t, style, seed).run(length)
		})
	}
}

// stress is one stress test: a host, a service, its clients, and other tools.
type stress struct {
	t         *testing.T
	w         *world
	p         *process
	ask       func() stressMemory
	idle      int // descriptors of the service without clients
	seed      uint64
	disks     []stressDisk
	count     stressCount
	abort     context.CancelFunc // ends the round after a failure
	inspected int                // the inspected bytes of the kept part of the log

	neighbours map[string]bool // VBDs of other tools: whether they are attached

	mu       sync.Mutex // guards the fields below
	failed   bool
	sessions map[string]bool // the uuids in all refs that clients ever had
}

// stressDisk is a VDI and its content.
type stressDisk struct {
	uuid    string
	content []byte
}

func newStress(t *testing.T, style xapitest.DeviceStyle, seed uint64) *stress {
	// An unplug that waits for the service should not wait longer than the idle phase
	// after the load.
	w := newWorld(t, xapitest.Config{Style: style, NBDUnplugWait: 5 * time.Second})
	s := &stress{t: t, w: w, seed: seed, neighbours: make(map[string]bool), sessions: make(map[string]bool)}
	for i := range stressVDIs {
		content := random(uint64(i+1), stressDiskSize)
		s.disks = append(s.disks, stressDisk{w.addVDI(content, xapitest.VDISpec{}), content})
	}
	config := w.file("stress.toml", "linger = \"50ms\"\nsession_recheck = \"20ms\"\nattach_timeout = \"2s\"\nallow_write = true\n")
	s.p, s.ask = w.startStress("--config="+config, "--log-level=info",
		fmt.Sprintf("--max-vbds=%d", stressMaxVBDs), fmt.Sprintf("--max-connections=%d", stressMaxConns))
	s.idle = len(s.p.openFiles())
	// A failed test should print the end of the log.
	t.Cleanup(s.inspectLog)
	return s
}

// run alternates load and idle phases. Files and memory in the idle phases are compared with
// those in the first one.
func (s *stress) run(length time.Duration) {
	rounds := max(3, int(length/time.Minute))
	var first stressMemory
	for n := range rounds {
		s.round(n, length/time.Duration(rounds))
		s.calm()
		if s.t.Failed() {
			return
		}
		now := s.ask()
		s.t.Logf("round %d: %v", n+1, now)
		if n == 0 {
			first = now
		} else {
			now.wantFlat(s, first)
		}
	}
	s.t.Log(s.count.String())
	s.serveFreshClients()
	s.calm()
	s.stop()
}

// round runs the load for that length, or longer until each event has happened. It returns
// when all clients have ended.
func (s *stress) round(n int, length time.Duration) {
	ctx, cancel := context.WithTimeout(s.t.Context(), length+patience)
	defer cancel()
	s.abort = cancel
	var everybody sync.WaitGroup
	draws := func(who int) *rand.Rand { return rand.New(rand.NewPCG(s.seed, uint64(n)<<32|uint64(who))) }
	for i := range stressClients {
		everybody.Go(func() { newStressClient(s, i, draws(i)).run(ctx) })
	}
	everybody.Go(func() { newChaos(s, draws(1000)).run(ctx) })
	stressPause(ctx, length)
	for s.count.missing() != "" && ctx.Err() == nil {
		stressPause(ctx, 10*time.Millisecond)
	}
	cancel()
	everybody.Wait()
	if what := s.count.missing(); what != "" && !s.t.Failed() {
		s.t.Errorf("no stress test: there were no %s", what)
	}
}

// calm waits until nothing is left of the round, without a restart of the service. The service
// must remove every VBD that was plugged by itself. calm requests recovery only for a VBD whose
// create was executed after the service had looked for it, as periodic recovery is slow. Calls
// of VBD.create without an answer stay pending until xapi has restarted.
func (s *stress) calm() {
	s.t.Helper()
	s.waitNothing("the service's own detach left", s.leftByDetach)
	s.waitNothing("after cleanup there was left", func() []string { return s.leftByCleanup(true) })
	s.w.host.Restart()
	s.waitNothing("after a restart of xapi and cleanup there was left", func() []string { return s.leftByCleanup(false) })
	s.inspectLog()
	s.checkNeighbours()
	s.count.calls.Add(int64(len(s.w.host.Calls())))
	s.w.host.ResetCalls() // the calls of an hour take much memory
	s.w.host.ResetEvents()
}

// leftByCleanup returns the leftovers after a clean-up, without calls of VBD.create if those
// may be left.
func (s *stress) leftByCleanup(creates bool) (left []string) {
	code, out, errOut := s.w.cleanup()
	s.count.recovered.Add(int64(strings.Count(out, "removed ")))
	if code != 0 && (!creates || code != exitLeft || !leftCreatesOnly(out)) {
		left = append(left, fmt.Sprintf("cleanup: exit code %d, %s%s", code, out, errOut))
	}
	for _, vbd := range s.ours() {
		left = append(left, fmt.Sprintf("%+v", vbd))
	}
	return append(left, s.leftByDetach()...)
}

// leftCreatesOnly reports whether a clean-up has left only calls of VBD.create.
func leftCreatesOnly(out string) bool {
	return strings.Contains(out, leftCreate) && strings.Count(out, "left ") == strings.Count(out, leftCreate)
}

const leftCreate = "left    a VBD.create that was not answered"

// stop ends the service, which has nothing left.
func (s *stress) stop() {
	s.t.Helper()
	if code := s.p.stop(patience); code != 0 { // also that of the race detector
		s.t.Errorf("exit code: got %d, want 0", code)
	}
}

// waitNothing waits until look returns an empty list.
func (s *stress) waitNothing(what string, look func() (left []string)) {
	s.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for {
		left := look()
		if len(left) == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-s.p.ended:
			s.t.Fatalf("the service has ended; %s %q", what, left)
		case <-limit:
			s.t.Fatalf("%s %q", what, left)
		}
	}
}

// leftByDetach returns things that a detach has to remove: plugged VBDs, entries of the
// journal, open devices.
func (s *stress) leftByDetach() (left []string) {
	for _, vbd := range s.ours() {
		if vbd.CurrentlyAttached {
			left = append(left, "attached: "+vbd.UUID)
		}
	}
	if journal := s.w.journal(); journal != "" {
		left = append(left, "journal: "+journal)
	}
	open := s.p.openFiles()
	for _, path := range open {
		if rel, ok := strings.CutPrefix(path, s.w.dir+"/"); ok && !strings.HasPrefix(rel, "state/") {
			left = append(left, "open: "+rel)
		}
	}
	// A connection to xapi may be open.
	const few = 4
	if len(open) > s.idle+few {
		left = append(left, fmt.Sprintf("%d descriptors, %d before the stress test: %q", len(open), s.idle, open))
	}
	return left
}

// ours returns the VBDs that the service made.
func (s *stress) ours() []xapitest.VBD {
	return slices.DeleteFunc(s.w.host.VBDs(), func(v xapitest.VBD) bool { return v.Foreign })
}

// openFiles lists the open files of the process, by name, also removed ones, and sockets.
func (p *process) openFiles() (open []string) {
	folder := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	fds, err := os.ReadDir(folder)
	if err != nil {
		return nil // it has ended
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(folder, fd.Name())); err == nil {
			open = append(open, target)
		}
	}
	return open
}

// tooSlow matches the refusals that occur on a busy machine, as attach_timeout is short
// here.
var tooSlow = regexp.MustCompile("attach still in progress|max_vbds is|xapi unreachable")

// serveFreshClients reads every disk from the first byte to the last.
func (s *stress) serveFreshClients() {
	s.t.Helper()
	for _, d := range s.disks {
		conn, err := s.w.open(s.p, s.w.export(d.uuid), false)
		for limit := time.Now().Add(patience); tooSlow.MatchString(fmt.Sprint(err)) && time.Now().Before(limit); {
			conn, err = s.w.open(s.p, s.w.export(d.uuid), false)
		}
		if err != nil {
			s.t.Fatalf("a fresh client after the stress test: %v", err)
		}
		got := make([]byte, len(d.content))
		if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, d.content) {
			s.t.Errorf("VDI %s after the stress test: %v, or wrong bytes", d.uuid, err)
		}
		if err := conn.Close(); err != nil {
			s.t.Error(err)
		}
	}
}

// newSession returns a session of a client, whose ref must not be in the log. The world's list
// of secrets would be too slow for so many.
func (s *stress) newSession(role xapitest.Role) string {
	ref := s.w.host.NewSession(role)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions[strings.TrimPrefix(ref, "OpaqueRef:")] = true
	return ref
}

var (
	stressUUID = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	// stressAlarms are log lines that must not occur in a stress test.
	stressAlarms = []string{"panic", "DATA RACE", "unexpected step", "VBD left for recovery", "cannot close the device"}
)

// inspectLog looks for refs and alarms in the log since the last call, and keeps only the end
// of it.
func (s *stress) inspectLog() {
	const kept = 256 << 10
	s.p.mu.Lock()
	text := s.p.text.String()
	end := text[max(0, len(text)-kept):]
	s.p.text.Reset()
	s.p.text.WriteString(end)
	s.p.mu.Unlock()
	text, s.inspected = text[s.inspected:], len(end)
	for _, alarm := range stressAlarms {
		if _, rest, found := strings.Cut(text, alarm); found {
			s.t.Errorf("the service says: %s%s", alarm, rest[:min(len(rest), 4<<10)])
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, uuid := range stressUUID.FindAllString(text, -1) {
		if s.sessions[uuid] {
			s.t.Error("the log contains a session ref")
			return
		}
	}
}

// fail reports a fault and ends the round. Only the first one counts: sixty-four clients may
// find the same.
func (s *stress) fail(format string, args ...any) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.failed {
		s.failed = true
		s.t.Errorf(format, args...)
	}
	s.abort()
}

// said returns the last lines of the log about a VDI.
func (s *stress) said(vdi string) string {
	var lines []string
	for line := range strings.Lines(s.p.output()) {
		if strings.Contains(line, vdi) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-10):], "")
}

// stressPause waits for d, or until ctx ends.
func stressPause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
