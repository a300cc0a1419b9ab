// Command report runs `go test -json` with its arguments and prints a summary: a line per
// package, the output of failed tests, every skipped test with its reason, and a count. `go
// test` alone hides skipped tests, so that a run that skips half of the tests looks complete.
//
//	go run ./test/report -race -shuffle=on ./...
//
// The exit status is that of `go test`, or 1 if a failure was seen without one.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
)

func main() {
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

func run(args []string) (int, error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	r := newReport(os.Stdout)
	readErr := r.read(out)
	waitErr := cmd.Wait()
	r.close()
	var exit *exec.ExitError
	switch {
	case errors.As(waitErr, &exit):
		return max(exit.ExitCode(), 1), readErr // -1 when killed by a signal
	case waitErr != nil:
		return 1, waitErr
	case r.failed > 0:
		return 1, readErr
	}
	return 0, readErr
}
