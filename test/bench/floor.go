package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// floor moves the bytes of the image over loopback without any protocol, on so
// many connections.
func (b *bench) floor(ctx context.Context, s *server, conns int) (sample, error) {
	if s.name == iperf {
		return b.iperf(ctx, s, conns)
	}
	group, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	share := b.opts.size / int64(conns)
	for i := range conns {
		group.Go(func() error { return throwAway(ctx, s.addr, int64(i)*share, share) })
	}
	err := group.Wait()
	return sample{Bytes: share * int64(conns), Seconds: time.Since(begin).Seconds()}, err
}

// throwAway asks serve-splice for a range and reads it into the same memory
// again and again.
func throwAway(ctx context.Context, addr string, off, n int64) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	ask := binary.BigEndian.AppendUint64(nil, uint64(off))
	if _, err := c.Write(binary.BigEndian.AppendUint64(ask, uint64(n))); err != nil {
		return err
	}
	p := make([]byte, 256*kib) // as much as nbdcopy reads at once
	for got := int64(0); got < n; {
		m, err := c.Read(p)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", got, err)
		}
		got += int64(m)
	}
	return nil
}

// serveSplice is the subcommand that sends ranges of a file by splice: a range
// is asked for by its offset and its length, 64 bits each. It uses blocking
// sockets and nothing of Go's network: no server does with less.
func serveSplice(ctx context.Context, args []string, std streams) error {
	f := flag.NewFlagSet("serve-splice", flag.ContinueOnError)
	f.SetOutput(std.err)
	listen := f.String("listen", "", "`address`")
	if err := f.Parse(args); err != nil {
		return err
	}
	addr, err := net.ResolveTCPAddr("tcp4", *listen)
	if err != nil {
		return err
	}
	file, err := os.Open(f.Arg(0))
	if err != nil {
		return err
	}
	defer file.Close()
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(l, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(l, 16); err != nil {
		return os.NewSyscallError("listen", err)
	}
	failed := make(chan error, 1)
	go func() { // ends with the process
		for {
			c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil && !errors.Is(err, unix.EINTR) {
				failed <- os.NewSyscallError("accept", err)
				return
			}
			if err == nil {
				go spliceAll(c, int(file.Fd())) // ends with the range, or the process
			}
		}
	}()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// spliceAll answers one connection. Of errors the client sees that bytes are
// missing.
func spliceAll(conn, file int) {
	defer unix.Close(conn)
	ask := make([]byte, 16)
	if n, err := unix.Read(conn, ask); err != nil || n != len(ask) {
		return
	}
	off, left := int64(binary.BigEndian.Uint64(ask)), int64(binary.BigEndian.Uint64(ask[8:]))
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	room, err := unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, int(mib))
	if err != nil {
		return
	}
	for left > 0 {
		filled, err := unix.Splice(file, &off, pipe[1], nil, int(min(left, int64(room))), unix.SPLICE_F_MOVE)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || filled == 0 {
			return
		}
		left -= int64(filled) // an int or an int64, as the architecture has it
		for filled > 0 {
			n, err := unix.Splice(pipe[0], nil, conn, nil, int(filled), unix.SPLICE_F_MOVE)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return
			}
			filled -= max(n, 0)
		}
	}
}

// iperf has the server send, as all the others do.
func (b *bench) iperf(ctx context.Context, s *server, conns int) (sample, error) {
	file := filepath.Join(b.dir, "iperf3.json")
	argv := []string{
		b.programs["iperf3"], "-c", host, "-p", s.port, "--reverse",
		fmt.Sprintf("--parallel=%d", conns), fmt.Sprintf("--bytes=%d", b.opts.size), "--json", "--logfile", file,
	}
	b.log.note(clientCommand, b.shown(argv, s.port))
	defer os.Remove(file) // it appends
	if _, err := b.client(ctx, argv); err != nil {
		return sample{}, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return sample{}, err
	}
	return parseIperf(text)
}

func parseIperf(text []byte) (sample, error) {
	var o struct {
		Error string
		End   struct {
			Received struct {
				Bytes   int64
				Seconds float64
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return sample{}, fmt.Errorf("iperf3's output: %w", err)
	}
	if o.Error != "" || o.End.Received.Bytes == 0 {
		return sample{}, fmt.Errorf("iperf3: %q, %d bytes", o.Error, o.End.Received.Bytes)
	}
	return sample{Bytes: o.End.Received.Bytes, Seconds: o.End.Received.Seconds}, nil
}

// iperfListens is the ready of iperf3, whose one client at a time is not to be
// an empty connection.
func (s *server) iperfListens() error {
	if !strings.Contains(s.output.String(), "Server listening on "+s.port) {
		return errors.New("it does not listen yet")
	}
	return nil
}
