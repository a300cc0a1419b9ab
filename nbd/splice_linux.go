package nbd

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// splicer sends replies whose data goes from a file to a socket without passing
// through this process. The pipes are filled before the header leaves, so that
// an I/O error is still an errno.
//
// fill may be called concurrently; send belongs to replyWriter's lock.
type splicer struct {
	file   int // descriptor that the device keeps open
	taken  func(off, n int64) error
	socket syscall.RawConn

	// What send is sending.
	header []byte
	data   *pipeline
	err    error
	step   func(fd uintptr) bool // s.send1, made once
}

// newSplicer returns nil where splicing does not apply: TLS has to see the
// bytes, and not every connection is a socket.
func newSplicer(c *conn, can capabilities) *splicer {
	if can.file == nil || c.peer.TLS != nil {
		return nil
	}
	var socket syscall.RawConn
	var err error
	switch nc := c.raw.(type) {
	case *net.TCPConn:
		socket, err = nc.SyscallConn()
	case *net.UnixConn:
		socket, err = nc.SyscallConn()
	default:
		return nil
	}
	if err != nil {
		return nil
	}
	s := &splicer{file: int(can.file.File().Fd()), taken: can.file.Taken, socket: socket}
	s.step = s.send1
	return s
}

// spliceMin is the shortest read that is spliced: below it a copy costs less
// than the additional system call.
const spliceMin = 32 << 10

// fill reads n bytes at off into l.
func (s *splicer) fill(l *pipeline, off int64, n int) error {
	if err := l.fill(s.file, off, n); err != nil {
		return err
	}
	if err := s.taken(off, int64(n)); err != nil {
		l.release()
		return err
	}
	return nil
}

// send sends header and data, within the write deadline of the connection.
func (s *splicer) send(header []byte, data *pipeline) error {
	s.header, s.data, s.err = header, data, nil
	err := s.socket.Write(s.step)
	s.header, s.data = nil, nil
	if err == nil {
		err = s.err
	}
	return err
}

// send1 sends what the socket takes; false means to wait until it takes more.
func (s *splicer) send1(fd uintptr) bool {
	for len(s.header) > 0 {
		n, err := unix.SendmsgN(int(fd), s.header, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL)
		if !s.progress("sendmsg", err) {
			return err != unix.EAGAIN
		}
		s.header = s.header[max(n, 0):]
	}
	for i, p := range s.data.pipes {
		flags := unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
		if i < len(s.data.pipes)-1 {
			flags |= unix.SPLICE_F_MORE
		}
		for p.n > 0 {
			n, err := unix.Splice(p.r, nil, int(fd), nil, p.n, flags)
			if !s.progress("splice", err) {
				return err != unix.EAGAIN
			}
			p.n -= int(max(n, 0))
		}
	}
	return true
}

// progress reports whether to go on: with EAGAIN not now, with another error
// not any more.
func (s *splicer) progress(call string, err error) bool {
	switch {
	case err == nil, errors.Is(err, unix.EINTR):
		return true
	case !errors.Is(err, unix.EAGAIN):
		s.err = os.NewSyscallError(call, err)
	}
	return false
}
