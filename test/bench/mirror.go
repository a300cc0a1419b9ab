package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

// The names that stand in tables in place of a server in cases of the mirror.
const (
	pausedMirror   = "paused"          // ours, which does not copy
	qemuMirror     = "qemu"            // blockdev-mirror of qemu-storage-daemon, write-blocking
	qemuBackground = "qemu-background" // the same, in its default mode
)

// The devices of cases of the mirror: all are our server of targetImage, which is the primary.
const (
	pausedDevice   deviceKind = "paused"
	mirroredDevice deviceKind = "mirrored"
)

// The load of mirror/converge: loadWriters write loadWrite bytes every loadPause.
const (
	loadWriters = 4
	loadWrite   = 64 * kib
	loadPause   = 8 * time.Millisecond // 31 MiB/s in all
)

// mirrorCases measure a mirror between two exports of ours.
func mirrorCases() []testCase {
	target := func(device deviceKind) env { return env{image: targetImage, device: device} }
	return []testCase{
		{name: "mirror/latency/4k", env: target(pausedDevice), run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			return b.besideCopy(ctx, s)
		}},
		{name: "mirror/copy/clear", env: env{image: fileImage, device: copiedDevice}, client: nbdcopy,
			run: func(ctx context.Context, b *bench, s *server) (sample, error) {
				path, err := b.images.path(ctx, fileImage)
				if err != nil {
					return sample{}, err
				}
				return b.copyBetween(ctx, s, path, mirrorOnce)
			}},
		{name: "mirror/converge", env: target(mirroredDevice), run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			return b.converge(ctx, s)
		}},
	}
}

// mirrorKinds are our server once for each mirror that is compared.
func (b *bench) mirrorKinds(e env) []kind {
	argv := func(l launch) []string { return b.oursArgs(b.builds[0], l) }
	names := []string{b.builds[0].name, pausedMirror}
	if e.device == mirroredDevice {
		names = names[:1]
		if b.programs[qemuStorageDaemon] != "" {
			names = append(names, qemuMirror, qemuBackground)
		} else {
			b.skip("%s: %s is not installed", qemuMirror, qemuStorageDaemon)
		}
	}
	var all []kind
	for _, name := range names {
		all = append(all, kind{name: name, argv: argv})
	}
	return all
}

// control is the address of a mirror's control socket.
func (b *bench) control() string { return filepath.Join(b.dir, "mirror.ctl") }

// startMirror starts a mirror of ours. The caller stops it.
func (b *bench) startMirror(ctx context.Context, primary, secondary string) (*server, error) {
	return b.startOnce(ctx, kind{name: "nbd-tool mirror", argv: func(l launch) []string {
		return []string{b.builds[0].tool, "mirror", "--listen=" + host + ":" + l.port, "--control=unix:" + b.control(), primary, secondary}
	}}, launch{})
}

// The requests to a mirror.
const (
	statusMirror = `{"command": "status"}`
	waitMirror   = `{"command": "wait"}` // until both ends are equal
	pauseMirror  = `{"command": "pause"}`
	resumeMirror = `{"command": "resume"}`
	stopMirror   = `{"command": "complete", "then": "stop"}`
)

// mirrorStatus is the part of the reply of a mirror that is used.
type mirrorStatus struct {
	Mode string
}

