package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/internal/listenaddr"
)

const (
	// maxLine bounds a request.
	maxLine = 4 << 10
	// writeTimeout limits how long a client may take to receive a reply.
	writeTimeout = 10 * time.Second
	// lastReplies is how long Close waits for replies in progress, such as the one to the
	// request that ended the mirror.
	lastReplies = time.Second
)

// Mirror is what the requests are about. Its methods are called concurrently.
type Mirror interface {
	// Status returns the state now.
	Status() *Status
	Pause()
	Resume()
	// Complete returns nil when the secondary is complete. The client may be gone by then.
	Complete(pivot, verify bool) error
	// Cancel returns when the mirror has ended.
	Cancel() error
	// Wait returns nil when the secondary is in sync or complete, and an error if the mirror
	// has ended in another way or ctx is done.
	Wait(ctx context.Context) error
}

// Server answers requests. Its methods may be called concurrently.
type Server struct {
	mirror Mirror
	log    *slog.Logger
	serves sync.WaitGroup // connections

	mu       sync.Mutex // guards the fields below
	closing  bool
	listener net.Listener
	conns    map[*net.UnixConn]context.CancelFunc // withdraws its request
}

// Listen makes the socket at path. It replaces that of a process that was killed. Only the
// owner of the process can connect.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	// With a chmod after the bind others could connect in between. The mask is that of the
	// whole process: no other goroutine may create files meanwhile.
	mask := syscall.Umask(0o177)
	defer syscall.Umask(mask)
	return listenaddr.Listen(ctx, "unix:"+path)
}

// Serve answers requests on l, in goroutines of its own, until Close. It is called once.
func Serve(l net.Listener, m Mirror, log *slog.Logger) *Server {
	s := &Server{mirror: m, log: log, listener: l, conns: make(map[*net.UnixConn]context.CancelFunc)}
	s.serves.Go(func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				s.log.Error("control socket: cannot accept a connection", "err", err)
				time.Sleep(time.Second) // too many open files
				continue
			}
			s.begin(c.(*net.UnixConn))
		}
	})
	return s
}

// begin serves a connection if its peer may control the mirror.
func (s *Server) begin(c *net.UnixConn) {
	if err := allowed(c); err != nil {
		s.log.Warn("control socket: refused", "err", err)
		c.Close()
		return
	}
	ctx, withdraw := context.WithCancel(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		withdraw()
		c.Close()
		return
	}
	s.conns[c] = withdraw
	s.serves.Go(func() { s.serve(ctx, c, withdraw) })
}

// allowed returns an error unless the peer is root or the user of this process.
func allowed(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return os.NewSyscallError("getsockopt SO_PEERCRED", cerr)
	}
	return allowedUser(cred.Uid)
}

func allowedUser(uid uint32) error {
	if uid == 0 || int64(uid) == int64(os.Geteuid()) {
		return nil
	}
	return fmt.Errorf("the user %d may not control this mirror: %w", uid, syscall.EPERM)
}

// serve answers the requests of a connection, one after the other, and closes it. Meanwhile it
// reads on, to notice that the client goes away.
func (s *Server) serve(ctx context.Context, c *net.UnixConn, withdraw context.CancelFunc) {
	lines := make(chan []byte)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(lines)
		in := bufio.NewScanner(c)
		in.Buffer(nil, maxLine)
		for in.Scan() {
			select {
			case lines <- bytes.Clone(in.Bytes()):
			case <-ctx.Done():
				return
			}
		}
		if !s.isClosing() { // else the request gets its reply
			withdraw()
		}
	})
	for line := range lines {
		if err := s.reply(c, s.answer(ctx, line)); err != nil {
			break
		}
	}
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	withdraw()
	c.Close()
	reading.Wait()
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

func (s *Server) reply(c *net.UnixConn, r *Reply) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err = c.Write(append(line, '\n'))
	return err
}

// answer executes a request.
func (s *Server) answer(ctx context.Context, line []byte) *Reply {
	var r Request
	in := json.NewDecoder(bytes.NewReader(line))
	in.DisallowUnknownFields()
	err := in.Decode(&r)
	if err == nil && in.More() {
		err = errors.New("more than one object on a line")
	}
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return &Reply{Error: "invalid request: " + err.Error()}
	}
	if r.Command != CommandStatus {
		s.log.Info("control socket: request", "command", r.Command, "then", r.Then, "verify", r.Verify)
	}
	err = s.execute(ctx, &r)
	reply := &Reply{OK: err == nil, Status: s.mirror.Status()}
	if err != nil {
		reply.Error = err.Error()
	}
	return reply
}

// check returns an error for requests that no server can execute.
func (r *Request) check() error {
	if r.Command == CommandComplete {
		if r.Then != ThenPivot && r.Then != ThenStop {
			return fmt.Errorf("complete needs then, %q or %q", ThenPivot, ThenStop)
		}
		return nil
	}
	if r.Then != "" || r.Verify {
		return fmt.Errorf("then and verify belong to %q", CommandComplete)
	}
	return nil
}

func (s *Server) execute(ctx context.Context, r *Request) error {
	switch r.Command {
	case CommandStatus:
		return nil
	case CommandPause:
		s.mirror.Pause()
		return nil
	case CommandResume:
		s.mirror.Resume()
		return nil
	case CommandComplete:
		return s.mirror.Complete(r.Then == ThenPivot, r.Verify)
	case CommandCancel:
		return s.mirror.Cancel()
	case CommandWait:
		return s.mirror.Wait(ctx)
	}
	return fmt.Errorf("unknown command %q", r.Command)
}

// Close removes the socket and ends all connections, those that wait for a reply after up to a
// second. When it returns no goroutine is left, except for a request that the Mirror has not
// answered by then.
func (s *Server) Close() {
	s.mu.Lock()
	s.closing = true
	s.listener.Close()
	for c := range s.conns {
		_ = c.SetReadDeadline(time.Now()) // no further requests
	}
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		s.serves.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return
	case <-time.After(lastReplies):
	}
	s.mu.Lock()
	for c, withdraw := range s.conns {
		withdraw()
		c.Close()
	}
	s.mu.Unlock()
	<-ended
}
