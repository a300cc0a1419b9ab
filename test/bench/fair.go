package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

// The readers of the cases about fairness.
const (
	smallRead = 4 * kib
	bulkRead  = 2 * mib
	bulkDepth = 16
)

// fair measures how long small reads take, one at a time on one connection,
// alone or while another process reads in bulk on another connection.
func (b *bench) fair(ctx context.Context, s *server, beside bool) (sample, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	if !beside {
		return readSmall(ctx, conn, b.opts.runFor)
	}
	bulk, err := b.startBulk(ctx, s)
	if err != nil {
		return sample{}, err
	}
	got, err := readSmall(ctx, conn, b.opts.runFor)
	besides, bulkErr := bulk.end()
	got.Beside = besides
	return got, errors.Join(err, bulkErr)
}

// readSmall reads at random until time is up.
func readSmall(ctx context.Context, conn *client.Conn, runFor time.Duration) (sample, error) {
	chance := rand.New(rand.NewPCG(5, 0))
	p := make([]byte, smallRead)
	var took []int64
	begin := time.Now()
	for at := begin; at.Sub(begin) < runFor; {
		if err := conn.Read(ctx, p, chance.Int64N(conn.Size()/smallRead)*smallRead); err != nil {
			return sample{}, err
		}
		now := time.Now()
		took = append(took, now.Sub(at).Nanoseconds())
		at = now
	}
	got := sample{Bytes: int64(len(took)) * smallRead, Reads: int64(len(took)), Seconds: time.Since(begin).Seconds()}
	got.Mean, got.P50, got.P99 = latencies(took)
	return got, nil
}

// bulkReader is a process that reads in bulk until its input ends.
type bulkReader struct {
	cmd   *exec.Cmd
	lines *bufio.Reader
	stop  func() error
}

// startBulk returns when the first reads are done. The caller ends it.
func (b *bench) startBulk(ctx context.Context, s *server) (*bulkReader, error) {
	cmd := exec.CommandContext(ctx, b.self, "read-bulk", s.addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errOut output
	cmd.Stderr = &errOut
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r := &bulkReader{cmd, bufio.NewReader(out), in.Close}
	if _, err := r.lines.ReadString('\n'); err != nil {
		return nil, fmt.Errorf("the bulk reader: %w: %w: %q", err, errors.Join(in.Close(), cmd.Wait()), errOut.String())
	}
	return r, nil
}

// end returns how many MiB a second the reader got.
func (r *bulkReader) end() (rate float64, err error) {
	err = r.stop()
	line, readErr := r.lines.ReadString('\n')
	if err = errors.Join(err, readErr, r.cmd.Wait()); err != nil {
		return 0, fmt.Errorf("the bulk reader: %w", err)
	}
	_, err = fmt.Sscan(line, &rate)
	return rate, err
}

// readBulk is the subcommand that is a bulk reader. It prints a line when the
// first reads are done, and its rate at the end.
func readBulk(ctx context.Context, args []string, std streams) error {
	if len(args) != 1 {
		return errors.New("read-bulk: want an address")
	}
	c, err := client.Dial(ctx, "tcp", args[0], nil)
	if err != nil {
		return err
	}
	conn, err := c.Go(ctx, "")
	if err != nil {
		return errors.Join(err, c.Abort())
	}
	defer conn.Close()
	var stop atomic.Bool // reads under way are waited for: nbdkit 1.32 does not survive being left with some
	go func() {          // ends with the process
		_, _ = std.in.Read(make([]byte, 1))
		stop.Store(true)
	}()
	var reads atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for range bulkDepth {
		group.Go(func() error {
			p := make([]byte, bulkRead)
			for !stop.Load() {
				n := reads.Add(1)
				if err := conn.Read(ctx, p, n%(conn.Size()/bulkRead)*bulkRead); err != nil {
					return err
				}
				if n == bulkDepth {
					fmt.Fprintln(std.out, "reading")
				}
			}
			return nil
		})
	}
	err = group.Wait()
	fmt.Fprintln(std.out, float64(reads.Load())*float64(bulkRead/mib)/time.Since(begin).Seconds())
	return err
}
