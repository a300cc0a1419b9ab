package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdfile"
)

const (
	slowDelay = 2 * time.Millisecond // of one read of the slow device
	slowDepth = 16                   // reads in flight on it
)

// delayed is a device whose reads wait for the delay first, any number of them at a time,
// like remote storage. It hides the optional interfaces of the Device, so the server cannot
// avoid the wait.
type delayed struct {
	nbd.Device
	delay time.Duration
}

// ReadAt implements nbd.Device. It waits in a system call, so that a thread is blocked as
// in a read of a real device, and in nbdkit's delay filter.
func (d *delayed) ReadAt(p []byte, off int64) (int, error) {
	if d.delay > 0 {
		if err := blockThread(d.delay); err != nil {
			return 0, err
		}
	}
	return d.Device.ReadAt(p, off)
}

// blockThread sleeps in a system call. It waits for a point in time, because signals of the
// Go runtime interrupt the call.
func blockThread(d time.Duration) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return os.NewSyscallError("clock_gettime", err)
	}
	until := unix.NsecToTimespec(now.Nano() + d.Nanoseconds())
	for {
		err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &until, nil)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("clock_nanosleep", err)
		}
	}
}

// fileExporter serves one file under every name but stalledExport, of which no read returns
// before end.
type fileExporter struct {
	path  string
	delay time.Duration
	end   <-chan struct{}
}

const stalledExport = "stalled"

// Open implements nbd.Exporter.
func (e fileExporter) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	d, err := nbdfile.Open(e.path, nbdfile.Options{ReadOnly: true})
	switch {
	case err != nil:
		return nil, err
	case name == stalledExport:
		return &stalled{d, e.end}, nil
	}
	return &delayed{d, e.delay}, nil
}

// stalled is a device of which no read returns before end.
type stalled struct {
	nbd.Device
	end <-chan struct{}
}

// ReadAt implements nbd.Device.
func (d *stalled) ReadAt([]byte, int64) (int, error) {
	<-d.end
	return 0, errors.New("the stall has ended")
}

// serveSlow is the subcommand that serves a file as a slow device until ctx ends.
func serveSlow(ctx context.Context, args []string, errOut io.Writer) error {
	return serveFile(ctx, "serve-slow", args, errOut, slowDelay)
}

// serveStalled is the subcommand that serves a file without delay, and a stalled export,
// until ctx ends.
func serveStalled(ctx context.Context, args []string, errOut io.Writer) error {
	return serveFile(ctx, "serve-stalled", args, errOut, 0)
}

func serveFile(ctx context.Context, name string, args []string, errOut io.Writer, delay time.Duration) error {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(errOut)
	listen := f.String("listen", host+":0", "`address`")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 1 {
		return fmt.Errorf("%s: want a file", name)
	}
	return serve(ctx, &nbd.Server{Exporter: fileExporter{f.Arg(0), delay, ctx.Done()}}, *listen)
}

// serve runs a server until ctx ends.
func serve(ctx context.Context, s *nbd.Server, addr string) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	err = s.Serve(ctx, l)
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.Shutdown(canceled) // replies that are in flight are not waited for
	if ctx.Err() != nil {
		return nil
	}
	return err
}
