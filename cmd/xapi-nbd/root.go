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
domain, serves it read-only, and unplugs it when the client is done.

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
     xapi's answer could not be used`
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
	flags := config.Default()
	var configFile string
	cmd := &cobra.Command{
		Use:   name,
		Short: "Run the service",
		Long: `Run the service until SIGTERM or SIGINT.

Every flag is also a key of the TOML file. A flag beats the file, the file beats
the default. The file has further keys: see xapi-nbd.toml(5).

What cannot be had yet, such as an address that is in use, is tried again until
it can.

Exit codes:
  0  clean stop
  2  usage or configuration, never a crash
  3  an address that can never be listened on
  4  xapi unreachable within startup_wait
  5  stopped in time, and VBDs are left in the journal for the next start, or a
     VBD.create was not answered and may still be executed

` + signalsHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			read := func() (config.Config, error) { return config.Load(cmd.Flags(), configFile) }
			return serve(cmd.Context(), cfg, read, cmd.ErrOrStderr())
		},
	}
	config.BindFlags(cmd.Flags(), &flags)
	completeValues(cmd)
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` (default "+config.DefaultFile+" when it exists)")
	cmd.Flags().String("ciphersuites", "", "accepted for the original's command lines, and ignored (`LIST`)")
	return cmd
}

// signalsHelp says what signals do to the service.
const signalsHelp = `Signals:
  SIGTERM, SIGINT  stop: refuse new clients, let requests end, detach every VDI,
           and exit within stop_timeout; a second one cuts connections at once,
           and still detaches
  SIGHUP   reload the settings, without ending a connection; those that need a
           restart are named in the log
  SIGUSR1, SIGUSR2, SIGALRM  logged, without effect
  SIGPIPE  ignored
  SIGABRT, SIGQUIT  print the goroutines and end by SIGABRT, as a crash does, and
           as systemd's watchdog ends a service that hangs; never with a core
           dump, which would hold sessions`

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
