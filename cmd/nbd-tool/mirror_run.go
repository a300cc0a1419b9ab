package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/cmd/nbd-tool/internal/mirroring"
	"xapi-nbd/mirror"
	"xapi-nbd/nbd"
)

// mirrorJob is a run of mirror.
type mirrorJob struct {
	o       *mirrorOptions
	out     io.Writer
	stderr  io.Writer // for the progress
	log     *slog.Logger
	notices *notices

	ends   *mirrorEnds
	state  *mirrorState
	mirror *mirror.Mirror
	disk   *mirroring.Disk

	server   nbd.Server
	security currentTLS
	serving  sync.WaitGroup // the mirror, and the goroutine that accepts clients
	failed   chan error     // receives the error of the listener
	listener net.Listener
	control  *control.Server // nil without --control
}

// run opens both ends, serves until the mirror is stopped or a signal arrives, and returns
// nil if the secondary is complete.
func (o *mirrorOptions) run(cmd *cobra.Command, args []string, std streams) error {
	j := &mirrorJob{
		o: o, out: cmd.OutOrStdout(), stderr: std.err, log: logTo(cmd.ErrOrStderr(), slog.LevelInfo),
		notices: &notices{w: cmd.ErrOrStderr(), retryFor: o.retryFor}, failed: make(chan error, 1),
	}
	surviveBrokenPipes()
	warnIgnored(cmd.Flags(), j.log)
	primary, secondary, err := o.mirrorSides(args, newSecretInput(cmd))
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	if err := sameSide(ctx, primary, secondary, "PRIMARY and SECONDARY"); err != nil {
		return err
	}
	if err := checkOwnFile("--state", o.state, primary, secondary); err != nil {
		return err
	}
	if j.ends, err = o.openEnds(ctx, primary, secondary, j.notices); err != nil {
		return err
	}
	if err := j.prepare(ctx, cmd, primary, secondary); err != nil {
		return errors.Join(err, j.state.undo(), j.ends.undo())
	}
	j.ends.warnAboutPromises(j.notices)
	err = j.serve(ctx)
	if cerr := errors.Join(j.state.close(), j.ends.close()); cerr != nil {
		j.log.Warn("cannot close an end", "err", cerr) // what matters was flushed
	}
	return j.outcome(err)
}

// prepare does all that can fail before the mirror begins. If it fails, nothing was written to
// either end.
func (j *mirrorJob) prepare(ctx context.Context, cmd *cobra.Command, primary, secondary side) (err error) {
	if j.state, err = openMirrorState(j.o.state, primary, secondary, j.ends); err != nil {
		return err
	}
	c := mirror.Config{
		Primary: j.ends.primary, Secondary: j.ends.secondary,
		SecondaryIsZero: j.o.destinationIsZero && !j.state.resumed() || j.ends.made != "",
		OnError:         j.o.errorPolicy(),
		RetryFor:        max(j.o.retryFor, 1), // 0 would be the default
		Stall:           j.o.stall,
		Rate:            int64(j.o.rate),
		Log:             j.log,
	}
	j.state.addTo(&c)
	if j.mirror, err = mirror.New(c); err != nil {
		return err
	}
	j.disk = mirroring.NewDisk(j.mirror, j.o.serve.export, j.ends.primary)
	return j.listen(ctx, cmd)
}

// listen listens for clients and for controllers.
func (j *mirrorJob) listen(ctx context.Context, cmd *cobra.Command) error {
	security, err := readRequirements(j.o.serve.certfile, j.o.serve.cafile, j.log)
	if err != nil {
		return err
	}
	j.security.current.Store(security)
	j.server.Exporter = j.disk
	j.server.Logger = logTo(cmd.ErrOrStderr(), slog.LevelWarn) // without the lines for each client
	j.server.TLSConfig, j.server.TLSPolicy = j.security.config(), j.security.policy
	// A disk may be idle for as long as it likes.
	j.server.FirstRequestTimeout, j.server.IdleTimeout = noTimeout, noTimeout
	if j.listener, err = listenaddr.Listen(ctx, j.o.serve.listen); err != nil {
		return err
	}
	if j.o.control == "" {
		return nil
	}
	l, err := control.Listen(ctx, controlPath(j.o.control))
	if err != nil {
		j.listener.Close()
		return fmt.Errorf("--control: %w", err)
	}
	j.control = control.Serve(l, controlled{j}, j.log)
	return nil
}

