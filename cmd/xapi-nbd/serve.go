package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// serve runs the service until a signal. read reads its settings anew.
func serve(ctx context.Context, cfg config, read func() (config, error), stderr io.Writer) error {
	var level slog.LevelVar
	log, always, err := newLoggerAt(&level, cfg, stderr)
	if err != nil {
		return usageError(err)
	}
	for _, note := range cfg.notes {
		log.Warn(note)
	}
	stop, hurry, reloads, done := signals(ctx, log)
	defer done()
	s, err := newService(ctx, cfg, log, always)
	if err != nil {
		return logged(log, err)
	}
	s.level, s.readConfig, s.reloads = &level, read, reloads
	return logged(log, s.run(stop, hurry))
}

// logged writes what the process ends with to the log, where operators look.
func logged(log *slog.Logger, err error) error {
	if err != nil {
		log.Error("xapi-nbd ends", "err", err)
	}
	return err
}

// signals returns a context that ends with the first SIGTERM or SIGINT, and one
// that ends with the second, and a channel that receives after SIGHUP. Other
// signals that would kill are logged: none of them may leave a disk plugged. The
// order to end has a channel of its own, so that it never waits for the log.
func signals(ctx context.Context, log *slog.Logger) (stop, hurry context.Context, reloads <-chan struct{}, done func()) {
	stop, cancelStop := context.WithCancelCause(ctx)
	hurry, cancelHurry := context.WithCancel(context.Background())
	// SIGPIPE would kill when the reader of our log goes away.
	signal.Ignore(syscall.SIGPIPE)
	ends, others := make(chan os.Signal, 2), make(chan os.Signal, 8)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(others, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM)
	finished := make(chan struct{})
	wanted := make(chan struct{}, 1)
	go func() {
		for {
			select {
			case sig := <-ends:
				if stop.Err() == nil {
					cancelStop(errors.New("signal: " + sig.String()))
				} else {
					cancelHurry()
				}
			case <-finished:
				return
			}
		}
	}()
	go func() {
		for {
			select {
			case sig := <-others:
				if sig != syscall.SIGHUP {
					log.Info("signal ignored", "signal", sig.String())
					continue
				}
				select {
				case wanted <- struct{}{}:
				default: // one reload is to come, and sees what this one is about
				}
			case <-finished:
				return
			}
		}
	}()
	return stop, hurry, wanted, func() {
		signal.Stop(ends)
		signal.Stop(others)
		close(finished)
		cancelStop(nil)
		cancelHurry()
	}
}
