package nbd

import (
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
	socket *socket

	// What send is sending.
	header []byte
	data   *pipeline
	step   func(fd int) syscall.Errno // s.send1, made once
}

// newSplicer returns nil where splicing does not apply: TLS has to see the
// bytes, and not every connection is a socket.
func newSplicer(c *conn, can capabilities) *splicer {
	if can.file == nil || c.peer.TLS != nil || c.socket == nil {
		return nil
	}
	s := &splicer{file: int(can.file.File().Fd()), taken: can.file.Taken, socket: c.socket}
	s.step = s.send1
	return s
}

// spliceMin is the shortest read that is spliced. Clients on this machine pay for
// spliced pages: they copy from the beginning of a page to memory of malloc(3),
// which begins 16 bytes after that of one, and that is slow (see payloadPlace).
const spliceMin = 128 << 10

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

// send sends header and data.
func (s *splicer) send(header []byte, data *pipeline) error {
	s.header, s.data = header, data
	err := s.socket.send(s.step)
	s.header, s.data = nil, nil
	return err
}

// send1 sends what the socket takes.
func (s *splicer) send1(fd int) syscall.Errno {
	for len(s.header) > 0 {
		n, errno := sendNow(fd, s.header, unix.MSG_MORE|unix.MSG_NOSIGNAL)
		if errno != 0 {
			return errno
		}
		s.header = s.header[n:]
	}
	for i, p := range s.data.pipes {
		flags := unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
		if i < len(s.data.pipes)-1 {
			flags |= unix.SPLICE_F_MORE
		}
		for p.n > 0 {
			n, errno := spliceNow(p.r, fd, p.n, flags)
			if errno != 0 {
				return errno
			}
			p.n -= n
		}
	}
	return 0
}