// tell sends a request in JSON to a mirror and returns its status.
func (b *bench) tell(ctx context.Context, request string) (mirrorStatus, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", b.control())
	if err != nil {
		return mirrorStatus{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if _, err := io.WriteString(c, request+"\n"); err != nil {
		return mirrorStatus{}, err
	}
	line, err := bufio.NewReader(c).ReadBytes('\n')
	if err != nil {
		return mirrorStatus{}, err
	}
	var reply struct {
		OK     bool
		Error  string
		Status mirrorStatus
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return mirrorStatus{}, err
	}
	if !reply.OK {
		return reply.Status, fmt.Errorf("%s: %s", request, reply.Error)
	}
	return reply.Status, nil
}

// mirrorOnce copies as a mirror until both ends are equal, or with nbdcopy.
func mirrorOnce(ctx context.Context, b *bench, s *server, image string) (time.Duration, error) {
	src, err := b.serveImage(ctx, s, image, "--writable")
	if err != nil {
		return 0, err
	}
	defer src.stop()
	dst, err := b.emptyTarget(ctx, s)
	if err != nil {
		return 0, err
	}
	defer dst.stop()
	if s.name == nbdcopy {
		return b.runCopy(ctx, s, src.uri(src.addr), dst.uri(dst.addr))
	}
	begin := time.Now()
	m, err := b.startMirror(ctx, src.uri(src.addr), dst.uri(dst.addr))
	if err != nil {
		return 0, err
	}
	defer m.stop()
	_, err = b.tell(ctx, waitMirror)
	return time.Since(begin), err
}

// emptyTarget starts a server of an empty file of the image's size, copyTarget. The caller
// stops it.
func (b *bench) emptyTarget(ctx context.Context, s *server) (*server, error) {
	f, err := os.Create(b.copyTarget())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(b.images.size), f.Close()); err != nil {
		return nil, err
	}
	k := kind{name: s.name, argv: func(l launch) []string {
		return []string{b.builds[0].tool, "serve", "--writable", "--listen=" + host + ":" + l.port, b.copyTarget()}
	}}
	return b.startOnce(ctx, k, launch{})
}

// besideCopy measures how long the writes of a client take while a mirror makes its first copy,
// or while the mirror is paused.
func (b *bench) besideCopy(ctx context.Context, s *server) (got sample, err error) {
	defer os.Remove(b.copyTarget())
	dst, err := b.emptyTarget(ctx, s)
	if err != nil {
		return sample{}, err
	}
	defer dst.stop()
	m, err := b.startMirror(ctx, s.uri(s.addr), dst.uri(dst.addr))
	if err != nil {
		return sample{}, err
	}
	defer m.stop()
	if s.name == pausedMirror {
		if _, err := b.tell(ctx, pauseMirror); err != nil {
			return sample{}, err
		}
	}
	conn, err := m.dial(ctx)
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	copied := b.untilCopied(ctx)
	defer func() {
		cancel()
		<-copied
	}()
	var took []time.Duration
	rng, p, begin := rand.New(rand.NewPCG(4, 2)), randomBlock(4*kib), time.Now()
	for over := false; !over; {
		select {
		case <-copied:
			over = true
		default:
			over = time.Since(begin) >= b.opts.runFor
		}
		at := time.Now()
		if err := conn.Write(ctx, p, rng.Int64N(conn.Size()/int64(len(p)))*int64(len(p)), false); err != nil {
			return sample{}, err
		}
		took = append(took, time.Since(at))
	}
	slices.Sort(took)
	n := int64(len(took))
	return sample{
		Bytes: n * int64(len(p)), Reads: n, Seconds: time.Since(begin).Seconds(),
		Median: float64(took[n/2].Nanoseconds()) / 1e3, P99: float64(took[n*99/100].Nanoseconds()) / 1e3,
	}, nil
}

// untilCopied returns a channel that is closed when the mirror has left its background mode, or
// ctx is done.
func (b *bench) untilCopied(ctx context.Context) <-chan struct{} {
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		for ctx.Err() == nil {
			if st, err := b.tell(ctx, statusMirror); err != nil || st.Mode != "background" {
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return copied
}

// converge measures how long a mirror takes until both ends are equal while a client writes,
// and what it sends to the secondary.
func (b *bench) converge(ctx context.Context, s *server) (got sample, err error) {
	defer os.Remove(b.copyTarget())
	dst, err := b.emptyTarget(ctx, s)
	if err != nil {
		return sample{}, err
	}
	defer dst.stop()
	r, err := startRelay(dst.addr, 0)
	if err != nil {
		return sample{}, err
	}
	defer r.close()
	begin := b.beginOurs
	if s.name == qemuMirror || s.name == qemuBackground {
		begin = b.beginQemu
	}
	m, err := begin(ctx, s, r.addr())
	if err != nil {
		return sample{}, err
	}
	defer m.stop()
	conn, err := m.dial(ctx)
	if err != nil {
		return sample{}, err
	}
	defer conn.Close()
	l := startLoad(ctx, conn)
	at := time.Now()
	err = m.copy(ctx)
	took := time.Since(at)
	sent := r.sent.Load()
	if err = errors.Join(err, l.end()); err == nil {
		err = m.complete(ctx)
	}
	if err != nil {
		return sample{}, err
	}
	path, err := b.images.path(ctx, targetImage)
	if err != nil {
		return sample{}, err
	}
	return sample{Bytes: b.images.size, Seconds: took.Seconds(), Wire: sent, Needed: b.images.size}, sameFiles(path, b.copyTarget())
}

// mirrorRun is a mirror that serves a client and does not copy yet.
type mirrorRun struct {
	*server
	copy     func(ctx context.Context) error // returns when both ends are equal
	complete func(ctx context.Context) error // when no client writes any more
	closer   io.Closer                       // nil: none
}

func (m *mirrorRun) stop() {
	if m.closer != nil {
		m.closer.Close()
	}
	m.server.stop()
}

func (b *bench) beginOurs(ctx context.Context, s *server, secondary string) (*mirrorRun, error) {
	m, err := b.startMirror(ctx, s.uri(s.addr), "nbd://"+secondary)
	if err != nil {
		return nil, err
	}
	if _, err := b.tell(ctx, pauseMirror); err != nil {
		m.stop()
		return nil, err
	}
	return &mirrorRun{
		server: m,
		copy: func(ctx context.Context) error {
			_, err := b.tell(ctx, resumeMirror)
			if err == nil {
				_, err = b.tell(ctx, waitMirror)
			}
			return err
		},
		complete: func(ctx context.Context) error {
			_, err := b.tell(ctx, stopMirror)
			return err
		},
	}, nil
}

// load is a client that writes at a fixed rate.
type load struct {
	cancel  context.CancelFunc
	writers *errgroup.Group
}

func startLoad(ctx context.Context, conn *client.Conn) *load {
	stop, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, writers: &errgroup.Group{}}
	for i := range uint64(loadWriters) {
		rng, p := rand.New(rand.NewPCG(5, i)), randomBlock(loadWrite)
		l.writers.Go(func() error {
			tick := time.NewTicker(loadPause)
			defer tick.Stop()
			for {
				select {
				case <-stop.Done():
					return nil
				case <-tick.C:
				}
				p[rng.IntN(len(p))]++ // no two writes are equal
				if err := conn.Write(ctx, p, rng.Int64N(conn.Size()/loadWrite)*loadWrite, false); err != nil {
					return err
				}
			}
		})
	}
	return l
}

// end stops the writes and waits for those in flight.
func (l *load) end() error {
	l.cancel()
	return l.writers.Wait()
}

// randomBlock returns n random bytes, the same each time.
func randomBlock(n int64) []byte {
	p := make([]byte, n)
	_, _ = io.ReadFull(randomBytes(), p) // never fails
	return p
}
