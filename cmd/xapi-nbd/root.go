package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/buildinfo"
)

// newRootCommand is the whole command line. Without a subcommand it serves, so
// that command lines of the original service keep working.
func newRootCommand() *cobra.Command {
	root := newServeCommand("xapi-nbd")
	root.Short = "Export XenServer disks over NBD"
	root.Long = `xapi-nbd exports the disks (VDIs) of a XenServer or XCP-ng host over NBD.

A backup tool asks xapi for a disk's NBD address and gets an export name that
carries its session. xapi-nbd checks the session, plugs the disk to the control
domain, serves it read-only, and unplugs it when the client is done.

Without a subcommand it runs the service.`
	root.Example = `  xapi-nbd --certfile=/etc/xensource/xapi-ssl.pem
  xapi-nbd serve --config /etc/xapi-nbd.toml
  xapi-nbd check
  xapi-nbd cleanup
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
	root.AddCommand(newServeCommand(serveName), newStatusCommand(), newCheckCommand(), newCleanupCommand(), newDemoCommand(), newVersionCommand())
	return root
}

// serveName is the command that root is too.
const serveName = "serve"

func newServeCommand(name string) *cobra.Command {
	flags := defaults()
	var configFile string
	cmd := &cobra.Command{
		Use:   name,
		Short: "Run the service",
		Long: `Run the service until SIGTERM or SIGINT. SIGHUP has it read its settings anew.

Every flag is also a key of the TOML file. A flag beats the file, the file beats
the default. The file has further keys: see xapi-nbd.toml(5).

Exit codes: 0 clean stop, 2 usage or configuration, 3 an address that can never
be listened on, 4 xapi unreachable within startup_wait, 5 stopped with VBDs left
in the journal. What cannot be had yet, such as an address that is in use, is
tried again until it can.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd.Flags(), configFile)
			if err != nil {
				return usageError(err)
			}
			read := func() (config, error) { return loadConfig(cmd.Flags(), configFile) }
			return serve(cmd.Context(), cfg, read, cmd.ErrOrStderr())
		},
	}
	bindFlags(cmd.Flags(), &flags)
	for flag, values := range map[string][]string{
		"tls":        {tlsXapi, tlsRequire, tlsOff},
		"log-level":  {"debug", "info", "warning", "error"},
		"log-format": {"auto", "text", "json", "syslog"},
	} {
		// It fails for a flag that there is not, which the tests would notice.
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` (default "+defaultConfigFile+" when it exists)")
	cmd.Flags().String("ciphersuites", "", "accepted for the original's command lines, and ignored")
	return cmd
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "xapi-nbd", buildinfo.Version())
			return err
		},
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
