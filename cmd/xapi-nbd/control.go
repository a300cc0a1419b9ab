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
	"syscall"
	"time"

	"xapi-nbd/vdi"
)

// controlName is the control socket's name in the state folder.
const controlName = "control"

// control answers the other commands of this program on behalf of the running
// service: HTTP on a unix socket that only its owner, root, may use.
type control struct {
	path  string
	disks *vdi.Manager
	log   *slog.Logger
}

// newControl makes the control; serve runs it.
func newControl(path string, disks *vdi.Manager, log *slog.Logger) *control {
	return &control{path: path, disks: disks, log: log}
}

// serve answers until ctx ends. Without a control socket there is still a
// service, so whatever is wrong with it is only logged.
func (c *control) serve(ctx context.Context) {
	l, err := c.listen(ctx)
	if err != nil {
		c.log.Warn("no control socket", "err", err)
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /recover", c.recover)
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		c.log.Warn("the control socket failed", "err", err)
	}
}

// listen makes the socket. One that is there already was left by a process that
// is gone: the lock of the state folder is ours.
func (c *control) listen(ctx context.Context) (net.Listener, error) {
	if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{}
	// Nobody else may connect between bind and chmod: the mask is the process's,
	// so it is restored at once.
	mask := syscall.Umask(0o177)
	l, err := lc.Listen(ctx, "unix", c.path)
	syscall.Umask(mask)
	return l, err
}

// cleanupReport is the answer to POST /recover.
type cleanupReport struct {
	vdi.Recovered
	Error string `json:",omitempty"`
}

func (c *control) recover(w http.ResponseWriter, r *http.Request) {
	c.log.Info("asked to clean up")
	result, err := c.disks.Recover(r.Context())
	report := cleanupReport{Recovered: result}
	if err != nil {
		report.Error = err.Error()
	}
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
