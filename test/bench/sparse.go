package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

// serviceCases copy disks from the service, by way of a proxy that counts bytes.
func serviceCases() []testCase {
	sparse, tls := env{image: sparseImage}, env{image: sparseImage, tls: true}
	increment, tall := env{image: incrementImage}, env{image: tallImage}
	through := func(name, program string, e env, share int64, only string, copyIt copyClient) testCase {
		return testCase{name: name, env: e, client: program, only: only, run: func(ctx context.Context, b *bench, s *server) (sample, error) {
			return b.counted(ctx, s, share, copyIt)
		}}
	}
	return []testCase{
		through("sparse/clear/nbdcopy", "nbdcopy", sparse, 1, "", copyWithNBDCopy),
		through("sparse/clear/nbd-tool", "", sparse, 1, "", copyWithTool),
		through("sparse/clear/simple", "", sparse, simpleShare, "", copySimply),
		{name: "memory/attachments", env: sparse, only: ours, run: memoryOfAttachments},
		through("sparse/tls/nbdcopy", "nbdcopy", tls, 1, "", copyWithNBDCopy),
		through("increment/nbd-tool", "", increment, 1, "", copyWithTool),
		through("increment/qemu-img", "qemu-img", increment, 1, ours, copyWithQEMU),
		{name: "first-byte", env: tall, run: firstByte},
	}
}

// simpleShare is the divisor of the part of a disk that copySimply reads.
const simpleShare = 8

// serviceKinds returns the servers of the service's images.
func (b *bench) serviceKinds(e env) []kind {
	if b.opts.old != "" {
		b.skip("the service with -old")
		return nil
	}
	kinds := []kind{{name: ours}, {name: allData}}
	if e.image == incrementImage {
		kinds = kinds[:1]
	}
	for i := range kinds {
		k := &kinds[i]
		h, err := b.hostOf(e.image, k.name)
		if err != nil {
			b.skip("%s with the image %q: %v", k.name, e.image, err)
			return nil
		}
		k.host = h
		k.argv = func(l launch) []string {
			return []string{b.service, "serve", "--listen=" + host + ":" + l.port, "--certfile=" + b.pairFile(), "--xapi-socket=" + h.Socket(),
				"--inventory=" + h.Inventory(), "--device-dir=" + h.DeviceDir(), "--state-dir=" + filepath.Join(h.dir, "state"), "--log-level=warning"}
		}
	}
	if e.image == tallImage || b.programs[qemu] == "" || b.programs["qemu-img"] == "" {
		return kinds
	}
	return append(kinds, kind{name: qemu, argv: func(l launch) []string {
		argv := b.qemuArgs(l, "qcow2")
		if e.image == incrementImage {
			argv = append(argv[:len(argv)-1], "-B", "base", l.image)
		}
		return argv
	}})
}

// contextOf is the metadata context with the changed blocks of an increment.
func (s *server) contextOf() []string {
	switch {
	case s.env.image != incrementImage:
		return nil
	case s.host == nil:
		return []string{"qemu:dirty-bitmap:base"}
	}
	return []string{"x-xapi:unchanged:" + s.host.base}
}

// copyClient copies a disk from a server, which it finds at addr.
type copyClient func(ctx context.Context, b *bench, s *server, addr string) error

// counted runs a client, and measures the bytes that it received and that were read from
// the device. A connection beside it keeps the disk attached meanwhile.
func (b *bench) counted(ctx context.Context, s *server, share int64, copyIt copyClient) (got sample, err error) {
	h, err := b.hostOf(s.env.image, ours)
	if err != nil {
		return got, err
	}
	if s.host != nil {
		if err := s.host.settle(ctx); err != nil {
			return got, err
		}
	} else if err := b.qcow2[s.env.image].drop(); err != nil {
		return got, err
	}
	hold, err := s.dialAs(ctx, client.Config{MetaContexts: s.contextOf()})
	if err != nil {
		return got, err
	}
	defer hold.Close()
	got.Needed = total(h.needed, hold.Size()/share)
	device := ""
	if s.host == nil {
		device = b.qcow2[s.env.image].path
	} else if device, err = s.host.device(); err != nil {
		return got, err
	}
	before, err := bytesRead(device)
	if err != nil {
		return got, err
	}
	p, err := startProxy(s.addr)
	if err != nil {
		return got, err
	}
	begin := time.Now()
	err = copyIt(ctx, b, s, p.addr())
	got.Seconds, got.Bytes = time.Since(begin).Seconds(), got.Needed
	p.close()
	got.Wire = p.received.Load()
	after, statErr := bytesRead(device)
	got.Device = after - before
	return got, errors.Join(err, statErr)
}

func copyWithNBDCopy(ctx context.Context, b *bench, s *server, addr string) error {
	_, err := b.runClient(ctx, b.programs["nbdcopy"], s.uri(addr), "null:")
	return err
}

// copyWithTool copies to a file in memory, for an increment to one that is there.
func copyWithTool(ctx context.Context, b *bench, s *server, addr string) error {
	out := filepath.Join(b.dir, "copy.raw")
	args := []string{b.builds[0].tool, "copy", s.uri(addr), out}
	if s.env.image == incrementImage {
		h, err := b.hostOf(incrementImage, ours)
		if err != nil {
			return err
		}
		since := h.base
		if s.host == nil {
			since = "base"
		}
		args = []string{b.builds[0].tool, "copy", "--changed-since", since, s.uri(addr), out}
		f, err := os.Create(out)
		if err == nil {
			err = errors.Join(f.Truncate(sparseTimes*b.opts.size), f.Close())
		}
		if err != nil {
			return err
		}
	}
	_, err := b.runClient(ctx, args...)
	return errors.Join(err, os.Remove(out))
}

