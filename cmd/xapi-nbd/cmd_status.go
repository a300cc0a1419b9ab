package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/xapi"
)

// statusOptions are the flags of status.
type statusOptions struct {
	json, watch, drain, undrain bool
	disconnect                  string
}

func newStatusCommand() *cobra.Command {
	flags := config.Default()
	var (
		configFile string
		opts       statusOptions
	)
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the running service",
		Long: `Show the state of the running service: its limits, the state of xapi, the VDIs
that are attached, the connections, the journal. The command asks the service
through the control socket in its state folder, which only root may use.

RATE is the average since the connection was first served; with --watch it is
that of the last second. DONE is the position of the last read, as a share of
the disk: skipped blocks count, and a client that starts again starts at 0. LEFT
is the time for the rest at the rate of the last half minute. INFLIGHT is the
number of requests that are being served.

With --drain new clients are refused, those that are served may finish, and then
the service ends, with exit code 0. Until the last of them has ended --undrain
takes that back: new clients are served again.

Exit codes:
  0  done
  1  no running service was found, there is no such connection, or it is too late
     for --undrain
  2  usage or configuration`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return status(ctx, filepath.Join(cfg.StateDir, control.SocketName), opts, cmd.OutOrStdout())
		},
	}
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(all, &flags)
	cmd.Flags().BoolVar(&opts.json, "json", false, "as JSON; with --watch one line for each second")
	cmd.Flags().BoolVar(&opts.watch, "watch", false, "again every second, in place on a terminal, until interrupted")
	cmd.Flags().StringVar(&opts.disconnect, "disconnect", "", "cut the connection with this `ID`, or all connections to the VDI with this uuid")
	cmd.Flags().BoolVar(&opts.drain, "drain", false, "refuse new clients, let the others finish, then end the service")
	cmd.Flags().BoolVar(&opts.undrain, "undrain", false, "take --drain back: serve new clients again")
	cmd.Flags().AddFlag(all.Lookup("state-dir"))
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` of the service (default "+config.DefaultFile+" when it exists)")
	cmd.MarkFlagsMutuallyExclusive("watch", "disconnect", "drain", "undrain")
	return cmd
}

// watchEvery is the time between two frames.
const watchEvery = time.Second

// status runs the action that opts selects, or prints the state once.
func status(ctx context.Context, socket string, opts statusOptions, out io.Writer) error {
	switch {
	case opts.disconnect != "":
		return askDisconnect(ctx, socket, opts.disconnect, out)
	case opts.drain:
		return askDrain(ctx, socket, out)
	case opts.undrain:
		return askUndrain(ctx, socket, out)
	case opts.watch:
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		return watch(ctx, socket, opts.json, out, tick.C)
	}
	report, err := askStatus(ctx, socket)
	if err != nil {
		return err
	}
	if opts.json {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(report)
	}
	_, err = io.WriteString(out, control.Screen(report, nil))
	return err
}

func askStatus(ctx context.Context, socket string) (*control.StatusReport, error) {
	report := new(control.StatusReport)
	if err := control.Ask(ctx, socket, http.MethodGet, "/status", report); err != nil {
		return nil, notRunning(err)
	}
	return report, nil
}

// notRunning returns the error of a command that could not reach the service.
func notRunning(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		err = errors.New("no running service was found")
	case errors.Is(err, os.ErrPermission):
		err = errors.New("only root may ask the service")
	}
	return &exitError{exitFailed, err}
}

func askDisconnect(ctx context.Context, socket, id string, out io.Writer) error {
	var report control.DisconnectReport
	if err := control.Ask(ctx, socket, http.MethodPost, "/disconnect?id="+url.QueryEscape(id), &report); err != nil {
		return notRunning(err)
	}
	if !report.Found {
		return &exitError{exitFailed, fmt.Errorf("there is no connection, and none to a VDI, %q", id)}
	}
	text := fmt.Sprintf("Connection %s was cut.\n", id)
	if xapi.IsUUID(id) {
		text = fmt.Sprintf("Connections to VDI %s that were cut: %d.\n", id, report.Count)
	}
	_, err := io.WriteString(out, text)
	return err
}

func askDrain(ctx context.Context, socket string, out io.Writer) error {
	var report control.DrainReport
	if err := control.Ask(ctx, socket, http.MethodPost, "/drain", &report); err != nil {
		return notRunning(err)
	}
	if report.Error != "" {
		return &exitError{exitFailed, errors.New(report.Error)}
	}
	_, err := fmt.Fprintf(out, "New clients are refused. Connections that may finish: %d. Then the service ends.\n", report.Serving)
	return err
}

func askUndrain(ctx context.Context, socket string, out io.Writer) error {
	var report control.UndrainReport
	if err := control.Ask(ctx, socket, http.MethodPost, "/undrain", &report); err != nil {
		return notRunning(err)
	}
	text := "New clients are served again.\n"
	switch {
	case report.Error != "":
		return &exitError{exitFailed, errors.New(report.Error)}
	case !report.Changed:
		text = "The service was not draining.\n"
	}
	_, err := io.WriteString(out, text)
	return err
}

// clearScreen moves the cursor to the upper left corner and clears the screen.
const clearScreen = "\x1b[H\x1b[2J"

// watch shows a frame at once and one at each tick, until ctx ends, or the service
// does.
func watch(ctx context.Context, socket string, asJSON bool, out io.Writer, tick <-chan time.Time) error {
	f, ok := out.(*os.File)
	inPlace := ok && term.IsTerminal(int(f.Fd()))
	var last *control.StatusReport
	for {
		report, err := askStatus(ctx, socket)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := showFrame(out, report, last, asJSON, inPlace); err != nil {
			return err
		}
		last = report
		select {
		case <-tick:
		case <-ctx.Done():
			return nil
		}
	}
}

// showFrame writes one frame: in place, or behind the last one and a blank line.
func showFrame(out io.Writer, report, last *control.StatusReport, asJSON, inPlace bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(report)
	}
	frame := control.Screen(report, last)
	switch {
	case inPlace:
		frame = clearScreen + frame
	case last != nil:
		frame = "\n" + frame
	}
	_, err := io.WriteString(out, frame)
	return err
}
