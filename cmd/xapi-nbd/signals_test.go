package main

import (
	"context"
	"log/slog"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

// stuckLog is a log whose reader has stopped reading.
type stuckLog struct {
	slog.Handler
	writing, taken chan struct{}
}

func (stuckLog) Enabled(context.Context, slog.Level) bool { return true }

func (l stuckLog) Handle(context.Context, slog.Record) error {
	close(l.writing)
	<-l.taken
	return nil
}

// TestSignalsWithAStuckLog: the first and the second signal have their effect although the log
// is blocked.
func TestSignalsWithAStuckLog(t *testing.T) {
	l := stuckLog{slog.DiscardHandler, make(chan struct{}), make(chan struct{})}
	defer close(l.taken)
	stop, hurry, _, done := catchSignals().signals(t.Context(), slog.New(l))
	defer signal.Reset(syscall.SIGPIPE)
	defer done()
	send := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(syscall.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
	}
	ended := func(what string, ctx context.Context) {
		t.Helper()
		select {
		case <-ctx.Done():
		case <-time.After(patience):
			t.Fatalf("%s: nothing happens", what)
		}
	}
	send(syscall.SIGUSR1)
	<-l.writing
	send(syscall.SIGTERM)
	ended("SIGTERM", stop)
	if hurry.Err() != nil {
		t.Error("one signal hurries")
	}
	send(syscall.SIGTERM)
	ended("the second SIGTERM", hurry)
}
