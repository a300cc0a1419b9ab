// Command bench measures the data path of the server of package nbd, as
// nbd-tool serves with it, beside nbdkit and qemu-nbd: the same images, the same
// clients with the same settings, in turn, round after round.
//
//	go run ./test/bench -o docs/BENCHMARKS.md
//	go run ./test/bench -run '^bulk/file/clear' -rounds 3
//
// What it prints are medians over the rounds, and the median, smallest and
// largest of the ratios ours/peer within one round. With -o it also replaces the
// generated part of a Markdown file; what people wrote around it stays.
//
// It is a program of its own and not `go test -bench`, because most of what it
// runs are other programs.
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
	run        *regexp.Regexp
	rounds     int
	warmUp     bool
	size       int64         // bytes of the image
	runFor     time.Duration // of a client that reads until time is up
	quick      bool
	list       bool
	out        string // Markdown file
	json       string
	tool       string // a built nbd-tool
	disk       string // folder for what must not be in memory
	congestion string // TCP congestion control; empty: the machine's
	args       []string
}

// subcommands are the roles that the program plays besides measuring: in
// processes of their own, so that what they cost can be told apart.
var subcommands = map[string]func(ctx context.Context, args []string, std streams) error{
	"serve-slow":    serveSlow,
	"serve-splice":  serveSplice,
	"serve-stalled": serveStalled,
	"read-bulk":     readBulk,
}

// streams are the standard ones.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal kills
	err := run(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr})
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is main with its surroundings as arguments.
func run(ctx context.Context, args []string, std streams) error {
	if len(args) > 0 {
		if sub, ok := subcommands[args[0]]; ok {
			return sub(ctx, args[1:], std)
		}
	}
	o, err := parseOptions(args, std.err)
	if err != nil {
		return err
	}
	cases := pick(allCases(), o.run)
	if o.list {
		for _, c := range cases {
			fmt.Fprintln(std.out, c.name)
		}
		return nil
	}
	if len(cases) == 0 {
		return errors.New("-run: no case matches, see -list")
	}
	if o.out != "" { // rather now than after all the work
		if _, err := spliceMarkdown(o.out, ""); err != nil {
			return err
		}
	}
	if o.congestion != "" {
		if err := withCongestion(ctx, o.congestion, args, std); err != nil || os.Getenv(insideVariable) == "" {
			return err
		}
	}
	return measureAll(ctx, o, cases, std)
}

// measureAll runs the cases and writes what came of it.
func measureAll(ctx context.Context, o options, cases []testCase, std streams) (err error) {
	b, err := newBench(ctx, o, std.err)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.run(ctx, cases); err != nil {
		return err
	}
	r := newReport(ctx, b)
	if err := r.writeText(std.out); err != nil {
		return err
	}
	if o.json != "" {
		if err := r.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.out != "" {
		if err := r.writeMarkdown(o.out); err != nil {
			return err
		}
	}
	if n := len(b.results.failures()); n > 0 {
		return fmt.Errorf("%d runs failed, see above", n)
	}
	return nil
}

func parseOptions(args []string, errOut io.Writer) (options, error) {
	o := options{args: args}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(errOut)
	pattern := f.String("run", "", "run the cases that match the regular `expression`")
	f.IntVar(&o.rounds, "rounds", 5, "measured rounds, after one that is not")
	size := f.Int64("size", 1024, "size of the image in `MiB`")
	f.DurationVar(&o.runFor, "time", 2*time.Second, "how long a client runs that reads until time is up")
	f.BoolVar(&o.quick, "quick", false, "small sizes, one round, no warm-up: shows that it works, measures nothing")
	f.BoolVar(&o.list, "list", false, "print the names of the cases and end")
	f.StringVar(&o.out, "o", "", "Markdown `file` whose generated part is replaced")
	f.StringVar(&o.json, "json", "", "`file` for the samples of every round")
	f.StringVar(&o.tool, "tool", "", "`path` of a built nbd-tool; the default is to build it")
	f.StringVar(&o.disk, "disk", os.TempDir(), "`folder` on a disk, for what must not be in memory")
	f.StringVar(&o.congestion, "congestion", "", "`name` of a TCP congestion control to be used instead of the machine's; wants root")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("arguments that are no flags: %q", f.Args())
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
