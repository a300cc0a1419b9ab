package zerocopy

import (
	"errors"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sender sends the data in Pipes to a socket. It must not be used concurrently.
type Sender struct {
	socket syscall.RawConn
	step   func(fd uintptr) (done bool) // sendSome; made once, because a method value allocates

	// The state of one Send.
	header []byte
	data   *Pipes
	err    error
}

// NewSender returns nil if the connection is not a socket.
func NewSender(nc net.Conn) *Sender {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil // the connection is closed; the next write fails
	}
	s := &Sender{socket: raw}
	s.step = s.sendSome
	return s
}

// Send sends a header and the data behind it. It waits until the socket has taken all of
// it, at most until the write deadline of the connection. After an error a part may have
// been sent, and a part may be left in the Pipes.
func (s *Sender) Send(header []byte, data *Pipes) error {
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
func (s *Sender) sendSome(fd uintptr) (done bool) {
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

func (s *Sender) sendHeader(fd int) error {
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

func (s *Sender) sendData(fd int) error {
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
