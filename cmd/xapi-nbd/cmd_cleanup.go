package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/vdi"
)

func newCleanupCommand() *cobra.Command {
	flags := config.Default()
	flags.LogLevel = cleanupLogLevel
	var configFile string
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Unplug and destroy the VBDs that the service left behind",
		Long: `Unplug and destroy the VBDs that this service left behind on this host, then
exit. They are those of the journal in the state folder and those of the control
domain that carry this host's tag; no other VBD is touched.

The running service does this by itself, at its start and every few minutes.
With a service running this command asks that one to do it now; VBDs in use are
left alone.

Exit codes:
  0  nothing is left
  2  usage or configuration
  4  xapi unreachable
  5  something is left, or it is not known whether something is: a VBD.create was
     not answered and may still be executed, or xapi's answer could not be used`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The settings of the service may make no sense without its flags,
			// and most of them do not matter here.
			cfg, err := config.Read(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			if !cmd.Flags().Changed("log-level") {
				cfg.LogLevel = cleanupLogLevel
			}
			return cleanup(cmd.Context(), cfg, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(all, &flags)
	for _, name := range []string{"xapi-socket", "inventory", "state-dir", "log-level"} {
		cmd.Flags().AddFlag(all.Lookup(name))
	}
	completeValues(cmd)
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` of the service (default "+config.DefaultFile+" when it exists)")
	return cmd
}

// cleanupLogLevel is the default of --log-level: the command prints a report of its own.
const cleanupLogLevel = "warning"

// firstLockPause is the first pause between attempts while the state folder is locked; each
// further one is twice as long.
const firstLockPause = 250 * time.Millisecond

// lockPatience is how long a clean-up waits while a process that does not answer on a
// control socket has locked the state folder.
const lockPatience = 30 * time.Second

// cleanup removes leftover VBDs, or has the running service do it.
func cleanup(ctx context.Context, cfg config.Config, out, stderr io.Writer) error {
	log, _, queue := logging.NewQueued(new(slog.LevelVar), cfg, stderr)
	defer queue.Flush(logging.FlushLimit)
	result, err := service.CleanUp(ctx, cfg, log)
	for wait, waited := firstLockPause, time.Duration(0); errors.Is(err, vdi.ErrLocked); wait *= 2 {
		// The other process may use another state folder.
		socket := filepath.Join(cfg.StateDir, control.SocketName)
		var locked *vdi.LockedError
		if errors.As(err, &locked) && locked.StateDir != "" {
			socket = filepath.Join(locked.StateDir, control.SocketName)
		}
		if _, nobody := proc.SocketOwner(ctx, socket); nobody == nil {
			fmt.Fprintln(out, "The service is running; it has been asked to clean up.")
			result, err = service.AskToCleanUp(ctx, socket)
			break
		}
		if waited >= lockPatience {
			return &exitError{exitLeft, fmt.Errorf("it is not known whether VBDs are left: %w, which does not answer", err)}
		}
		if waited == 0 {
			fmt.Fprintln(out, "Another clean-up is running, or a service is starting or ending: waiting for it.")
		}
		time.Sleep(wait)
		waited += wait
		result, err = service.CleanUp(ctx, cfg, log)
	}
	printRecovered(out, result)
	switch {
	case len(result.Left) > 0 && err != nil:
		return &exitError{exitLeft, fmt.Errorf("VBDs are left behind: %w", err)}
	case err != nil:
		return err
	case len(result.Removed) == 0:
		fmt.Fprintln(out, "Nothing was left behind.")
	}
	return nil
}

func printRecovered(out io.Writer, result vdi.Recovered) {
	for _, uuid := range result.Removed {
		fmt.Fprintln(out, "removed", uuid)
	}
	for _, l := range result.Left {
		if l.VBD == "" {
			fmt.Fprintln(out, "left    a VBD.create that was not answered, for VDI", l.VDI)
			continue
		}
		fmt.Fprintln(out, "left   ", l.VBD)
	}
}
