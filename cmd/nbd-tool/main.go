// Servers may send certificates with a negative serial number, which some
// authorities have made.
//
//go:debug x509negativeserial=1

// Command nbd-tool is an NBD client for people and scripts, and a server of plain files. Of
// Xen it supports only the export names of XenServer and XCP-ng hosts.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/crash"
)

// The exit codes, which scripts rely on.
const (
	exitOK     = 0
	exitFailed = 1 // the command failed
	exitUsage  = 2 // the command line is invalid
)

// usageError is an error of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// failure is an error of a command, as opposed to one of cobra about the command line.
type failure struct{ error }

func (e failure) Unwrap() error { return e.error }

func main() {
	crash.BySignal()
	os.Exit(runProcess())
}

// runProcess runs the program with the arguments and streams of the process.
func runProcess() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal kills
	defer stop()
	return run(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr})
}

// streams are the standard streams. Only the data of a copy and the progress bar, which
// needs to know whether there is a terminal, use them directly. All other output goes
// through the redacting writers of the command.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// run is main with the arguments and the standard streams as parameters. It returns the exit
// code.
func run(ctx context.Context, args []string, std streams) int {
	cmd := newRootCommand(std)
	cmd.SetArgs(args)
	cmd.SetIn(std.in)
	known := new(secrets)
	cmd.SetOut(redactor{std.out, known})
	cmd.SetErr(redactor{std.err, known})
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var reported exitStatus
	if errors.As(err, &reported) {
		return int(reported)
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "nbd-tool:", err)
	var failed failure
	if errors.As(err, &failed) {
		return exitFailed
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "nbd-tool: --help shows how it is used")
	return exitUsage
}

// surviveBrokenPipes makes a write to a standard stream that nobody reads any more fail, instead
// of ending the process by SIGPIPE. Commands that take long call it: such a message may be lost,
// but not the work.
func surviveBrokenPipes() { signal.Ignore(syscall.SIGPIPE) }

// action returns a function for cobra whose errors are failures, except usage errors.
func action(do func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := do(cmd, args)
		var usage usageError
		if err == nil || errors.As(err, &usage) {
			return err
		}
		return failure{err}
	}
}
