package listenaddr

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Inherited returns the listeners of the sockets that systemd passed to this process
// (LISTEN_FDS, sd_listen_fds(3)), none if it passed none. It fails if a descriptor is not a
// stream socket that listens. The sockets are returned by the first call only. The caller
// closes the listeners; the files of unix sockets stay, as they belong to systemd.
func Inherited() ([]net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	for i, l := range passed {
		err := error(nil)
		if l == nil {
			err = fmt.Errorf("descriptor %d that systemd passed is no stream socket that listens", i+3)
		} else if tcp, ok := l.(*net.TCPListener); ok {
			err = setUserTimeout(tcp)
		}
		if err != nil {
			closeAll(passed)
			return nil, err
		}
	}
	return passed, nil
}

// closeAll closes those listeners that are not nil.
func closeAll(ls []net.Listener) {
	for _, l := range ls {
		if l != nil {
			l.Close()
		}
	}
}

// setUserTimeout sets TCP_USER_TIMEOUT on a socket that another process made, as Listen does
// on its own.
func setUserTimeout(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(UserTimeout.Milliseconds()))
	})
	if errors.Is(serr, unix.ENOPROTOOPT) || errors.Is(serr, unix.EOPNOTSUPP) {
		serr = nil // multipath TCP has no such thing
	}
	return errors.Join(err, os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", serr))
}
