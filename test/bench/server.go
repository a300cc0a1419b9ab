package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

const (
	startTime  = 30 * time.Second      // for a server to answer
	retryPause = 10 * time.Millisecond // between two tries to reach it
	stopTime   = 10 * time.Second      // for a server to end when asked to
	maxOutput  = 8 << 10               // kept of what it prints
)

// server is a running one. Its methods may be called concurrently.
type server struct {
	kind
	env    env
	image  string
	addr   string
	port   string
	tls    *tls.Config // a client's, nil in the clear
	certs  string      // a client's folder of certificates
	cmd    *exec.Cmd   // nil if there is no process
	done   chan struct{}
	output *output
}

// inProcess is whether there is no server: the case reads by itself.
func (s *server) inProcess() bool { return s.cmd == nil }

// uri is for libnbd's programs. addr is the server's own, or that of a relay.
func (s *server) uri(addr string) string {
	if s.tls == nil {
		return "nbd://" + addr + "/"
	}
	return "nbds://" + addr + "/?tls-certificates=" + s.certs
}

// start starts a server and returns when it answers. The port is one that was
// free; in the rare case that somebody else takes it in between it tries again.
func (b *bench) start(ctx context.Context, k kind, e env, cgroup string) (s *server, err error) {
	image, err := b.images.path(ctx, e.image)
	if err != nil {
		return nil, err
	}
	for range 3 {
		s, err = b.startOnce(ctx, k, launch{env: e, image: image, cgroup: cgroup})
		if !errors.Is(err, errEnded) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", k.name, err)
	}
	return s, nil
}

func (b *bench) startOnce(ctx context.Context, k kind, l launch) (*server, error) {
	s := &server{kind: k, env: l.env, image: l.image, done: make(chan struct{}), output: &output{}}
	if k.argv == nil {
		return s, nil
	}
	var err error
	if l.port, err = freePort(); err != nil {
		return nil, err
	}
	s.port, s.addr = l.port, net.JoinHostPort(host, l.port)
	if l.env.tls {
		s.tls, s.certs = b.certs.config, b.certs.client
	}
	argv := k.argv(b, l)
	b.log.note(serverCommand, b.shown(argv, s.port))
	if l.cgroup != "" {
		argv = inCgroup(l.cgroup, argv)
	}
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Dir = b.dir
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	// Should this program be killed the servers go too.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the process
		_ = s.cmd.Wait()
		close(s.done)
	}()
	allowFiles(s.cmd.Process.Pid)
	if err := s.await(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("%w; it printed: %q", err, s.output.String())
	}
	return s, nil
}

var (
	errUnfit = errors.New("not fit for comparison") // trying again does not help
	errEnded = errors.New("it ended")
)

// await tries until the server answers.
func (s *server) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, errors.New("it does not answer"))
	defer cancel()
	for {
		err := s.ready(s)
		select {
		case <-s.done: // also when somebody else answered
			return errEnded
		default:
		}
		if err == nil || errors.Is(err, errUnfit) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-s.done:
		case <-time.After(retryPause):
		}
	}
}

// stop ends the server and waits until it is gone.
func (s *server) stop() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(stopTime):
		_ = s.cmd.Process.Kill()
		<-s.done
	}
}

// connects is the ready of servers that anybody may connect to without harm.
func (s *server) connects() error {
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		return err
	}
	return c.Close()
}

// answers negotiates. It also sees to it that clients will use several
// connections: nbdcopy silently does not where that is not offered.
func (s *server) answers() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if conn.Info().Flags&wire.FlagCanMultiConn == 0 {
		return fmt.Errorf("%w: it does not offer to be read by several connections", errUnfit)
	}
	return nil
}

// dial opens the export with our own client. The caller closes the connection.
func (s *server) dial(ctx context.Context) (*client.Conn, error) {
	c, err := client.Dial(ctx, "tcp", s.addr, &client.Config{TLSConfig: s.tls})
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, "")
	if err != nil {
		return nil, errors.Join(err, c.Abort())
	}
	return conn, nil
}

// freePort is a port that nobody listens on now.
func freePort() (string, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, errors.Join(err, l.Close())
}

// output keeps the beginning of what a process prints.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text.Write(p[:min(len(p), max(maxOutput-o.text.Len(), 0))])
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
