package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
)

func newUpgradeCommand() *cobra.Command {
	flags := config.Default()
	var configFile string
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Hand over to the installed program without ending a transfer",
		Long: `Hand over to the installed program without ending a transfer, as the packages do
after they have replaced it. SIGUSR2 to the service does the same.

The running process starts the program that is now at its path, with its command
line. The new process reads the configuration, opens everything, and then serves
all new clients. The old one serves the connections that it has until they end, or
until drain_timeout (24 hours) is over; status shows both, and a stop of the
service stops both.

If the new process ends, or is not ready within 30 seconds, it is killed and the
old one goes on as before.

Exit codes:
  0  the new process serves
  1  no running service was found, or it cannot upgrade because it is too old
  2  usage or configuration
  6  not upgraded: the old process goes on`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			return upgrade(cmd.Context(), filepath.Join(cfg.StateDir, control.SocketName), cmd.OutOrStdout())
		},
	}
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(all, &flags)
	cmd.Flags().AddFlag(all.Lookup("state-dir"))
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` of the service (default "+config.DefaultFile+" when it exists)")
	return cmd
}

// upgrade has the running service upgrade.
func upgrade(ctx context.Context, socket string, out io.Writer) error {
	var report control.UpgradeReport
	if err := control.Ask(ctx, socket, http.MethodPost, "/upgrade", &report); err != nil {
		return notRunning(err)
	}
	if report.Error != "" {
		return &exitError{exitNotUpgraded, errors.New("not upgraded, the old process goes on: " + report.Error)}
	}
	_, err := fmt.Fprintf(out, "Process %d, version %s, serves new clients. Connections that the old process still serves: %d.\n",
		report.PID, report.Version, report.Waiting)
	return err
}
