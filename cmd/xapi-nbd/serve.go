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

// serve runs the service until a signal.
func serve(ctx context.Context, cfg config, stderr io.Writer) error {
	log, always, err := newLogger(cfg, stderr)
	if err != nil {
		return usageError(err)
	}
	for _, note := range cfg.notes {
		log.Warn(note)
	}
	stop, hurry, done := signals(ctx, log)
	defer done()
	s, err := newService(ctx, cfg, log, always)
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

// signals returns a context that ends with the first SIGTERM or SIGINT, and one
// that ends with the second. Other signals that would kill are logged: none of
// them may leave a disk plugged.
func signals(ctx context.Context, log *slog.Logger) (stop, hurry context.Context, done func()) {
	stop, cancelStop := context.WithCancelCause(ctx)
	hurry, cancelHurry := context.WithCancel(context.Background())
	// SIGPIPE would kill when the reader of our log goes away.
	signal.Ignore(syscall.SIGPIPE)
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM)
	finished := make(chan struct{})
	go func() {
		for {
			select {
			case sig := <-ch:
				switch {
				case sig == syscall.SIGHUP:
					log.Info("SIGHUP: the certificate is read anew when it changes; other settings need a restart")
				case sig != syscall.SIGTERM && sig != syscall.SIGINT:
					log.Info("signal ignored", "signal", sig.String())
				case stop.Err() == nil:
					cancelStop(errors.New("signal: " + sig.String()))
				default:
					cancelHurry()
				}
			case <-finished:
				return
			}
		}
	}()
	return stop, hurry, func() {
		signal.Stop(ch)
		close(finished)
		cancelStop(nil)
		cancelHurry()
	}
}
