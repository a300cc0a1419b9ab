package xapitest

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
)

// Stop makes the host unreachable: the socket is gone and its connections are
// dropped. Calls in progress continue. Sessions and VBDs are kept.
func (h *Host) Stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.listener != nil {
		_ = h.listener.Close()
		_ = os.Remove(h.Socket())
		h.listener = nil
	}
	h.dropConnections()
}

// Resume makes the host reachable again after Stop.
func (h *Host) Resume() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	if h.listener != nil {
		return nil
	}
	return h.listen()
}

// listen replaces the socket without a moment in which there is none. h.mu is held.
func (h *Host) listen() error {
	fresh := filepath.Join(h.cfg.Dir, "new") // not longer than the socket's name
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		if n := len(h.Socket()); n > 107 { // sun_path holds 108 bytes with the final zero
			return fmt.Errorf("the socket's path has %d bytes, more than a unix socket can have: %w", n, err)
		}
		return err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Rename(fresh, h.Socket()); err != nil {
		_ = l.Close()
		return err
	}
	if h.listener != nil {
		_ = h.listener.Close() // breaks the connections that were not accepted yet
	}
	h.listener = l
	h.wg.Go(func() { h.accept(l) })
	return nil
}

// Restart acts like a restart of xapi: all connections break and all
// sessions become invalid, while VBDs, their devices and storage operations
// in progress are kept. Other calls in progress are forgotten.
func (h *Host) Restart() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.restarts++
	clear(h.sessions)
	h.breakConnections()
	h.notify()
}

// DropConnections closes all connections. Sessions stay, and calls in progress go
// on; new connections are served at once.
func (h *Host) DropConnections() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.breakConnections()
}

// breakConnections breaks those as well that were not accepted yet, by listening
// anew. h.mu is held.
func (h *Host) breakConnections() {
	if h.listener != nil {
		if err := h.listen(); err != nil { // the old socket stays
			h.log.Error("replacing the socket of the simulated xapi", "err", err)
		}
	}
	h.dropConnections()
}

// dropConnections closes every connection; h.mu is held.
func (h *Host) dropConnections() {
	for c := range h.conns {
		_ = c.Close()
	}
	clear(h.conns)
}

// accept ends when Stop closes the listener.
func (h *Host) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		if h.listener != l { // stopped since
			h.mu.Unlock()
			_ = conn.Close()
			return
		}
		h.conns[conn] = struct{}{}
		h.wg.Go(func() { h.serve(conn) })
		h.mu.Unlock()
	}
}

// serve answers the requests of one connection, one at a time. It ends with the
// first error, with a request that asks for it, or when the host drops conn.
func (h *Host) serve(conn net.Conn) {
	defer func() {
		h.mu.Lock()
		delete(h.conns, conn)
		h.mu.Unlock()
		_ = conn.Close()
	}()
	br := bufio.NewReader(conn)
	for {
		req, reply, err := h.answer(br)
		if err != nil {
			reply = errorReply(req, err)
		}
		if _, werr := conn.Write(reply); werr != nil || err != nil || req.close {
			return
		}
	}
}

// answer reads one request and returns the whole reply. An error that is not
// an *httpError means to close without a word.
func (h *Host) answer(br *bufio.Reader) (*request, []byte, error) {
	req, err := readRequest(br)
	if err != nil {
		return req, nil, err
	}
	if err := req.route(); err != nil {
		return req, nil, err
	}
	body, err := req.readBody(br)
	if err != nil {
		return req, nil, err
	}
	method, params, err := parseCall(body)
	if err != nil {
		return req, nil, internalError("Xmlrpc.Parse_error: " + err.Error())
	}
	value, dispatched, err := h.dispatch(method, params)
	var f *failure
	switch {
	case err == nil:
		body = encodeSuccess(value)
	case errors.As(err, &f):
		body = encodeFailure(f)
	default:
		return req, nil, err
	}
	return req, append(replyHead(req, len(body), dispatched), body...), nil
}
