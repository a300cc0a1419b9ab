// Command bench measures how fast disks are served. It has two modes.
//
// Against other servers: nbd-tool with package nbd, nbdkit and qemu-nbd serve the same
// images to the same clients with the same settings, in turn, round after round.
//
//	go run ./test/bench -o docs/results/BENCHMARKS.md
//	go run ./test/bench -run '^bulk/file/clear' -rounds 3
//
// The cases of sparse disks and increments run the service on a simulated host; they need
// root and loop devices.
//
//	go run ./test/bench -run '^(sparse|increment|first-byte|memory/attachments)'
//
// Disks that are written:
//
//	go run ./test/bench -run ^write/ -rounds 5
//
// The mirror, beside nbdcopy and qemu-storage-daemon:
//
//	go run ./test/bench -run ^mirror/ -rounds 5
//
// In pairs: this checkout and another one, to show that a change made nothing slower. No
// other server takes part. A ratio whose range includes 1 shows no difference; a median
// below 0.97 over 5 rounds on a machine that does nothing else is a loss.
//
//	git worktree add /tmp/old main
//	go run ./test/bench -old /tmp/old -rounds 5
//
// The clients are nbdcopy for whole disks, fio for reads at random, and package nbd where
// something runs beside the client that is measured. The tables have medians over the
// rounds, and of the ratios within one round the median, the smallest and the largest. CPU
// is user and system time of the server's process.
//
// Before a server is measured, every byte that it serves is compared with the image, and of a
// disk that is written, every byte that it has written.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	run    *regexp.Regexp
	rounds int
	warmUp bool          // one more round, which does not count
	size   int64         // bytes of the image
	runFor time.Duration // of a client that reads until time is up
	quick  bool
	list   bool
	out    string // file for the report
	old    string // folder of the other checkout
	disk   string // folder on a disk
	args   []string
}

// subcommands are the servers that the program starts itself as, with arguments.
var subcommands = map[string]func(ctx context.Context, args []string, errOut io.Writer) error{
	"serve-slow":    serveSlow,
	"serve-stalled": serveStalled,
	"serve-device":  serveDevice,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is main with its surroundings as arguments.
func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	if len(args) > 0 {
		if sub, ok := subcommands[args[0]]; ok {
			return sub(ctx, args[1:], errOut)
		}
	}
	o, err := parseOptions(args, errOut)
	if err != nil {
		return err
	}
	cases := pick(allCases(), o.run)
	if o.list {
		for _, c := range cases {
			fmt.Fprintln(out, c.name)
		}
		return nil
	}
	if len(cases) == 0 {
		return errors.New("-run: no case matches, see -list")
	}
	_, err = measureAll(ctx, o, cases, out, errOut)
	return err
}

// measureAll runs the cases and reports.
func measureAll(ctx context.Context, o options, cases []testCase, out, progress io.Writer) (r results, err error) {
	b, err := newBench(ctx, o, progress)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.run(ctx, cases); err != nil {
		return nil, err
	}
	text := b.markdown(ctx)
	if _, err := io.WriteString(out, text); err != nil {
		return nil, err
	}
	if o.out != "" {
		if err := os.WriteFile(o.out, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if n := len(b.results.failures()); n > 0 {
		return b.results, fmt.Errorf("%d runs failed, see above", n)
	}
	return b.results, nil
}

func parseOptions(args []string, errOut io.Writer) (options, error) {
	o := options{args: args}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(errOut)
	pattern := f.String("run", "", "run the cases that match the regular `expression`")
	f.IntVar(&o.rounds, "rounds", 5, "measured rounds, after one that does not count")
	size := f.Int64("size", 1024, "size of the image in `MiB`")
	f.DurationVar(&o.runFor, "time", 2*time.Second, "how long a client runs that reads until time is up")
	f.BoolVar(&o.quick, "quick", false, "small sizes, one round, no warm-up: shows that it works, measures nothing")
	f.BoolVar(&o.list, "list", false, "print the names of the cases and exit")
	f.StringVar(&o.out, "o", "", "Markdown `file` for the report")
	f.StringVar(&o.old, "old", "", "`folder` of another checkout, to be compared with this one")
	f.StringVar(&o.disk, "disk", os.TempDir(), "`folder` on a disk, for the case about the page cache")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("arguments that are not flags: %q", f.Args())
	}
	var err error
	if o.run, err = regexp.Compile(*pattern); err != nil {
		return o, fmt.Errorf("-run: %w", err)
	}
	o.size, o.warmUp = *size<<20, true
	if o.quick {
		o.size, o.rounds, o.runFor, o.warmUp = 16<<20, 1, time.Second, false
	}
	if o.rounds < 1 || o.size < 16<<20 || o.runFor <= 0 {
		return o, errors.New("want at least one round, 16 MiB, and some time")
	}
	return o, nil
}
