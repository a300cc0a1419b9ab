package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
)

const (
	slowDelay = 2 * time.Millisecond // of one read of a slow device
	slowDepth = 16                   // reads in flight on it
)

// delayOf is how long the device of an environment waits for a read.
func delayOf(e env) time.Duration {
	if e.device == slowDevice {
		return slowDelay
	}
	return 0
}

// slowFile is a device that waits before each read, as storage does that is
// far away: any number of reads wait at the same time. It offers nothing
// but reading, so that the server has no way around the wait.
type slowFile struct {
	file  *os.File
	size  int64
	delay time.Duration
}

func openSlow(path string, delay time.Duration) (*slowFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &slowFile{f, fi.Size(), delay}, nil
}

// ReadAt implements nbd.Device. It waits inside the kernel as a read of a real
// device does, occupying a thread, and as nbdkit's filter does.
func (d *slowFile) ReadAt(p []byte, off int64) (int, error) {
	if d.delay > 0 {
		if err := waitInKernel(d.delay); err != nil {
			return 0, err
		}
	}
	return d.file.ReadAt(p, off)
}

// Size implements nbd.Device.
func (d *slowFile) Size() int64 { return d.size }

// Close implements nbd.Device.
func (d *slowFile) Close() error { return d.file.Close() }

// waitInKernel waits until an instant, as Go's signals interrupt the wait.
func waitInKernel(d time.Duration) error {
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

// slowExporter serves one file under every name.
type slowExporter struct {
	path  string
	delay time.Duration
}

// Open implements nbd.Exporter.
func (e slowExporter) Open(context.Context, nbd.Peer, string) (nbd.Device, error) {
	return openSlow(e.path, e.delay)
}

// serveSlow is the subcommand that serves a file through a slowFile, with the
// server as it is by default, until ctx ends.
func serveSlow(ctx context.Context, args []string, std streams) error {
	f := flag.NewFlagSet("serve-slow", flag.ContinueOnError)
	f.SetOutput(std.err)
	listen := f.String("listen", host+":0", "`address`")
	delay := f.Duration("delay", slowDelay, "of each read")
	if err := f.Parse(args); err != nil {
		return err
	}
	return serveUntil(ctx, *listen, slowExporter{f.Arg(0), *delay})
}

// serveUntil serves, with the server as it is by default, until ctx ends.
func serveUntil(ctx context.Context, listen string, e nbd.Exporter) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	s := &nbd.Server{Exporter: e}
	err = s.Serve(ctx, l)
	cut, cancel := context.WithCancel(context.Background())
	cancel() // nobody is owed a reply
	_ = s.Shutdown(cut)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// readDirectly reads blocks at random from the slow device itself, depth at a
// time, until time is up: what so many overlapping reads allow when no server is
// in between.
func (b *bench) readDirectly(ctx context.Context, s *server, size int64, depth int) (sample, error) {
	d, err := openSlow(s.image, delayOf(s.env))
	if err != nil {
		return sample{}, err
	}
	defer d.Close()
	var reads atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for worker := range depth {
		group.Go(func() error {
			chance := rand.New(rand.NewPCG(4, uint64(worker)))
			p := make([]byte, size)
			for time.Since(begin) < b.opts.runFor && ctx.Err() == nil {
				if _, err := d.ReadAt(p, chance.Int64N(d.size/size)*size); err != nil {
					return fmt.Errorf("reading directly: %w", err)
				}
				reads.Add(1)
			}
			return nil
		})
	}
	err = group.Wait()
	return sample{Bytes: reads.Load() * size, Reads: reads.Load(), Seconds: time.Since(begin).Seconds()}, err
}
