package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// clientTime is more than any client needs for one run.
const clientTime = 10 * time.Minute

// bench is one run of the program: what it needs, and what it has measured.
type bench struct {
	opts     options
	dir      string            // for images, certificates and what clients write
	diskDir  string            // the same on a disk, made when it is needed
	where    string            // what kind of place dir is, for people
	self     string            // this program
	tool     string            // nbd-tool
	programs map[string]string // paths of those that are installed, by name
	images   *images
	certs    *certificates
	results  results
	log      log
	progress io.Writer
}

// programs are all that are made use of where they are installed.
var programs = []string{"nbdkit", "qemu-nbd", "nbdcopy", "nbdinfo", "fio", "iperf3"}

// newBench prepares everything but the images. The caller closes it.
func newBench(ctx context.Context, o options, progress io.Writer) (b *bench, err error) {
	b = &bench{opts: o, progress: progress, programs: map[string]string{}}
	for _, name := range programs {
		if path, err := exec.LookPath(name); err == nil {
			b.programs[name] = path
		}
	}
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if b.dir, b.where, err = workFolder(o.size); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	b.images = &images{dir: b.dir, size: o.size, paths: map[imageKind]string{}}
	if b.certs, err = makeCertificates(b.dir); err != nil {
		return nil, err
	}
	b.tool = o.tool
	if b.tool == "" {
		b.tool = filepath.Join(b.dir, "nbd-tool")
		err = buildTool(ctx, b.tool)
	}
	return b, err
}

// buildTool builds as `make build` does, of the code as it is now.
func buildTool(ctx context.Context, path string) error {
	flags := "-s -w"
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "xapi-nbd").Output()
	if err != nil {
		return fmt.Errorf("looking for the module xapi-nbd: %w", err)
	}
	if version, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(root)), "VERSION")); err == nil {
		flags += " -X xapi-nbd/cmd/internal/buildinfo.version=" + strings.TrimSpace(string(version))
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", flags, "-o", path, "xapi-nbd/cmd/nbd-tool")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building nbd-tool: %w: %s", err, out)
	}
	return nil
}

// close removes what was made. No server runs any more.
func (b *bench) close() error {
	if b.images != nil {
		b.images.close()
	}
	err := os.RemoveAll(b.dir)
	if b.diskDir != "" {
		err = errors.Join(err, os.RemoveAll(b.diskDir))
	}
	return err
}

// run measures all cases, those of one environment after each other.
func (b *bench) run(ctx context.Context, cases []testCase) error {
	for len(cases) > 0 {
		e := cases[0].env
		var now, later []testCase
		for _, c := range cases {
			if c.env == e {
				now = append(now, c)
			} else {
				later = append(later, c)
			}
		}
		if now = b.runnable(now); len(now) > 0 {
			if err := b.runTogether(ctx, e, now); err != nil {
				return err
			}
		}
		cases = later
	}
	return nil
}

// runnable leaves out the cases whose client is not installed.
func (b *bench) runnable(cases []testCase) []testCase {
	return slices.DeleteFunc(cases, func(c testCase) bool {
		for _, name := range c.needs {
			if b.programs[name] == "" {
				b.skip("%s: %s is not installed", c.name, name)
				return true
			}
		}
		return false
	})
}

// runTogether runs the cases of one environment. An image that cannot be had is
// a reason to leave them out, no failure.
func (b *bench) runTogether(ctx context.Context, e env, cases []testCase) error {
	if e.image == diskImage {
		return b.cache(ctx, cases[0])
	}
	if _, err := b.images.path(ctx, e.image); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.skip("%s and others of that image: %v", cases[0].name, err)
		return nil
	}
	servers, err := b.startAll(ctx, e)
	defer func() {
		for _, s := range servers {
			s.stop()
		}
	}()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if !e.floor && !e.idle {
		for _, s := range servers {
			err := b.verify(ctx, s)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				return fmt.Errorf("%s does not serve the right bytes, or clients do not get them: %w", s.name, err)
			}
		}
	}
	for _, c := range cases {
		if err := b.rounds(ctx, c, servers); err != nil {
			return err
		}
	}
	return nil
}

