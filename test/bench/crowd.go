package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

const (
	crowdDepth   = 10        // reads of bulkRead in flight on each connection, as Xen Orchestra has
	crowdRate    = 128 * kib // bytes per second that a slow client reads
	leaveTimeout = time.Minute
)

// crowd is a number of connections beside the one that is measured.
type crowd struct {
	name   string
	device deviceKind
	conns  int
	rate   int64  // bytes per second that each connection reads; 0 is none
	export string // that it reads
}

var crowds = []crowd{
	{name: "disk/alone"},
	{name: "disk/64-stalled", conns: 64},
	{name: "disk/32-slow", conns: 32, rate: crowdRate},
	{name: "disks/alone", device: stalledDevice},
	{name: "disks/stalled-disk", device: stalledDevice, conns: 32, rate: 1 << 40, export: stalledExport},
}

func crowdCases() []testCase {
	var cases []testCase
	for _, c := range crowds {
		cases = append(cases, testCase{
			name: "crowd/" + c.name, env: env{image: fileImage, device: c.device},
			run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.beside(ctx, s, c) },
		})
	}
	return cases
}

// beside reads with crowdDepth reads in flight beside a crowd. Mean of the sample is the
// latency of the first read.
func (b *bench) beside(ctx context.Context, s *server, c crowd) (got sample, err error) {
	var others []*member
	defer func() { err = errors.Join(err, leave(others)) }()
	conns := c.conns
	if b.opts.quick {
		conns /= 8
	}
	for range conns {
		m, err := join(ctx, s, c)
		if err != nil {
			return sample{}, fmt.Errorf("connection %d of the crowd: %w", len(others)+1, err)
		}
		others = append(others, m)
	}
	if conns > 0 {
		time.Sleep(time.Second) // until they have filled the server's buffers
	}
	conn, err := s.dial(ctx)
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	begin := time.Now()
	if err := conn.Read(ctx, make([]byte, bulkRead), 0); err != nil {
		return sample{}, err
	}
	got.Mean = float64(time.Since(begin).Microseconds())
	var reads atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	begin = time.Now()
	for range crowdDepth {
		group.Go(func() error {
			p := make([]byte, bulkRead)
			for time.Since(begin) < b.opts.runFor {
				if err := conn.Read(ctx, p, reads.Add(1)%(conn.Size()/bulkRead)*bulkRead); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = group.Wait()
	got.Bytes, got.Reads, got.Seconds = reads.Load()*bulkRead, reads.Load(), time.Since(begin).Seconds()
	return got, err
}

// member is one connection of a crowd.
type member struct {
	conn    *client.Conn
	slow    *slowReader
	stop    atomic.Bool // no further reads
	reads   sync.WaitGroup
	stalled bool // the reads do not end
}

// join adds a connection to a crowd. The caller ends it with leave.
func join(ctx context.Context, s *server, c crowd) (*member, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return nil, err
	}
	slow := &slowReader{Conn: nc, rate: c.rate, released: make(chan struct{})}
	opened, err := client.New(ctx, slow, nil)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	conn, err := opened.Go(ctx, c.export)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	slow.slow.Store(true)
	m := &member{conn: conn, slow: slow, stalled: c.export == stalledExport}
	for n := range crowdDepth {
		m.reads.Go(func() {
			p := make([]byte, bulkRead)
			for off := int64(n) * bulkRead; !m.stop.Load() && conn.Read(ctx, p, off%conn.Size()) == nil; off += crowdDepth * bulkRead {
			}
		})
	}
	return m, nil
}

// leave ends the connections. It first lets all of them read at full speed and waits for
// their reads, because nbdkit 1.32 crashes when a client with reads in flight disconnects.
func leave(members []*member) error {
	for _, m := range members {
		m.stop.Store(true)
		m.slow.release()
		if m.stalled {
			m.slow.Close()
		}
	}
	done := make(chan struct{})
	go func() {
		for _, m := range members {
			m.reads.Wait()
		}
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-time.After(leaveTimeout):
		err = fmt.Errorf("the reads of the crowd have not ended after %v", leaveTimeout)
	}
	for _, m := range members {
		m.slow.Close() // ends the reads
		m.conn.Close()
	}
	<-done
	return err
}

// slowReader is a connection that is read at a rate of bytes per second, or not at all with
// a rate of 0, from when slow is set until it is released.
type slowReader struct {
	net.Conn
	rate     int64
	slow     atomic.Bool
	released chan struct{}
}

func (r *slowReader) release() {
	r.slow.Store(false)
	close(r.released)
}

// Read implements net.Conn.
func (r *slowReader) Read(p []byte) (int, error) {
	if !r.slow.Load() {
		return r.Conn.Read(p)
	}
	if r.rate == 0 {
		<-r.released
		return r.Conn.Read(p)
	}
	n, err := r.Conn.Read(p[:min(int64(len(p)), max(r.rate/8, 1))])
	select {
	case <-time.After(time.Duration(float64(n) / float64(r.rate) * float64(time.Second))):
	case <-r.released:
	}
	return n, err
}
