package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"xapi-nbd/test/leaks"
)

// TestMain also plays the roles that the program plays besides measuring: what
// is tested starts itself for them.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if sub, ok := subcommands[os.Args[1]]; ok {
			ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			if err := sub(ctx, os.Args[2:], streams{os.Stdin, os.Stdout, os.Stderr}); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	leaks.Main(m)
}