// copyWithQEMU makes an increment, on top of an image of which it reads nothing.
func copyWithQEMU(ctx context.Context, b *bench, s *server, addr string) error {
	full, out := filepath.Join(b.dir, "full.qcow2"), filepath.Join(b.dir, "copy.qcow2")
	if err := b.qemuImg(ctx, "create", "-q", "-f", "qcow2", full, fmt.Sprint(sparseTimes*b.opts.size)); err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(addr)
	err := b.qemuImg(ctx, "convert", "--image-opts", "driver=nbd,server.type=inet,server.host="+host+",server.port="+port+
		",export="+s.host.export+",x-dirty-bitmap="+s.contextOf()[0], "-O", "qcow2", "-B", full, "-F", "qcow2", out)
	return errors.Join(err, os.Remove(full), os.Remove(out))
}

// copySimply reads a part of a disk with simple replies, 10 reads of 2 MiB at a time.
func copySimply(ctx context.Context, _ *bench, s *server, addr string) error {
	conn, err := s.dialTo(ctx, addr, client.Config{NoStructured: true})
	if err != nil {
		return err
	}
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range crowdDepth {
		group.Go(func() error {
			p := make([]byte, bulkRead)
			for off := next.Add(bulkRead) - bulkRead; off < conn.Size()/simpleShare; off = next.Add(bulkRead) - bulkRead {
				if err := conn.Read(ctx, p, off); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return errors.Join(group.Wait(), conn.Close())
}

// firstByte measures the time until the first sector of a disk is there.
func firstByte(ctx context.Context, _ *bench, s *server) (got sample, err error) {
	if err := s.host.settle(ctx); err != nil {
		return got, err
	}
	begin := time.Now()
	conn, err := s.dial(ctx)
	if err != nil {
		return got, err
	}
	err = conn.Read(ctx, make([]byte, 512), 0)
	took := time.Since(begin)
	got.Mean, got.Seconds, got.Bytes = float64(took.Microseconds()), took.Seconds(), 512
	return got, errors.Join(err, conn.Close())
}

// memoryOfAttachments measures the memory of the service with several disks attached, of
// each of which a block was read.
func memoryOfAttachments(ctx context.Context, _ *bench, s *server) (got sample, err error) {
	if err := s.host.settle(ctx); err != nil {
		return got, err
	}
	if got.RSSFresh, _, err = memory(s.cmd.Process.Pid); err != nil {
		return got, err
	}
	var conns []*client.Conn
	defer func() {
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
	}()
	for _, vdi := range append([]string{s.host.vdi}, s.host.others...) {
		conn, err := s.dialExport(ctx, s.addr, s.host.exportOf(vdi), client.Config{})
		if err != nil {
			return got, err
		}
		conns = append(conns, conn)
		if err := conn.Read(ctx, make([]byte, smallRead), 0); err != nil {
			return got, err
		}
	}
	got.RSS, _, err = memory(s.cmd.Process.Pid)
	return got, err
}

// exportPath is the part of a URI that names the export.
func (s *server) exportPath() string {
	if s.host == nil {
		return "/"
	}
	return "/" + url.PathEscape(s.host.export)
}

// verifySpans compares the blocks with data of a disk with its image, and blocks without
// data with zeroes.
func (b *bench) verifySpans(ctx context.Context, s *server) error {
	h, err := b.hostOf(s.env.image, ours)
	if err != nil {
		return err
	}
	if s.host == nil && s.env.image == incrementImage {
		return nil // has other bytes
	}
	f, err := os.Open(h.ImagePath(h.vdi))
	if err != nil {
		return err
	}
	defer f.Close()
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	got, want := make([]byte, bulkRead), make([]byte, bulkRead)
	for i, span := range h.needed {
		for _, off := range []int64{span.off, span.off + span.n} {
			if i%8 != 0 || off+span.n > conn.Size() {
				continue
			}
			if err := conn.Read(ctx, got[:span.n], off); err != nil {
				return err
			}
			if _, err := f.ReadAt(want[:span.n], off); err != nil {
				return err
			}
			if string(got[:span.n]) != string(want[:span.n]) {
				return fmt.Errorf("%s serves wrong bytes: %d bytes at %d differ from the image", s.name, span.n, off)
			}
		}
	}
	return nil
}

// proxy relays connections to a server, and counts the bytes that come from it.
type proxy struct {
	listener net.Listener
	to       string
	received atomic.Int64
	active   sync.WaitGroup
}

func startProxy(to string) (*proxy, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: l, to: to}
	p.active.Go(p.accept) // until close
	return p, nil
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

// close waits until the clients and the server have closed all connections.
func (p *proxy) close() {
	p.listener.Close()
	p.active.Wait()
}

func (p *proxy) accept() {
	for {
		near, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.active.Go(func() { // until both sides have ended
			defer near.Close()
			far, err := net.Dial("tcp", p.to)
			if err != nil {
				return
			}
			defer far.Close()
			var ways sync.WaitGroup
			ways.Go(func() {
				_, _ = io.Copy(far, near)
				_ = far.(*net.TCPConn).CloseWrite()
			})
			n, _ := io.Copy(near, far)
			p.received.Add(n)
			_ = near.(*net.TCPConn).CloseWrite()
			ways.Wait()
		})
	}
}
