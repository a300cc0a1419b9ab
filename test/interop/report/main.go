// Command report runs `go test -json` and writes a table of the peers, their versions and the
// actions that were run into a document, between the lines
//
//	<!-- begin generated -->
//	<!-- end generated -->
//
// of the file that is its first argument. The rest of the file stays. The other arguments are
// those of go test. If a test fails, it prints the output of the test and does not write.
//
//	go run ./test/interop/report docs/results/INTEROP.md -count=1 ./test/interop ./ocaml-interop-tests
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: report DOCUMENT ARGUMENT-OF-GO-TEST...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(path string, args []string, progress io.Writer) error {
	document, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	// Before the tests: they take minutes.
	if _, err := splice(string(document), ""); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := newResults(progress)
	if err := errors.Join(r.read(stdout), cmd.Wait()); err != nil {
		return fmt.Errorf("%s stays as it is: %w", path, err)
	}
	fresh, err := splice(string(document), r.markdown())
	if err != nil {
		return err
	}
	fmt.Fprintf(progress, "%d passed, 0 failed, %d skipped: %s\n", r.passed, r.skipped, path)
	return os.WriteFile(path, []byte(fresh), 0o644)
}
