package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
)

// serveName is the name of the command that runs the service. The root command does the
// same.
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

An address that is in use, a locked state folder and the like do not end the
service: it tries again until it succeeds.

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

// signalsHelp is the part of the help text about signals.
const signalsHelp = `Signals:
  SIGTERM, SIGINT  stop: refuse new clients, let requests end, detach every VDI,
           and exit within stop_timeout; a second one cuts connections at once,
           and still detaches
  SIGHUP   reload the settings, without ending a connection; those that need a
           restart are named in the log
  SIGUSR2  upgrade: see xapi-nbd-upgrade(8)
  SIGUSR1, SIGALRM  logged, without effect
  SIGPIPE  ignored
  SIGABRT, SIGQUIT  print the goroutines and end by SIGABRT, as a crash does, and
           as systemd's watchdog ends a service that hangs; never with a core
           dump, which would hold sessions`

// serve runs the service until a signal. read reads its settings again.
func serve(ctx context.Context, cfg config.Config, read func() (config.Config, error), stderr io.Writer) error {
	var level slog.LevelVar
	log, always, queue := logging.NewQueued(&level, cfg, stderr)
	defer queue.Flush(logging.FlushLimit)
	for _, note := range cfg.Notes() {
		log.Warn(note)
	}
	catcher := caught
	if catcher == nil {
		catcher = catchSignals()
	}
	stop, hurry, wanted, done := catcher.signals(ctx, log)
	defer done()
	s, err := service.New(ctx, service.Options{
		Config: cfg, Log: log, Always: always, LogDropped: queue.Dropped,
		Reloading: service.Reloading{Requests: wanted.reloads, Read: read, Level: &level},
		Upgrades:  wanted.upgrades, Predecessor: predecessor,
	})
	if err != nil {
		return logged(log, err)
	}
	return logged(log, s.Run(stop, hurry))
}

// logged writes the error that ends the process to the log, too.
func logged(log *slog.Logger, err error) error {
	if err != nil {
		log.Error("xapi-nbd ends", "err", err)
	}
	return err
}
