package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/nbd/wire"
)

// notifyTimeout bounds a notification. After a crash of systemd its process stays, and takes no
// more notifications when its queue is full.
const notifyTimeout = time.Second

// notify sends a state to systemd, if systemd started this process. It does not matter if
// that fails.
func notify(state string) { _ = sendToSystemd(state, nil) }

// sendToSystemd sends a message, and a descriptor unless f is nil, if systemd started this
// process.
func sendToSystemd(message string, f *os.File) error {
	socket := &net.UnixAddr{Name: os.Getenv("NOTIFY_SOCKET"), Net: "unixgram"}
	if socket.Name == "" {
		return nil
	}
	conn, err := net.DialUnix(socket.Net, nil, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err == nil {
		err = conn.SetWriteDeadline(time.Now().Add(notifyTimeout))
	}
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		rights = syscall.UnixRights(int(f.Fd()))
	}
	werr := raw.Write(func(fd uintptr) bool {
		err = syscall.Sendmsg(int(fd), []byte(message), rights, nil, 0)
		return !errors.Is(err, syscall.EAGAIN)
	})
	return cmp.Or(werr, err)
}

// barrierTimeout bounds waitNotified.
const barrierTimeout = 5 * time.Second

// waitNotified waits until systemd has processed all notifications that this process has
// sent: it closes the descriptor that comes with BARRIER=1 then. A systemd that is too old
// for that message closes descriptors that it does not expect.
func waitNotified() {
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	defer r.Close()
	err = sendToSystemd("BARRIER=1", w)
	w.Close()
	if err == nil && r.SetReadDeadline(time.Now().Add(barrierTimeout)) == nil {
		_, _ = r.Read(make([]byte, 1)) // the end of the pipe
	}
}

// statusEvery is the time between updates of systemd's status text.
const statusEvery = 5 * time.Second

// keepNotifying sends systemd the status text, and notifies its watchdog, until ctx ends.
func (s *Service) keepNotifying(ctx context.Context) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	every := statusEvery
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn("no watchdog", "err", err)
	}
	if watchdog > 0 {
		every = min(every, watchdog/3) // so that one failed self-check does not end the process
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := ""
	for {
		if watchdog > 0 {
			s.tellWatchdog(ctx, every)
		}
		if text := s.statusText(); text != last {
			notify("STATUS=" + text)
			last = text
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// tellWatchdog notifies the watchdog of systemd if the self-check succeeds. Without
// notifications systemd ends this process and starts another one.
func (s *Service) tellWatchdog(ctx context.Context, within time.Duration) {
	err := s.answers(ctx, within)
	switch {
	case err == nil:
		notify(daemon.SdNotifyWatchdog)
	case ctx.Err() == nil:
		s.log.Error("self-check failed, watchdog not notified", "err", err)
	}
}

// answers is the self-check: attachments and connections can be listed, and every address
// sends the greeting.
func (s *Service) answers(ctx context.Context, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	done := make(chan error, 1)
	go func() { // ends with ctx, unless something is stuck for good
		s.disks.Status()
		s.server.Conns()
		for _, addr := range s.listening.addrs() {
			if err := s.greets(ctx, addr, within/4); err != nil {
				done <- fmt.Errorf("%s: %w", addr, err)
				return
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// greets connects, waits for the greeting and sends NBD_OPT_ABORT, which makes no call to
// xapi and no line in the log.
//
// A process that hangs still has a socket that accepts connections. If it cannot be
// connected to, a firewall is in between (dom0's covers loopback), so the server is given
// one end of a pipe instead.
func (s *Service) greets(ctx context.Context, addr net.Addr, patience time.Duration) error {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, addr.Network(), addr.String())
	if err != nil {
		var there net.Conn
		conn, there = net.Pipe()
		go func() { _ = s.server.ServeConn(ctx, there) }() // ends with conn
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var greeting [wire.GreetingLen]byte
	if _, err := io.ReadFull(conn, greeting[:]); err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	if _, err := wire.ParseGreeting(&greeting); err != nil {
		return err
	}
	abort := wire.AppendClientFlags(nil, wire.FlagCFixedNewstyle|wire.FlagCNoZeroes)
	if _, err := conn.Write(wire.AppendOption(abort, wire.OptAbort, nil)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, conn) // the reply to NBD_OPT_ABORT, and the end
	return err
}

// statusText returns the status text of systemd, which `systemctl status` shows.
func (s *Service) statusText() string {
	text := fmt.Sprintf("%s; connections: %d, attached VDIs: %d", s.state(), s.server.Serving(), len(s.disks.Status()))
	for _, r := range s.retries.report() {
		text += fmt.Sprintf("; cannot %s: %s", r.Action, r.LastError)
	}
	return text
}

// inheritedListeners are the sockets that systemd passed to this process.
func inheritedListeners() ([]*listener, error) {
	passed, err := listenaddr.Inherited()
	if err != nil {
		return nil, err
	}
	var ls []*listener
	for _, l := range passed {
		ls = append(ls, &listener{Listener: l, addr: l.Addr().String()})
	}
	return ls, nil
}
