package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"xapi-nbd/vdi"
)

// controlName is the control socket's name in the state folder.
const controlName = "control"

// control answers the other commands of this program on behalf of the running
// service: HTTP on a unix socket that only its owner, root, may use.
type control struct {
	path    string
	service *service
	log     *slog.Logger
}

// newControl makes the control; serve runs it.
func newControl(path string, s *service) *control {
	return &control{path: path, service: s, log: s.log}
}

// serve answers on the socket until ctx ends. It calls opened after the first
// attempt to make the socket. Without a socket there is still a service: the
// attempts go on.
func (c *control) serve(ctx context.Context, opened func()) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /recover", c.recover)
	mux.HandleFunc("GET /status", c.status)
	mux.HandleFunc("POST /disconnect", c.disconnect)
	mux.HandleFunc("POST /drain", c.drain)
	mux.HandleFunc("POST /undrain", c.undrain)
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(c.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		closeControl(server)
	})
	opened = sync.OnceFunc(opened)
	open := func(ctx context.Context) (net.Listener, error) {
		defer opened()
		return c.listen(ctx)
	}
	keepServing(ctx, c.service.retries, "make the control socket", open, server.Serve)
	if !stop() {
		<-ended
	}
}

// lastAnswers is how long answers that are under way may take at the end: whoever
// asked the service to end wants to hear of it. They come out of what a stop may take.
const lastAnswers = time.Second

func closeControl(server *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), lastAnswers)
	defer cancel()
	if server.Shutdown(ctx) != nil {
		server.Close()
	}
}

// listen makes the socket. One that is there already was left by a process that
// is gone: the lock of the state folder is ours.
func (c *control) listen(ctx context.Context) (net.Listener, error) {
	if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{}
	// Nobody else may connect between bind and chmod. The mask is the process's, so
	// it is restored at once, and nobody may be making files.
	mask := syscall.Umask(0o177)
	l, err := lc.Listen(ctx, "unix", c.path)
	syscall.Umask(mask)
	return l, err
}

// cleanupReport is the answer to POST /recover.
type cleanupReport struct {
	vdi.Recovered
	Error    string `json:",omitempty"`
	ExitCode int    `json:",omitempty"` // of the command that asked, if there is an error
}

func (c *control) recover(w http.ResponseWriter, r *http.Request) {
	c.log.Info("asked to clean up")
	result, err := c.service.disks.Recover(r.Context())
	report := cleanupReport{Recovered: result}
	if err != nil {
		report.Error, report.ExitCode = err.Error(), recoveryCode(err)
	}
	c.answer(w, report)
}

func (c *control) status(w http.ResponseWriter, r *http.Request) {
	c.answer(w, c.service.status(r.Context()))
}

// disconnectReport is the answer to POST /disconnect.
type disconnectReport struct {
	Found bool `json:"found"` // there was such a connection
	Count int  `json:"count"` // how many were cut
}

func (c *control) disconnect(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	count := c.service.disconnect(id)
	c.log.Info("asked to disconnect", "id", id, "count", count)
	c.answer(w, disconnectReport{Found: count > 0, Count: count})
}

// drainReport is the answer to POST /drain.
type drainReport struct {
	Serving int `json:"serving"` // connections that are waited for
}

func (c *control) drain(w http.ResponseWriter, _ *http.Request) {
	c.service.drain()
	c.answer(w, drainReport{c.service.server.Serving()})
}

// undrainReport is the answer to POST /undrain.
type undrainReport struct {
	Changed bool   `json:"changed"`         // the service drained, and does not any more
	Error   string `json:"error,omitempty"` // why it goes on draining
}

func (c *control) undrain(w http.ResponseWriter, _ *http.Request) {
	changed, err := c.service.undrain()
	report := undrainReport{Changed: changed}
	if err != nil {
		report.Error = err.Error()
	}
	c.answer(w, report)
}

func (c *control) answer(w http.ResponseWriter, report any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(report); err != nil {
		c.log.Debug("cannot answer on the control socket", "err", err)
	}
}

// askService sends a request to the service whose control socket is at path and
// decodes its answer.
func askService(ctx context.Context, path, method, target string, answer any) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+target, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("the running service does not answer on its control socket: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the running service answers %s", resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return err
	}
	return json.Unmarshal(body, answer)
}
