package main

import (
	"context"
	"io"
	"log/slog"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
)

// serve runs the service until a signal. read reads its settings anew.
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
	stop, hurry, reloads, done := catcher.signals(ctx, log)
	defer done()
	s, err := newService(ctx, Options{
		Config: cfg, Log: log, Always: always, LogDropped: queue.Dropped,
		Reloading: Reloading{Requests: reloads, Read: read, Level: &level},
	})
	if err != nil {
		return logged(log, err)
	}
	return logged(log, s.run(stop, hurry))
}

// logged writes what the process ends with to the log, where operators look.
func logged(log *slog.Logger, err error) error {
	if err != nil {
		log.Error("xapi-nbd ends", "err", err)
	}
	return err
}
