package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/vdi"
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
old one goes on as before. At most three processes that were replaced may serve
connections: then the next upgrade has to wait for one of them.

Only with exit code 1 can a restart of the service help.

Exit codes:
  0  the new process serves
  1  no running service was found, or it cannot upgrade because it is too old
  2  usage or configuration: nothing was done
  6  not upgraded: the old process goes on. Or the service did not answer, and
     it is not known whether it was upgraded: status says which version serves`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			return upgrade(cmd.Context(), cfg.StateDir, cmd.OutOrStdout())
		},
	}
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(all, &flags)
	cmd.Flags().AddFlag(all.Lookup("state-dir"))
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` of the service (default "+config.DefaultFile+" when it exists)")
	return cmd
}

const (
	// upgradeTimeout is more than an upgrade takes: the old process limits each of its steps.
	upgradeTimeout = 90 * time.Second
	// upgradeLookTime is how long upgrade looks for the process that serves after its answer
	// was lost. systemd starts a service that has crashed after a second.
	upgradeLookTime  = 10 * time.Second
	upgradeLookPause = 100 * time.Millisecond
)

// upgrade has the service that uses a state folder upgrade.
func upgrade(ctx context.Context, dir string, out io.Writer) error {
	socket := filepath.Join(dir, control.SocketName)
	var before control.StatusReport
	err := ask(ctx, dir, http.MethodGet, "/status", &before)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
		defer cancel()
		var report control.UpgradeReport
		err = control.Ask(ctx, socket, http.MethodPost, "/upgrade", &report)
		switch {
		case err == nil && report.Error != "":
			return notUpgraded("not upgraded, the old process goes on: %s", report.Error)
		case err == nil:
			return printUpgraded(out, report)
		}
	}
	switch {
	case errors.Is(err, control.ErrNoRequest): // too old
		return notRunning(err)
	case before.PID == 0 && (errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		// Without its control socket it cannot be asked, and may have transfers all the same.
		if pid := proc.LockHolder(vdi.LockPath(dir)); pid != 0 {
			return notUpgraded("not upgraded: process %d (%s) uses %s and has no control socket there", pid, proc.Name(pid), dir)
		}
		return notRunning(err)
	case errors.Is(err, os.ErrPermission), before.PID == 0:
		return notUpgraded("not upgraded: %v", err)
	}
	return lookForUpgraded(ctx, dir, before, err, out)
}

// notUpgraded returns an error with exit code 6.
func notUpgraded(format string, args ...any) error {
	return &exitError{exitNotUpgraded, fmt.Errorf(format, args...)}
}

func printUpgraded(out io.Writer, r control.UpgradeReport) error {
	_, err := fmt.Fprintf(out, "Process %d, version %s, serves new clients. Connections that the old process still serves: %d.\n",
		r.PID, r.Version, r.Waiting)
	return err
}

// lookForUpgraded finds out what became of an upgrade whose answer was lost with that error:
// the process may have ended after the new one had taken over, or before.
func lookForUpgraded(ctx context.Context, dir string, before control.StatusReport, lost error, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, upgradeLookTime)
	defer cancel()
	tick := time.NewTicker(upgradeLookPause)
	defer tick.Stop()
	for {
		var now control.StatusReport
		err := ask(ctx, dir, http.MethodGet, "/status", &now)
		switch {
		case err == nil && now.PID != before.PID:
			waiting := 0
			for _, r := range now.Replaced {
				waiting += r.Limits.Connections
			}
			return printUpgraded(out, control.UpgradeReport{PID: now.PID, Version: now.Version, Waiting: waiting})
		case err == nil:
			return notUpgraded("process %d still serves new clients, and did not answer: %w", now.PID, lost)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return notUpgraded("it is not known whether the service was upgraded, and no process answers now: %w", lost)
		}
	}
}
