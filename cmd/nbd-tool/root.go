package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/buildinfo"
)

// newRootCommand is the whole command line.
func newRootCommand(std streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "nbd-tool",
		Short: "An NBD client and a server of plain files",
		Long: `nbd-tool looks at the exports of NBD servers, copies them, and serves files.

A URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with nbds
in place of nbd for TLS. The export name is percent-encoded: that of a disk of a
XenServer host begins with a slash of its own, so two slashes follow HOST, and
its question mark is written %3F. It holds a session, which is a secret:
--uri-file reads the URI from a file or, with -, from standard input, so that it
need not stand on a command line. Nothing that is printed repeats it.

TLS is set up by the URI's query: tls-certificates=DIR (ca-cert.pem and, if the
server asks for one, client-cert.pem and client-key.pem), tls-hostname=NAME,
tls-verify-peer=0; or by --tls-ca and --tls-insecure. Without a CA the system's
are trusted.

Exit codes: 0 done, 1 failed, 2 usage.`,
		Example: `  nbd-tool list nbd://localhost
  nbd-tool info --json nbd://localhost/disk
  nbd-tool copy --uri-file uri.txt --verify backup.img
  nbd-tool serve --read-only backup.img`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("which command?")
		},
	}
	root.Version = buildinfo.Version()
	root.SetVersionTemplate("nbd-tool {{.Version}}\n")
	root.Flags().Bool("version", false, "print the version")
	root.AddCommand(newListCommand(), newInfoCommand(), newSizeCommand(), newMapCommand(),
		newCopyCommand(std), newServeCommand(), newVersionCommand())
	return root
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: action(func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "nbd-tool", buildinfo.Version())
			return err
		}),
	}
}
