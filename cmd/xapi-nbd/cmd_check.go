package main

import (
	"errors"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/xapi-nbd/internal/check"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

func newCheckCommand() *cobra.Command {
	flags := config.Default()
	var configFile string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check this host's set-up, and name a remedy for each fault",
		Long: `Check everything that the service needs on this host: settings, xapi,
inventory, networks, certificate, state folder, device folder, addresses, limits
and kernel. The report has each finding, and a remedy below each fault.

Takes the flags of the service. Without a certfile, in flags or file, it checks
the one that the packaged unit passes. It changes nothing and does not disturb a
running service. Limits are those of the running service, else those of this
process.

Only root may read all of that: for another user there is one finding, saying so.

Exit codes:
  0  no problems; warnings are none
  1  problems were found
  2  usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report := check.Run(cmd.Context(), check.Observe(), cmd.Flags(), configFile)
			write := report.Text
			if asJSON {
				write = report.JSON
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if report.Problems > 0 {
				return &exitError{exitFailed, errors.New("this host is not ready")}
			}
			return nil
		},
	}
	config.BindFlags(cmd.Flags(), &flags)
	completeValues(cmd)
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` (default "+config.DefaultFile+" when it exists)")
	cmd.Flags().String("ciphersuites", "", "accepted for the original's command lines, and ignored (`LIST`)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "report as JSON")
	return cmd
}
