package nbd

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a connection that Go's scheduler sees little of. On two cores the
// scheduler's help costs up to a third of the server's CPU time:
//
//   - A system call that lasts longer than 20 µs, as most of ours do, has its
//     processor taken away and given to another thread. These calls never wait,
//     so they do not say that they are system calls (see sysnow_linux.go).
//   - A descriptor that Go's poller knows wakes a thread for each segment that
//     comes and for each that is acknowledged, whether anybody waits for it or
//     not. So busy connections wait by themselves; the poller is for those that
//     have nothing to do (see descriptor).
//
// It may be read by one goroutine and written by another; deadlines and the end
// are anybody's.
type socket struct {
	descriptor
	local, remote net.Addr

	// Of whoever writes.
	out  []unix.Iovec
	room [maxReadParts]unix.Iovec
}

// newSocket takes a connection over; nil if it is no stream socket, or if there
// is no descriptor to be had: then it still works, as it is.
func newSocket(nc net.Conn) *socket {
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn:
	default:
		return nil
	}
	s := &socket{local: nc.LocalAddr(), remote: nc.RemoteAddr()}
	if s.begin(nc.(pollable)) != nil {
		return nil
	}
	return s
}

// LocalAddr implements net.Conn.
func (s *socket) LocalAddr() net.Addr { return s.local }

// RemoteAddr implements net.Conn.
func (s *socket) RemoteAddr() net.Addr { return s.remote }

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n := 0
	err := s.transfer(&s.reading, func(fd int) (errno syscall.Errno) {
		n, errno = readNow(fd, p)
		return errno
	})
	switch {
	case err != nil:
		return 0, s.opError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) {
	if err := s.writeAll(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeAll writes pieces one after the other, at most maxReadParts of them.
func (s *socket) writeAll(pieces ...[]byte) error {
	s.out = s.room[:0]
	for _, p := range pieces {
		if len(p) > 0 {
			v := unix.Iovec{Base: &p[0]}
			v.SetLen(len(p))
			s.out = append(s.out, v)
		}
	}
	err := s.send(s.write)
	clear(s.room[:len(pieces)]) // they belong to others again
	return err
}

// send runs step, which sends, again and again, waiting for the peer in between
// as it has to.
func (s *socket) send(step func(fd int) syscall.Errno) error {
	if err := s.transfer(&s.writing, step); err != nil {
		return s.opError("write", err)
	}
	return nil
}

// write writes what the socket takes.
func (s *socket) write(fd int) syscall.Errno {
	for len(s.out) > 0 {
		n, errno := writevNow(fd, s.out)
		if errno != 0 {
			return errno
		}
		s.advance(n)
	}
	return 0
}

// advance takes n bytes that were written off what is to be written.
func (s *socket) advance(n int) {
	for n > 0 {
		v := &s.out[0]
		m := min(n, int(v.Len))
		if n -= m; m == int(v.Len) {
			s.out = s.out[1:]
			continue
		}
		v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), m))
		v.SetLen(int(v.Len) - m)
	}
}

// opError is err as package net would have said it.
func (s *socket) opError(what string, err error) error {
	return &net.OpError{Op: what, Net: s.remote.Network(), Source: s.local, Addr: s.remote, Err: err}
}
