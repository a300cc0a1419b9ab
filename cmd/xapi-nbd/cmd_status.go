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

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/xapi"
)

// statusOptions are the flags of status.
type statusOptions struct {
	json, watch, drain, undrain, endReplaced bool
	disconnect                               string
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

After an upgrade the processes that were replaced serve the connections that they
have. They are shown, and --disconnect reaches them, also when no process serves
new clients, after a crash. With --end-replaced they end as at a stop of the
service, and their connections with them; new clients are served as before.

Exit codes:
  0  done
  1  no running service was found, there is no such connection, it is too late
     for --undrain, or a process cannot be ended
  2  usage or configuration`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(cmd.Flags(), configFile)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return status(ctx, cfg, opts, cmd.OutOrStdout())
		},
	}
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	config.BindFlags(all, &flags)
	cmd.Flags().BoolVar(&opts.json, "json", false, "as JSON; with --watch one line for each second")
	cmd.Flags().BoolVar(&opts.watch, "watch", false, "again every second, in place on a terminal, until interrupted")
	cmd.Flags().StringVar(&opts.disconnect, "disconnect", "", "close the connection with this `ID`, or all connections to the VDI with this uuid")
	cmd.Flags().BoolVar(&opts.drain, "drain", false, "refuse new clients, let the others finish, then end the service")
	cmd.Flags().BoolVar(&opts.undrain, "undrain", false, "take --drain back: serve new clients again")
	cmd.Flags().BoolVar(&opts.endReplaced, "end-replaced", false, "end the processes that upgrades have replaced, with their connections")
	cmd.Flags().AddFlag(all.Lookup("state-dir"))
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` of the service (default "+config.DefaultFile+" when it exists)")
	cmd.MarkFlagsMutuallyExclusive("watch", "disconnect", "drain", "undrain", "end-replaced")
	return cmd
}

// watchEvery is the time between two frames.
const watchEvery = time.Second

// status runs the action that opts selects, or prints the state once.
func status(ctx context.Context, cfg config.Config, opts statusOptions, out io.Writer) error {
	dir := cfg.StateDir
	switch {
	case opts.disconnect != "":
		return askDisconnect(ctx, dir, opts.disconnect, out)
	case opts.drain:
		return askDrain(ctx, dir, out)
	case opts.undrain:
		return askUndrain(ctx, dir, out)
	case opts.endReplaced:
		return endReplaced(cfg, out)
	case opts.watch:
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		return watch(ctx, dir, opts.json, out, tick.C)
	}
	report, err := askStatus(ctx, dir)
	if report == nil {
		return err
	}
	if opts.json {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return errors.Join(e.Encode(report), err)
	}
	_, werr := io.WriteString(out, control.Screen(report, nil))
	return errors.Join(werr, err)
}

// askTimeout bounds a request that does not wait for anything but xapi, of which it makes
// few calls, and for processes that were replaced.
const askTimeout = time.Minute

// ask sends a request to the service that uses a state folder.
func ask(ctx context.Context, dir, method, target string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return control.Ask(ctx, filepath.Join(dir, control.SocketName), method, target, answer)
}

// askStatus returns the status of the service. If only processes that were replaced answer,
// it returns an error and theirs.
func askStatus(ctx context.Context, dir string) (*control.StatusReport, error) {
	report := new(control.StatusReport)
	err := ask(ctx, dir, http.MethodGet, "/status", report)
	if err == nil {
		return report, nil
	}
	replaced := service.NewReplaced(dir).Status(ctx)
	if len(replaced) == 0 {
		return nil, notRunning(err)
	}
	report = &control.StatusReport{
		Version: buildinfo.Version(), State: control.StateNoAnswer, Now: time.Now(), Replaced: replaced,
		Listening: []string{}, Retries: []control.RetryReport{}, Attachments: []control.AttachmentReport{},
		Leftovers: []control.LeftoverReport{}, Connections: []control.ConnectionReport{}, Journal: []string{},
	}
	return report, notRunning(err)
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

func askDisconnect(ctx context.Context, dir, id string, out io.Writer) error {
	var report control.DisconnectReport
	if err := ask(ctx, dir, http.MethodPost, "/disconnect?id="+url.QueryEscape(id), &report); err != nil {
		report.Count = service.NewReplaced(dir).Disconnect(ctx, id)
		if report.Count == 0 {
			return notRunning(err)
		}
	}
	if !report.Found && report.Count == 0 {
		return &exitError{exitFailed, fmt.Errorf("there is no connection, and none to a VDI, %q", id)}
	}
	text := fmt.Sprintf("Connection %s was closed.\n", id)
	if xapi.IsUUID(id) {
		text = fmt.Sprintf("Connections to VDI %s that were closed: %d.\n", id, report.Count)
	}
	_, err := io.WriteString(out, text)
	return err
}

// endMargin is how much longer than stop_timeout a process may take to end.
const endMargin = 2 * time.Second

// endReplaced ends the processes that were replaced.
func endReplaced(cfg config.Config, out io.Writer) error {
	n, err := service.NewReplaced(cfg.StateDir).End(time.Duration(cfg.StopTimeout) + endMargin)
	if err != nil {
		return &exitError{exitFailed, err}
	}
	_, err = fmt.Fprintf(out, "Processes that were replaced and have been ended: %d.\n", n)
	return err
}

func askDrain(ctx context.Context, dir string, out io.Writer) error {
	var report control.DrainReport
	if err := ask(ctx, dir, http.MethodPost, "/drain", &report); err != nil {
		if n := len(service.NewReplaced(dir).Status(ctx)); n > 0 {
			err = fmt.Errorf("no process that serves new clients answers; those that were replaced (%d) end with their last connection, as they do anyway", n)
		}
		return notRunning(err)
	}
	if report.Error != "" {
		return &exitError{exitFailed, errors.New(report.Error)}
	}
	_, err := fmt.Fprintf(out, "New clients are refused. Connections that may finish: %d. Then the service ends.\n", report.Serving)
	return err
}

func askUndrain(ctx context.Context, dir string, out io.Writer) error {
	var report control.UndrainReport
	if err := ask(ctx, dir, http.MethodPost, "/undrain", &report); err != nil {
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
func watch(ctx context.Context, dir string, asJSON bool, out io.Writer, tick <-chan time.Time) error {
	f, ok := out.(*os.File)
	inPlace := ok && term.IsTerminal(int(f.Fd()))
	var last *control.StatusReport
	for {
		report, err := askStatus(ctx, dir)
		if ctx.Err() != nil {
			return nil
		}
		if report == nil {
			return err
		}
		if err := errors.Join(showFrame(out, report, last, asJSON, inPlace), err); err != nil {
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
