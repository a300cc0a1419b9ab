package service

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
)

// The pauses between attempts: firstPause before the second one, twice as long
// before each further one, up to longestPause.
const (
	firstPause   = 250 * time.Millisecond
	longestPause = 15 * time.Second
)

// attemptTimeout bounds one attempt, which may wait for a name server for example.
const attemptTimeout = 5 * time.Second

// retries are the actions that have failed and are tried again. Log, status and systemd's
// status text list them. Its methods may be called concurrently.
type retries struct {
	log     *slog.Logger
	changed func() // see newRetries

	mu      sync.Mutex // guards pending
	pending map[string]control.RetryReport
}

// newRetries returns an empty list. changed, unless nil, is called whenever the result of
// report changes.
func newRetries(log *slog.Logger, changed func()) *retries {
	return &retries{log: log, changed: changed, pending: make(map[string]control.RetryReport)}
}

// again repeats an action whose first attempt has failed with err. It calls try, with
// growing pauses, until try succeeds, fails with a permanent error (isPermanent), which it
// returns, or ctx ends, whose cause it returns.
func (r *retries) again(ctx context.Context, action string, err error, try func(context.Context) error) error {
	begin, pause := time.Now(), firstPause
	defer r.remove(action)
	for attempts := 1; ; attempts++ {
		r.add(control.RetryReport{Action: action, Since: begin, Attempts: attempts, LastError: text.OneLine(err.Error()), Next: time.Now().Add(pause)})
		r.log.Error("attempt failed, trying again", "action", action, "err", err, "attempts", attempts, "again_in", pause.String())
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
		pause = min(2*pause, longestPause)
		err = attempt(ctx, try)
		switch {
		case err == nil:
			r.log.Info("attempt succeeded", "action", action, "attempts", attempts+1)
			return nil
		case isPermanent(err):
			return err
		}
	}
}

// keepServing opens a listener and serves it, with further attempts whenever one
// of the two fails, until ctx ends.
func keepServing(ctx context.Context, r *retries, action string, open func(context.Context) (net.Listener, error), serve func(net.Listener) error) {
	var l net.Listener
	try := func(ctx context.Context) (err error) {
		l, err = open(ctx)
		return err
	}
	err := attempt(ctx, try)
	for ctx.Err() == nil {
		if err != nil && r.again(ctx, action, err, try) != nil {
			return
		}
		err = serve(l)
	}
}

// attempt calls try once, with a timeout.
func attempt(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return try(ctx)
}

func (r *retries) add(report control.RetryReport) {
	r.change(func() { r.pending[report.Action] = report })
}

func (r *retries) remove(action string) {
	r.change(func() { delete(r.pending, action) })
}

func (r *retries) change(apply func()) {
	r.mu.Lock()
	apply()
	r.mu.Unlock()
	if r.changed != nil {
		r.changed()
	}
}

// report returns the pending actions, the oldest first.
func (r *retries) report() []control.RetryReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]control.RetryReport, 0, len(r.pending))
	for _, report := range r.pending {
		all = append(all, report)
	}
	slices.SortFunc(all, func(a, b control.RetryReport) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Action, b.Action))
	})
	return all
}
