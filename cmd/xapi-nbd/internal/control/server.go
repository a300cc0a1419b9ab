package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// Service has the requests of other commands to the running service. Its methods are called
// concurrently.
type Service interface {
	// Status returns the state of the service. It may take some seconds, as it may make
	// calls to xapi.
	Status(context.Context) StatusReport
	// Recover removes leftover VBDs.
	Recover(context.Context) RecoverReport
	// Disconnect closes the connection with this ID, or all that are served from the VDI
	// with this uuid, and returns their number.
	Disconnect(id string) int
	// Drain refuses new clients from now on, and ends the service when its connections have
	// ended. It returns their number.
	Drain(context.Context) (serving int, err error)
	// Undrain serves new clients again. changed is false if the service was not draining.
	Undrain() (changed bool, err error)
	// End ends this process as SIGTERM does, if an upgrade has replaced it.
	End() error
	// Upgrade starts the installed program, which takes new clients over. It returns when
	// that process serves, or with the reason why this one goes on.
	Upgrade(context.Context) UpgradeReport
}

// Server answers the other commands of this program on behalf of the running service:
// HTTP on a unix socket that only its owner, root, may use. [NewServer] makes one.
type Server struct {
	mu      sync.Mutex // guards path and closed
	path    string
	closed  bool // Close has been called
	service Service
	log     *slog.Logger
	http    *http.Server
}

// NewServer returns a server for the socket at path. Requests are canceled when ctx ends.
func NewServer(ctx context.Context, path string, service Service, log *slog.Logger) *Server {
	s := &Server{path: path, service: service, log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /recover", s.recover)
	mux.HandleFunc("GET /status", s.status)
	mux.HandleFunc("POST /disconnect", s.disconnect)
	mux.HandleFunc("POST /drain", s.drain)
	mux.HandleFunc("POST /undrain", s.undrain)
	mux.HandleFunc("POST /end", s.end)
	mux.HandleFunc("POST /upgrade", s.upgrade)
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve answers on l until Close is called, or l fails.
func (s *Server) Serve(l net.Listener) error { return s.http.Serve(l) }

// lastAnswers is how long Close waits for requests in progress, such as the one that
// asked the service to end. It is part of stop_timeout.
const lastAnswers = time.Second

// Close removes the socket, closes the listeners and waits up to a second for requests in
// progress.
func (s *Server) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), lastAnswers)
	defer cancel()
	s.mu.Lock()
	s.closed = true
	_ = os.Remove(s.path) // if it is left, the next process replaces it
	s.mu.Unlock()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
}

// Link gives the socket a second name, which it replaces. From now on that one is removed by
// Close; the first name belongs to another process, which moves its own socket there. undo
// takes the first name back when that process has ended; after Close it removes that name.
func (s *Server) Link(path string) (undo func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return func() {}, err
	}
	first := s.path
	if err := os.Link(first, path); err != nil {
		return func() {}, err
	}
	s.path = path
	return func() {
		if s.isClosed() {
			_ = os.Remove(first)
		} else if err := s.Move(first); err != nil {
			s.log.Error("the control socket has lost its name", "err", err)
		}
		// A rename between two names of one file leaves both.
		_ = os.Remove(path)
	}, nil
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Move renames the socket, and replaces the one of that name. At any time one of the two
// answers there.
func (s *Server) Move(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Rename(s.path, path); err != nil {
		return err
	}
	s.path = path
	return nil
}

// Listen makes the socket. The caller holds the lock of the state folder, so one that
// exists was left by a process that has ended.
func (s *Server) Listen(ctx context.Context) (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{}
	// With a chmod after the bind others could connect in between. The mask is that of
	// the whole process: no other goroutine may create files meanwhile.
	mask := syscall.Umask(0o177)
	l, err := lc.Listen(ctx, "unix", s.path)
	syscall.Umask(mask)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // its name may change
	return l, nil
}

func (s *Server) recover(w http.ResponseWriter, r *http.Request) {
	s.log.Info("asked to clean up")
	s.answer(w, s.service.Recover(r.Context()))
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	s.answer(w, s.service.Status(r.Context()))
}

func (s *Server) disconnect(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	count := s.service.Disconnect(id)
	s.log.Info("asked to disconnect", "id", id, "count", count)
	s.answer(w, DisconnectReport{Found: count > 0, Count: count})
}

func (s *Server) drain(w http.ResponseWriter, r *http.Request) {
	s.log.Debug("asked to drain")
	serving, err := s.service.Drain(r.Context())
	report := DrainReport{Serving: serving}
	if err != nil {
		report.Error = err.Error()
	}
	s.answer(w, report)
}

func (s *Server) undrain(w http.ResponseWriter, _ *http.Request) {
	changed, err := s.service.Undrain()
	report := UndrainReport{Changed: changed}
	if err != nil {
		report.Error = err.Error()
	}
	s.answer(w, report)
}

func (s *Server) end(w http.ResponseWriter, _ *http.Request) {
	var report EndReport
	if err := s.service.End(); err != nil {
		report.Error = err.Error()
	}
	s.answer(w, report)
}

func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) {
	s.answer(w, s.service.Upgrade(r.Context()))
}

func (s *Server) answer(w http.ResponseWriter, report any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(report); err != nil {
		s.log.Debug("cannot answer on the control socket", "err", err)
	}
}
