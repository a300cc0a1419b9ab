// A certificate with a negative serial number, which some authorities have made,
// serves as well as any.
//
//go:debug x509negativeserial=1

// Command xapi-nbd exports the disks of a XenServer or XCP-ng host over NBD to
// clients that hold a session of its Xen API.
//
// This package only composes: what the parts do is in the packages nbd, auth,
// vdi, xapi and tls.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"xapi-nbd/cmd/internal/crash"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
)

// The exit codes, which units and scripts rely on. A crash ends by a signal.
const (
	exitUsage       = 2 // usage or configuration: an administrator has to mend it
	exitBind        = 3 // an address that can never be listened on
	exitUnreachable = 4 // xapi unreachable within startup_wait
	exitLeft        = 5 // stopped in time, VBDs left in the journal
)

// exitError is an error that ends the process with a code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usageError(err error) error { return &exitError{exitUsage, err} }

func main() {
	caught = catchSignals() // first of all
	crash.BySignal()
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

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
	printWithin(logging.FlushLimit, stderr, fmt.Sprintln("xapi-nbd:", err))
	var exit *exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	return exitUsage
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
