package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"xapi-nbd/test/leaks"
)

// TestMain also runs the subcommands: the program starts itself for them, and here that is
// the test's binary.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if sub, ok := subcommands[os.Args[1]]; ok {
			ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			if err := sub(ctx, os.Args[2:], os.Stderr); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	leaks.Main(m)
}

// TestFailedStart: files of a failed start are removed.
func TestFailedStart(t *testing.T) {
	t.Setenv("PATH", "") // no go
	if b, err := newBench(t.Context(), options{size: mib}, io.Discard); err == nil {
		t.Fatal(errors.Join(errors.New("got no error"), b.close()))
	}
}
