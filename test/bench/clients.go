package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

const (
	smallRead = 4 * kib
	bulkRead  = 2 * mib

	idleConns   = 256 // connections of the case memory/idle
	dialsAtOnce = 8   // of them while they are made
)

// runClient runs a program to its end and returns how long that took.
func (b *bench) runClient(ctx context.Context, argv ...string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = b.dir // fio leaves files
	begin := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(begin)
	switch {
	case ctx.Err() != nil:
		return took, context.Cause(ctx)
	case err != nil:
		return took, fmt.Errorf("%s: %w: %q", filepath.Base(argv[0]), err, out[:min(len(out), maxOutput)])
	}
	return took, nil
}

// nbdcopyArgs returns the command line of nbdcopy without source and target. By default nbdcopy
// has no more than 16 MiB in flight on a connection, and fewer requests than it was told to.
func (b *bench) nbdcopyArgs(shape copyShape) []string {
	return []string{
		b.programs["nbdcopy"],
		fmt.Sprintf("--connections=%d", shape.conns), fmt.Sprintf("--requests=%d", shape.requests),
		fmt.Sprintf("--request-size=%d", shape.size),
		fmt.Sprintf("--queue-size=%d", max(int64(shape.requests)*shape.size, 16*mib)),
	}
}

// copyAway has nbdcopy read a whole disk.
func (b *bench) copyAway(ctx context.Context, s *server, addr string, shape copyShape) (sample, error) {
	path, err := b.images.plain(ctx, s.env.image)
	if err != nil {
		return sample{}, err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return sample{}, err
	}
	took, err := b.runClient(ctx, append(b.nbdcopyArgs(shape), s.uri(addr), "null:")...)
	return sample{Bytes: fi.Size(), Seconds: took.Seconds()}, err
}

// fio reads blocks at random until time is up, the same blocks in the same order from every
// server. Rates and latencies are fio's own, which leave its start out.
func (b *bench) fio(ctx context.Context, s *server, size int64, depth int) (sample, error) {
	file := filepath.Join(b.dir, "fio.json") // standard output has other lines between
	_, err := b.runClient(ctx, b.programs["fio"], "--name=random", "--ioengine=nbd", "--uri="+s.uri(s.addr),
		"--rw=randread", "--randrepeat=1", fmt.Sprintf("--bs=%d", size), fmt.Sprintf("--iodepth=%d", depth),
		"--time_based", fmt.Sprintf("--runtime=%dms", b.opts.runFor.Milliseconds()),
		"--output-format=json", "--output="+file)
	if err != nil {
		return sample{}, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return sample{}, err
	}
	return parseFio(text)
}

func parseFio(text []byte) (sample, error) {
	var o struct {
		Jobs []struct {
			Error int
			Read  struct {
				Bytes   int64   `json:"io_bytes"`
				Reads   int64   `json:"total_ios"`
				Runtime float64 `json:"runtime"` // milliseconds
				Latency struct {
					Mean float64 `json:"mean"`
				} `json:"lat_ns"`
				Completion struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			} `json:"read"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return sample{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(o.Jobs) != 1 || o.Jobs[0].Error != 0 || o.Jobs[0].Read.Reads == 0 || o.Jobs[0].Read.Runtime == 0 {
		return sample{}, errors.New("fio's output: no job that has read without error")
	}
	r := o.Jobs[0].Read
	return sample{
		Bytes: r.Bytes, Reads: r.Reads, Seconds: r.Runtime / 1e3,
		Mean: r.Latency.Mean / 1e3, P99: r.Completion.Percentile["99.000000"] / 1e3,
	}, nil
}

// idle measures the memory of a server with connections that have read one block each and
// do nothing more.
func idle(ctx context.Context, s *server) (got sample, err error) {
	if got.RSSFresh, _, err = memory(s.cmd.Process.Pid); err != nil {
		return got, err
	}
	conns := make([]*client.Conn, idleConns)
	defer func() {
		for _, c := range conns {
			if c != nil {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(dialsAtOnce)
	for i := range conns {
		group.Go(func() (err error) {
			if conns[i], err = s.dial(groupCtx); err == nil {
				err = conns[i].Read(groupCtx, make([]byte, smallRead), 0)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return got, fmt.Errorf("opening %d connections: %w", idleConns, err)
	}
	got.RSS, _, err = memory(s.cmd.Process.Pid)
	return got, err
}

// verify compares every byte that a server serves with the image, in reads of 2 MiB, and
// then pieces of all sizes that are measured at random offsets; 16 reads are in flight.
func (b *bench) verify(ctx context.Context, s *server) error {
	const workers, pieces = 16, 8
	path, err := b.images.plain(ctx, s.env.image)
	if err != nil {
		return err
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	group, ctx := errgroup.WithContext(ctx)
	for worker := range int64(workers) {
		group.Go(func() error {
			got, want := make([]byte, bulkRead), make([]byte, bulkRead)
			same := func(off, n int64) error {
				if err := conn.Read(ctx, got[:n], off); err != nil {
					return err
				}
				if _, err := file.ReadAt(want[:n], off); err != nil {
					return err
				}
				if !bytes.Equal(got[:n], want[:n]) {
					return fmt.Errorf("%s serves wrong bytes: %d bytes at %d differ from the image", s.name, n, off)
				}
				return nil
			}
			for off := worker * bulkRead; off < conn.Size(); off += workers * bulkRead {
				if err := same(off, min(bulkRead, conn.Size()-off)); err != nil {
					return err
				}
			}
			rng := rand.New(rand.NewPCG(3, uint64(worker)))
			for range pieces {
				n := []int64{512, 4 * kib, 64 * kib, bulkRead - 512}[rng.IntN(4)]
				if err := same(rng.Int64N((conn.Size()-n)/512+1)*512, n); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}
