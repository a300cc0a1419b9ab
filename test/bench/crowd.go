package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
)

// The crowds that an honest client is beside. Each of their connections has
// crowdDepth reads of bulkRead under way, as Xen Orchestra's have.
const (
	crowdDepth = 10
	crowdRate  = 128 * kib // bytes a second of a slow line

	leaveTime = time.Minute // for a crowd to get all that it has asked for

	stalledExport = "stalled" // of serve-stalled
)

// crowd is what is beside the honest client.
type crowd struct {
	name   string
	conns  int
	rate   int64  // that each connection reads with, in bytes a second
	export string // that it reads
}

var (
	crowds       = []crowd{{name: "alone"}, {name: "64-stalled", conns: 64}, {name: "32-slow", conns: 32, rate: crowdRate}}
	stalledDisks = []crowd{{name: "alone"}, {name: "stalled-disk", conns: 32, rate: 1 << 40, export: stalledExport}}
)

func crowdCases() []testCase {
	var cases []testCase
	add := func(prefix string, device deviceKind, crowds []crowd) {
		for _, c := range crowds {
			cases = append(cases, testCase{
				name: prefix + c.name, env: env{image: fileImage, device: device, crowd: true},
				run: func(ctx context.Context, b *bench, s *server) (sample, error) { return b.beside(ctx, s, c) },
			})
		}
	}
	add("crowd/disk/", plainDevice, crowds)
	add("crowd/disks/", stalledDevice, stalledDisks)
	return cases
}

// beside pulls as Xen Orchestra does, beside a crowd. Mean is how long the first
// read took.
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
	if c.conns > 0 {
		time.Sleep(time.Second) // until they have what they can get
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
	stalled bool // the reads never end
}

// leave ends the connections. Reads that are under way are waited for if they end:
// nbdkit 1.32 does not survive being left with some. All go on at the same time, so
// that the wait is for what the server can send and for nobody's turn.
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
	case <-time.After(leaveTime):
		err = fmt.Errorf("the reads of the crowd have not ended after %v", leaveTime)
	}
	for _, m := range members {
		m.slow.Close() // ends the reads
		m.conn.Close()
	}
	<-done
	return err
}

// join adds a connection to a crowd. The caller ends it with leave.
func join(ctx context.Context, s *server, c crowd) (*member, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return nil, err
	}
	slow := &slowReader{Conn: nc, rate: c.rate, released: make(chan struct{})}
	client, err := client.New(ctx, slow, nil)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	conn, err := client.Go(ctx, c.export)
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

// slowReader is a connection that is read slowly, or with a rate of 0 not at all,
// from when slow is set until it is released.
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

// stallingExporter serves one file under every name but stalledExport, whose
// reads end with the process.
type stallingExporter struct {
	path string
	end  <-chan struct{}
}

// Open implements nbd.Exporter.
func (e stallingExporter) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	d, err := openSlow(e.path, 0)
	if err != nil || name != stalledExport {
		return d, err
	}
	return &stalledFile{d, e.end}, nil
}

type stalledFile struct {
	*slowFile
	end <-chan struct{}
}

// ReadAt implements nbd.Device.
func (d *stalledFile) ReadAt([]byte, int64) (int, error) {
	<-d.end
	return 0, errors.New("the stall has ended")
}

// serveStalled is the subcommand that serves two disks, of which one has stalled,
// until ctx ends.
func serveStalled(ctx context.Context, args []string, std streams) error {
	f := flag.NewFlagSet("serve-stalled", flag.ContinueOnError)
	f.SetOutput(std.err)
	listen := f.String("listen", host+":0", "`address`")
	if err := f.Parse(args); err != nil {
		return err
	}
	return serveUntil(ctx, *listen, stallingExporter{f.Arg(0), ctx.Done()})
}

func stalledArgs(b *bench, l launch) []string {
	return []string{b.self, "serve-stalled", "-listen", host + ":" + l.port, l.image}
}

// crowdTable compares what an honest client gets beside the crowds with what it
// gets alone.
func crowdTable(r *results) table {
	t := table{
		title: "Beside connections without progress",
		note: fmt.Sprintf("One connection with %d reads of 2 MiB in flight: MiB/s alone, and its share of that beside 64 connections that do not read their replies, "+
			"beside 32 that read 128 KiB/s each, and beside 32 to another disk, which has stalled; all of them with as many reads in flight. "+
			"*first* is the longest time in ms until the first read was answered. The disks of the last column are served by package nbd without splice(2); "+
			"the peers serve one disk to a process.", crowdDepth),
		head: []string{"server", "alone", "64 stalled", "first", "32 slow", "first", "stalled disk", "first"},
		left: []int{0},
	}
	share := func(s, prefix string, c crowd) []string {
		name := prefix + c.name
		if len(r.rounds(name, s)) == 0 {
			return []string{"-", "-"}
		}
		ratio := r.of(name, s, rate).median / r.of(prefix+"alone", s, rate).median
		return []string{strconv.FormatFloat(ratio, 'f', 2, 64), number(r.of(name, s, meanLatency).max / 1000)}
	}
	for _, s := range everyServer[:3] {
		if len(r.rounds("crowd/disk/alone", s))+len(r.rounds("crowd/disks/alone", s)) == 0 {
			continue
		}
		row := []string{s, number(r.of("crowd/disk/alone", s, rate).median)}
		row = append(row, share(s, "crowd/disk/", crowds[1])...)
		row = append(row, share(s, "crowd/disk/", crowds[2])...)
		t.rows = append(t.rows, append(row, share(s, "crowd/disks/", stalledDisks[1])...))
	}
	return t
}
