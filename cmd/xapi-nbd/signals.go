package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// signalCatcher holds the signals that have come and not been acted on yet.
// SIGTERM and SIGINT have a channel of their own: to end never waits for a log
// line about another signal.
type signalCatcher struct{ ends, others chan os.Signal }

// caught are the signals that main catches before it does anything else: the
// signals of a service that has just been started must not kill it. nil in tests
// that call run.
var caught *signalCatcher

// catchSignals catches every signal that would kill and that can be caught, and
// ignores SIGPIPE, which would kill when the reader of the log goes away.
func catchSignals() *signalCatcher {
	c := &signalCatcher{ends: make(chan os.Signal, 2), others: make(chan os.Signal, 8)}
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(c.ends, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(c.others, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM)
	return c
}

// stop ends the catching: signals have their usual effect again.
func (c *signalCatcher) stop() {
	signal.Stop(c.ends)
	signal.Stop(c.others)
}

// release gives signals back their usual effect, for commands other than serve,
// and has those take effect that have come already.
func (c *signalCatcher) release() {
	if c == nil {
		return
	}
	c.stop()
	signal.Reset(syscall.SIGPIPE)
	for {
		select {
		case sig := <-c.ends:
			raise(sig)
		case sig := <-c.others:
			raise(sig)
		default:
			return
		}
	}
}

// raise sends a signal to this process.
func raise(sig os.Signal) { _ = syscall.Kill(os.Getpid(), sig.(syscall.Signal)) }

// requests are the channels that receive after SIGHUP and after SIGUSR2.
type requests struct{ reloads, upgrades chan struct{} }

// of returns the channel for a signal, nil if it has no effect.
func (r requests) of(sig os.Signal) chan struct{} {
	switch sig {
	case syscall.SIGHUP:
		return r.reloads
	case syscall.SIGUSR2:
		return r.upgrades
	}
	return nil
}

// signals returns a context that ends with the first SIGTERM or SIGINT, one that
// ends with the second, and the channels for requests. Other caught signals are
// logged and have no effect. done ends the catching.
func (c *signalCatcher) signals(ctx context.Context, log *slog.Logger) (stop, hurry context.Context, wanted requests, done func()) {
	stop, cancelStop := context.WithCancelCause(ctx)
	hurry, cancelHurry := context.WithCancel(context.Background())
	finished := make(chan struct{})
	wanted = requests{make(chan struct{}, 1), make(chan struct{}, 1)}
	go func() {
		for {
			select {
			case sig := <-c.ends:
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
			case sig := <-c.others:
				request := wanted.of(sig)
				if request == nil {
					log.Info("signal ignored", "signal", sig.String())
					continue
				}
				select {
				case request <- struct{}{}:
				default: // one is to come, and begins after this signal
				}
			case <-finished:
				return
			}
		}
	}()
	return stop, hurry, wanted, func() {
		c.stop()
		close(finished)
		cancelStop(nil)
		cancelHurry()
	}
}