// startAll starts the servers of an environment that are installed. A peer that
// does not start is left out. Those that were started are returned in any case.
func (b *bench) startAll(ctx context.Context, e env) ([]*server, error) {
	var servers []*server
	for _, k := range b.installed(e) {
		s, err := b.start(ctx, k, e, "")
		if err != nil && (ctx.Err() != nil || k.name == ours) {
			return servers, err
		}
		if err != nil {
			b.skip("%v", err)
			continue
		}
		servers = append(servers, s)
	}
	return servers, nil
}

// installed are the servers of an environment that there are.
func (b *bench) installed(e env) []kind {
	return slices.DeleteFunc(kinds(e), func(k kind) bool {
		if k.program == "" || b.programs[k.program] != "" {
			return false
		}
		b.skip("%s: not installed", k.program)
		return true
	})
}

// rounds runs one case. Who begins changes from round to round.
func (b *bench) rounds(ctx context.Context, c testCase, servers []*server) error {
	first := 1
	if b.opts.warmUp {
		first = 0
	}
	for round := first; round <= b.opts.rounds; round++ {
		var line []string
		for i := range servers {
			s := servers[(i+round)%len(servers)]
			got := b.measure(ctx, c, s, round)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if round > 0 {
				b.results.add(got)
			}
			if err := b.revive(ctx, s); err != nil {
				return err
			}
			line = append(line, s.name+" "+inShort(got))
		}
		b.say("%s, round %d of %d: %s", c.name, round, b.opts.rounds, strings.Join(line, ", "))
	}
	return nil
}

// revive starts a server again that has ended, in its place: the run has
// failed, but the others need not.
func (b *bench) revive(ctx context.Context, s *server) error {
	select {
	case <-s.done:
	default:
		return nil
	}
	again, err := b.start(ctx, s.kind, s.env, "")
	if err == nil {
		*s = *again
	}
	return err
}

// measure runs the client of a case against one server.
func (b *bench) measure(ctx context.Context, c testCase, s *server, round int) sample {
	ctx, cancel := context.WithTimeoutCause(ctx, clientTime, fmt.Errorf("not done after %v", clientTime))
	defer cancel()
	if c.cold {
		if err := b.images.loop.drop(); err != nil {
			return sample{Case: c.name, Server: s.name, Round: round, Failed: err.Error()}
		}
	}
	got, err := measured(s, func() (sample, error) { return c.run(ctx, b, s) })
	got.Case, got.Server, got.Round = c.name, s.name, round
	if err != nil {
		got.Failed = err.Error()
	}
	return got
}

// measured adds to a sample what its making cost the server.
func measured(s *server, client func() (sample, error)) (sample, error) {
	if s.inProcess() {
		return client()
	}
	pid := s.cmd.Process.Pid
	resetPeak(pid)
	before, err := cpuTime(pid)
	if err != nil {
		return sample{}, err
	}
	got, err := client()
	select {
	case <-s.done:
		return got, errors.Join(fmt.Errorf("the server has ended; it printed: %q", s.output.String()), err)
	default:
	}
	if err != nil {
		return got, err
	}
	after, err := cpuTime(pid)
	if err != nil {
		return got, err
	}
	got.CPU = (after - before).Seconds()
	_, got.PeakRSS, err = memory(pid)
	return got, err
}

// inShort is what progress shows of a sample.
func inShort(s sample) string {
	switch {
	case s.Failed != "":
		return "failed: " + s.Failed
	case s.Resident != nil:
		return fmt.Sprintf("%.0f %% left", 100**s.Resident)
	case s.RSS != 0:
		return fmt.Sprintf("%.0f MiB", rssMiB(s))
	case s.Reads != 0:
		return fmt.Sprintf("%.0f/s", readRate(s))
	}
	return fmt.Sprintf("%.0f MiB/s", rate(s))
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.progress, format+"\n", args...) }

// skip says, now and in the report, what is not measured and why.
func (b *bench) skip(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); b.log.note(skipped, text) {
		b.say("skipped: %s", text)
	}
}
