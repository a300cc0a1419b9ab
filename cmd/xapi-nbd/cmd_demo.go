package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/xapi-nbd/internal/demo"
)

func newDemoCommand() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show it all in one process: a simulated XenServer host, the service and a client",
		Long: `Show it all in one process, on loopback, without root and without any other tool:
a simulated XenServer host with a sample disk, the service, and a client. Over TLS
the client makes a full copy of a snapshot, and, when the disk has changed, brings
the copy up to date with a second snapshot; both times checksums are compared.

Without --once it goes on serving and prints command lines to try. Nothing here
touches a real xapi; the session in the export names is a simulated one.

Exit codes:
  0  done, or ended by SIGINT or SIGTERM
  1  it failed
  2  usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if err := demo.Run(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr(), once); err != nil {
				return &exitError{exitFailed, err}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "exit after the disk was copied and compared")
	return cmd
}
