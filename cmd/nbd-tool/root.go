package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/buildinfo"
)

// exitCodesHelp describes the exit codes of all commands.
const exitCodesHelp = `Exit codes:
  0  done
  1  failed; the message has the cause
  2  usage`

// newRootCommand returns the command with all subcommands.
func newRootCommand(std streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "nbd-tool",
		Short: "An NBD client and a server of plain files",
		Long: `nbd-tool shows, copies and mirrors the exports of NBD servers, and serves files.

A URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with nbds
in place of nbd for TLS. The export name is percent-encoded.

A disk of a XenServer or XCP-ng host needs no URI: --host names the host, --vdi
the VDI, and --session-file a file with the reference of a session of xapi, or -
for standard input. The connection is encrypted unless --no-tls is given. Written
as a URI, two slashes follow HOST, because the export name begins with one of its
own, and its question mark is written %3F: nbds://HOST//UUID%3Fsession_id=REF.

A session is a secret: --session-file, and --uri-file for URIs, keep it from the
command line, and no output contains it.

TLS is set up by --tls-ca, --tls-certificates, --tls-hostname and --tls-insecure,
or by the URI's query: tls-certificates=DIR, tls-hostname=NAME,
tls-verify-peer=0. Without a CA the system's are trusted.

A server may take 30 seconds to greet and 2 minutes to open an export. After that
a request fails when nothing was sent or received for as long as --timeout says.
"copy" and "mirror" make lost connections again, for as long as their --retry-for says.

` + exitCodesHelp,
		Example: `  nbd-tool list nbd://localhost
  nbd-tool info --json nbd://localhost/disk
  nbd-tool copy --uri-file uri.txt --verify backup.img
  nbd-tool copy --host xs1 --tls-ca pool.pem --vdi 0e0fba52-7b2e-4b1e-8d3b-5d3a1f1c2b3a --session-file session.txt backup.img
  nbd-tool serve backup.img`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			var hint string
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				hint = "; is it " + strings.Join(near, " or ") + "?"
			}
			return usagef("unknown command %q%s", args[0], hint)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("which command?")
		},
	}
	root.SuggestionsMinimumDistance = 2
	root.Version = buildinfo.Version()
	root.SetVersionTemplate("nbd-tool {{.Version}}\n")
	root.Flags().Bool("version", false, "print the version")
	root.AddCommand(newListCommand(), newInfoCommand(), newSizeCommand(), newMapCommand(),
		newCopyCommand(std), newServeCommand(), newMirrorCommand(std), newCtlCommand(), newVersionCommand())
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
