package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/buildinfo"
)

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long: `Print the version.

Exit codes:
  0  done
  2  usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "xapi-nbd", buildinfo.Version())
			return err
		},
	}
}
