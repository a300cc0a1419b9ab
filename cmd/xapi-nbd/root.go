package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// newRootCommand is the whole command line. Without a subcommand it serves, so
// that command lines of the original service keep working.
func newRootCommand() *cobra.Command {
	root := newServeCommand("xapi-nbd")
	root.Short = "Export XenServer disks over NBD"
	root.Long = `xapi-nbd exports the disks (VDIs) of a XenServer or XCP-ng host over NBD.

A backup tool asks xapi for a disk's NBD address and gets an export name that
carries its session. xapi-nbd checks the session, plugs the disk to the control
domain, serves it, and unplugs it when the client is done. Disks are served
read-only, unless the client asks for more and the configuration allows it.

Without a subcommand it runs the service.

Exit codes:
  0  done; the service: a clean stop
  1  check found problems; status found no running service or no such
     connection, or it is too late for --undrain; demo failed
  2  usage or configuration, never a crash
  3  the service: an address that can never be listened on
  4  the service and cleanup: xapi unreachable within startup_wait
  5  the service and cleanup: VBDs are left in the journal for the next start, or
     a VBD.create was not answered and may still be executed; cleanup also when
     xapi's answer could not be used
  6  upgrade: the new process did not get ready, and the old one goes on`
	root.Example = `  xapi-nbd --certfile=/etc/xensource/xapi-ssl.pem
  xapi-nbd serve --config /etc/xapi-nbd.toml
  xapi-nbd check
  xapi-nbd cleanup
  xapi-nbd upgrade
  xapi-nbd demo --once`
	root.Version = buildinfo.Version()
	root.SetVersionTemplate("xapi-nbd {{.Version}}\n")
	root.Flags().Bool("version", false, "print the version")
	root.Args = noSuchCommand
	root.SuggestionsMinimumDistance = 2
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentPreRun = func(cmd *cobra.Command, _ []string) {
		if cmd.HasParent() && cmd.Name() != serveName {
			caught.release()
		}
	}
	root.AddCommand(newServeCommand(serveName), newStatusCommand(), newCheckCommand(), newCleanupCommand(), newUpgradeCommand(), newDemoCommand(), newVersionCommand())
	return root
}

// completeValues has the shells offer the values of those flags of a command that
// take one of a few.
func completeValues(cmd *cobra.Command) {
	for _, e := range config.Enumerated {
		if flag := strings.ReplaceAll(e.Key, "_", "-"); cmd.Flags().Lookup(flag) != nil {
			// It fails only for a flag that does not exist, or when called twice.
			_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(e.Values, cobra.ShellCompDirectiveNoFileComp))
		}
	}
}

// noSuchCommand refuses arguments that are no subcommand, and names those that may
// have been meant.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
	if meant := cmd.SuggestionsFor(args[0]); len(meant) > 0 {
		text += "; did you mean " + strings.Join(meant, " or ") + "?"
	}
	return errors.New(text)
}
