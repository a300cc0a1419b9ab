// A certificate with a negative serial number, which some authorities have made,
// serves as well as any.
//
//go:debug x509negativeserial=1

// Command xapi-nbd exports the disks of a XenServer or XCP-ng host over NBD to
// clients that hold a session of its Xen API.
//
// This package has the command line, signals and exit codes. The service is
// internal/service, the other commands use the packages beside it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"xapi-nbd/cmd/internal/crash"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
)

func main() {
	if service.IsStart(os.Args) {
		os.Exit(service.Start(os.Args))
	}
	caught = catchSignals() // first of all
	crash.BySignal()
	var err error
	if predecessor, err = service.NewPredecessor(); err != nil {
		fmt.Fprintln(os.Stderr, "xapi-nbd:", err)
		os.Exit(exitFailed)
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// predecessor is the process that has started this one for an upgrade, nil if there is none.
var predecessor *service.Predecessor

// run is main with its surroundings as arguments. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := newRootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	predecessor.Fail(err)
	printWithin(logging.FlushLimit, stderr, fmt.Sprintln("xapi-nbd:", err))
	return exitCode(err)
}

// printWithin writes text and gives up after a time: a pipe that nobody reads must
// not keep the process from ending.
func printWithin(limit time.Duration, w io.Writer, text string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.WriteString(w, text)
	}()
	select {
	case <-done:
	case <-time.After(limit):
	}
}