// serve runs the mirror and serves clients until the end. It returns why it ended early, or nil.
func (j *mirrorJob) serve(ctx context.Context) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	ended := make(chan struct{})
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	j.serving.Go(func() {
		defer close(ended)
		_ = j.mirror.Run(running) // outcome asks for the result
	})
	j.serving.Go(func() {
		err := j.server.Serve(running, j.listener)
		if running.Err() == nil && !errors.Is(err, nbd.ErrServerClosed) {
			j.failed <- err
		}
	})
	err := j.announce()
	if err == nil {
		err = j.wait(ctx, ended, hangups)
	}
	if !j.mirror.Status().State.Ended() {
		_ = j.mirror.Cancel() // the state tells whether it was completed before
	}
	j.shutDown()
	stop()
	j.serving.Wait()
	return err
}

// announce prints where clients are served, and ends the wait of the parent of a daemon.
func (j *mirrorJob) announce() error {
	if _, err := fmt.Fprintf(j.out, "listening on %s\n", shown(j.listener.Addr())); err != nil {
		return err
	}
	return daemonReady()
}

// wait serves until ctx ends, the mirror was completed with stop, or an error of the listener,
// which it returns.
func (j *mirrorJob) wait(ctx context.Context, ended <-chan struct{}, hangups <-chan os.Signal) error {
	p := newMirrorProgress(j.stderr, j.o.progress)
	defer p.finish()
	for {
		select {
		case <-hangups:
			j.log.Info("SIGHUP is ignored: the mirror goes on")
		case <-p.ticks():
			p.show(j.mirror.Status())
		case <-ended:
			p.finish()
			if j.mirror.Status().State == mirror.Stopped {
				return nil
			}
			// Clients are served on, by one of the ends. The mirror has logged its end.
			ended = nil
		case err := <-j.failed:
			return err
		case <-ctx.Done():
			return nil
		}
	}
}

// shutDown ends the connections of clients and controllers.
func (j *mirrorJob) shutDown() {
	if j.mirror.Status().State == mirror.Stopped {
		j.disk.End(errors.New("the mirror was completed"))
	}
	drain, done := context.WithTimeout(context.Background(), drainTimeout)
	defer done()
	_ = j.server.Shutdown(drain) // closes the connections that are left after that
	j.disk.End(errors.New("the server was stopped"))
	if j.control != nil {
		j.control.Close()
	}
}

// outcome prints the last line if the secondary is complete, and returns an error that says so
// if it is not: the exit code says nothing else. err is why the server ended early, or nil.
func (j *mirrorJob) outcome(err error) error {
	s := j.mirror.Status()
	primary, secondary := j.ends.primary.Name(), j.ends.secondary.Name()
	if s.State == mirror.Pivoted || s.State == mirror.Stopped {
		if err != nil {
			j.log.Error("the server has ended early", "err", err)
		}
		more := ""
		if s.State == mirror.Pivoted {
			more = ", and what was written after the pivot"
		}
		fmt.Fprintf(j.out, "complete: %s has everything that was written to %s%s\n", secondary, primary, more)
		return nil
	}
	if err == nil {
		err = s.LastError
	}
	text := fmt.Sprintf("NOT complete: %s is no copy of %s: %s with %d of %d bytes to be copied", secondary, primary, s.State, s.Dirty, s.Size)
	if j.o.state != "" {
		text += "; the same command goes on"
	}
	if err != nil {
		return fmt.Errorf("%s: %w", text, err)
	}
	return errors.New(text)
}
