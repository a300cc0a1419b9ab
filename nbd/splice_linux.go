package nbd

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// splicer sends replies whose data goes from a file to a socket without passing
// through this process. The pipes are filled before the header is sent, so that
// an I/O error is still an errno.
//
// fill may be called concurrently; send belongs to the holder of replyWriter's lock.
type splicer struct {
	file   int // descriptor that the device keeps open
	verify func(off, n int64) error
	socket syscall.RawConn

	// What send is sending.
	header []byte
	data   *pipeline
	err    error
	step   func(fd uintptr) (done bool) // s.sendSome, made once
}

// newSplicer returns nil where splicing does not apply: TLS has to see the
// bytes, and not every connection is a socket.
func newSplicer(c *conn, can capabilities) *splicer {
	socket, ok := c.raw.(syscall.Conn)
	if can.file == nil || c.peer.TLS != nil || !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil // closed already; the next write tells
	}
	s := &splicer{file: int(can.file.File().Fd()), verify: can.file.Verify, socket: raw}
	s.step = s.sendSome
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
	if err := s.verify(off, int64(n)); err != nil {
		l.release()
		return err
	}
	return nil
}

// send sends header and data. It waits for the peer until the write deadline of the
// connection.
func (s *splicer) send(header []byte, data *pipeline) error {
	s.header, s.data, s.err = header, data, nil
	err := s.socket.Write(s.step)
	s.header, s.data = nil, nil
	if err != nil {
		return err
	}
	return s.err
}

// sendSome sends as much as the socket takes at present. It returns false if more
// remains to be sent when the socket is ready again.
func (s *splicer) sendSome(fd uintptr) (done bool) {
	call, err := "sendto", s.sendHeader(int(fd))
	if err == nil {
		call, err = "splice", s.sendData(int(fd))
	}
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	s.err = os.NewSyscallError(call, err) // nil if err is
	return true
}

func (s *splicer) sendHeader(fd int) error {
	for len(s.header) > 0 {
		// Not unix.SendmsgN, which allocates.
		n, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&s.header[0])), uintptr(len(s.header)),
			unix.MSG_MORE|unix.MSG_NOSIGNAL, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		s.header = s.header[n:]
	}
	return nil
}

func (s *splicer) sendData(fd int) error {
	for i, p := range s.data.pipes {
		flags := unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
		if i < len(s.data.pipes)-1 {
			flags |= unix.SPLICE_F_MORE
		}
		for p.n > 0 {
			n, err := unix.Splice(p.r, nil, fd, nil, p.n, flags)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			p.n -= int(n)
		}
	}
	return nil
}
