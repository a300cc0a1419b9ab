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

	"xapi-nbd/internal/testcert"
)

// clientTimeout is more than any client needs for one run.
const clientTimeout = 10 * time.Minute

// bench is one run of the program.
type bench struct {
	opts     options
	dir      string            // for images, certificates and the output of clients
	where    string            // a description of dir
	builds   []build           // ours; the first one is compared with all others
	programs map[string]string // paths of installed programs by name
	images   *images
	service  string // the program xapi-nbd of this checkout
	hosts    map[string]*sparseHost
	qcow2    map[imageKind]*loopDevice
	cert     *testcert.Cert
	results  results
	skipped  []string // cases and servers that are not measured, with the reason
	progress io.Writer
}

// build is a built checkout.
type build struct{ name, tool, bench string }

// newBench prepares everything but the images. The caller closes it.
func newBench(ctx context.Context, o options, progress io.Writer) (b *bench, err error) {
	b = &bench{opts: o, progress: progress, programs: map[string]string{}, hosts: map[string]*sparseHost{}, qcow2: map[imageKind]*loopDevice{}}
	for _, name := range []string{"nbdkit", "qemu-nbd", "nbdcopy", "fio", "qemu-img", qemuStorageDaemon} {
		if path, err := exec.LookPath(name); err == nil {
			b.programs[name] = path
		}
	}
	if b.dir, b.where, err = workFolder(o.size); err != nil {
		return nil, err
	}
	made := b // errors are returned without it
	defer func() {
		if err != nil {
			err = errors.Join(err, made.close())
		}
	}()
	b.images = &images{dir: b.dir, diskDir: o.disk, size: o.size, paths: map[imageKind]string{}}
	if b.cert, err = writeCertificates(b.dir); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	tool, err := b.goBuild(ctx, "", "nbd-tool", "./cmd/nbd-tool")
	if err != nil {
		return nil, err
	}
	if b.service, err = b.goBuild(ctx, "", "xapi-nbd", "./cmd/xapi-nbd"); err != nil {
		return nil, err
	}
	b.builds = []build{{ours, tool, self}}
	if o.old == "" {
		return b, nil
	}
	oldTool, toolErr := b.goBuild(ctx, o.old, "old-nbd-tool", "./cmd/nbd-tool")
	oldBench, benchErr := b.goBuild(ctx, o.old, "old-bench", "./test/bench")
	b.builds = []build{{"new", tool, self}, {"old", oldTool, oldBench}}
	return b, errors.Join(toolErr, benchErr)
}

// goBuild builds a program as `make build` does. root is the folder of the checkout, ""
// that of this program's module. It returns the path of the program.
func (b *bench) goBuild(ctx context.Context, root, name, pkg string) (string, error) {
	if root == "" {
		out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "xapi-nbd").Output()
		if err != nil {
			return "", fmt.Errorf("looking for the module xapi-nbd: %w", err)
		}
		root = strings.TrimSpace(string(out))
	}
	path := filepath.Join(b.dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s in %s: %w: %s", pkg, root, err, out)
	}
	return path, nil
}

// close removes the files. No server runs any more.
func (b *bench) close() error {
	var err error
	if b.images != nil {
		err = b.images.close()
	}
	for _, h := range b.hosts {
		err = errors.Join(err, h.close())
	}
	for _, l := range b.qcow2 {
		l.close()
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// run measures all cases, those of one environment together.
func (b *bench) run(ctx context.Context, cases []testCase) error {
	for len(cases) > 0 {
		e := cases[0].env
		var now, later []testCase
		for _, c := range cases {
			switch {
			case c.client != "" && b.programs[c.client] == "":
				b.skip("%s: %s is not installed", c.name, c.client)
			case c.env == e:
				now = append(now, c)
			default:
				later = append(later, c)
			}
		}
		if err := b.runEnv(ctx, e, now); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		cases = later
	}
	return nil
}

// runEnv runs the cases of one environment. It skips them if their image cannot be made.
func (b *bench) runEnv(ctx context.Context, e env, cases []testCase) error {
	if len(cases) == 0 {
		return nil
	}
	if isService(e.image) {
		if os.Getuid() != 0 {
			b.skip("%s and others of that image: needs root", cases[0].name)
			return nil
		}
	} else if _, err := b.images.path(ctx, e.image); err != nil {
		b.skip("%s and others of that image: %v", cases[0].name, err)
		return nil
	}
	var servers []*server
	defer func() {
		for _, s := range servers {
			s.stop()
		}
	}()
	for _, k := range b.kinds(e) {
		s, err := b.start(ctx, k, e)
		if err == nil {
			servers = append(servers, s)
			if !e.idle { // reading would change its memory
				err = b.verifyServer(ctx, s)
			}
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errUnfit):
			b.skip("%s: %v", k.name, err)
		case err != nil:
			return err
		}
	}
	for _, c := range cases {
		if err := b.rounds(ctx, c, servers); err != nil {
			return err
		}
	}
	return nil
}

// verifyServer compares an export with the image.
func (b *bench) verifyServer(ctx context.Context, s *server) error {
	switch s.env.image {
	case targetImage, targetLoopImage:
		shapes := copyShapes
		if s.env.device != plainDevice { // of a mirror, which only needs data
			shapes = shapes[:1]
		}
		return b.verifyWritten(ctx, s, shapes)
	case tallImage:
		return nil // has no bytes but zeroes
	case sparseImage, incrementImage:
		return b.verifySpans(ctx, s)
	}
	return b.verify(ctx, s)
}

// rounds runs one case. Each round begins with another server.
func (b *bench) rounds(ctx context.Context, c testCase, servers []*server) error {
	first := 1
	if b.opts.warmUp {
		first = 0
	}
	for round := first; round <= b.opts.rounds; round++ {
		var line []string
		for i := range servers {
			s := servers[(i+round)%len(servers)]
			if c.only != "" && s.name != c.only {
				continue
			}
			got := b.measure(ctx, c, s, round)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if round > 0 {
				b.results = append(b.results, got)
			}
			if s.ended() { // this run has failed; the next ones need not
				again, err := b.start(ctx, s.kind, s.env)
				if err != nil {
					return err
				}
				*s = *again
			}
			line = append(line, s.name+" "+got.summary())
		}
		b.say("%s, round %d of %d: %s", c.name, round, b.opts.rounds, strings.Join(line, ", "))
	}
	return nil
}

// measure runs the client of a case against one server.
func (b *bench) measure(ctx context.Context, c testCase, s *server, round int) sample {
	ctx, cancel := context.WithTimeoutCause(ctx, clientTimeout, fmt.Errorf("not done after %v", clientTimeout))
	defer cancel()
	var got sample
	var err error
	if c.cold {
		err = b.images.loop.drop()
	}
	if err == nil {
		got, err = measured(s, func() (sample, error) { return c.run(ctx, b, s) })
	}
	return got.of(c, s.name, round, err)
}

// measured adds the server's CPU time and memory to the sample of a client.
func measured(s *server, client func() (sample, error)) (sample, error) {
	pid := s.cmd.Process.Pid
	resetPeak(pid)
	before, err := cpuTime(pid)
	if err != nil {
		return sample{}, err
	}
	got, err := client()
	if s.ended() {
		return got, errors.Join(fmt.Errorf("the server has ended; it printed: %q", s.output.String()), err)
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

func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.progress, format+"\n", args...) }

// skip notes, once, a case or a server that is not measured.
func (b *bench) skip(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(b.skipped, text) {
		b.skipped = append(b.skipped, text)
		b.say("skipped: %s", text)
	}
}
