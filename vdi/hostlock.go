package vdi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// hostLocks locks a host for one process at a time. It is an interface because tests with
// fake time cannot use sockets.
type hostLocks interface {
	// lock locks the host with that INSTALLATION_UUID, or returns a *LockedError at once.
	// Closing the result, or the end of the process, unlocks it.
	lock(ctx context.Context, installation string, holder lockHolder) (io.Closer, error)
	// adopt returns the lock of a host that an earlier process has passed to this one.
	adopt(file *os.File, holder lockHolder) (io.Closer, error)
}

// lockHolder describes the process that holds the lock of a host. That process sends it as
// JSON to every connection to the socket of the lock.
type lockHolder struct {
	PID      int    `json:"pid"`
	Owner    string `json:"owner"`
	StateDir string `json:"state_dir"`
}

// socketLocks implements hostLocks with Unix sockets in the abstract namespace. They need
// no folder that every instance may write to, and vanish when a process is killed. The
// names are local to a network namespace: between instances in different namespaces only
// the lock of the state folder works.
type socketLocks struct{}

func lockAddress(installation string) string { return "@xapi-nbd/" + installation }

// answerTimeout bounds the request to the process that holds a lock.
const answerTimeout = time.Second

func (socketLocks) lock(ctx context.Context, installation string, holder lockHolder) (io.Closer, error) {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", lockAddress(installation))
	if errors.Is(err, syscall.EADDRINUSE) {
		other := askHolder(ctx, installation)
		return nil, &LockedError{PID: other.PID, StateDir: other.StateDir, Installation: installation}
	}
	if err != nil {
		return nil, fmt.Errorf("lock of host %s: %w", installation, err)
	}
	return newHostLock(listener, holder)
}

func (socketLocks) adopt(file *os.File, holder lockHolder) (io.Closer, error) {
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("lock of the host: %w", err)
	}
	return newHostLock(listener, holder)
}

// newHostLock answers on a listener until the lock is closed.
func newHostLock(listener net.Listener, holder lockHolder) (*hostLock, error) {
	holder.PID = os.Getpid()
	answer, err := json.Marshal(holder)
	if err != nil {
		listener.Close()
		return nil, err
	}
	l := &hostLock{listener: listener}
	l.answering.Go(func() { l.answer(answer) })
	return l, nil
}

// hostLock is a lock that is held.
type hostLock struct {
	listener  net.Listener
	answering sync.WaitGroup
}

// answer sends text, the lockHolder, to each connection until the listener is closed.
func (l *hostLock) answer(text []byte) {
	for {
		c, err := l.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(answerTimeout) // out of descriptors
			continue
		}
		// The text fits into the buffer of any socket, so a peer cannot block the write.
		_ = c.SetDeadline(time.Now().Add(answerTimeout))
		_, _ = c.Write(text)
		c.Close()
	}
}

func (l *hostLock) Close() error {
	err := l.listener.Close()
	l.answering.Wait()
	return err
}

// askHolder asks the process that holds the lock of a host for its lockHolder. It returns
// the zero value if there is no response within answerTimeout.
func askHolder(ctx context.Context, installation string) (holder lockHolder) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", lockAddress(installation))
	if err != nil {
		return holder
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(answerTimeout))
	_ = json.NewDecoder(io.LimitReader(c, 64<<10)).Decode(&holder)
	return holder
}

// holdHost locks this host unless it is locked already. It is called each time the
// inventory was read, because the file may have been unreadable before.
func (m *Manager) holdHost(ctx context.Context, h Host) error {
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	if m.passed || m.hostLock != nil && m.lockedHost == h.Installation {
		return nil
	}
	holder := lockHolder{Owner: m.owner, StateDir: m.cfg.StateDir}
	var lock io.Closer
	var err error
	if l := m.inherited; l != nil && l.Host != nil && l.Installation == h.Installation {
		lock, err = m.locks.adopt(l.Host, holder)
	} else {
		lock, err = m.locks.lock(ctx, h.Installation, holder)
	}
	if err != nil {
		return err
	}
	if m.hostLock != nil { // the host has got another uuid
		m.hostLock.Close()
	}
	m.hostLock, m.lockedHost = lock, h.Installation
	_ = m.closeInherited() // the lock is held as another descriptor, or not needed
	return nil
}

// releaseHost unlocks this host, also if its lock was inherited and never used.
func (m *Manager) releaseHost() {
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	if m.hostLock != nil {
		m.hostLock.Close()
		m.hostLock = nil
	}
	_ = m.closeInherited()
}

// closeInherited closes the lock of the host that an earlier process has passed, if it was not
// done before. m.hostMu is held.
func (m *Manager) closeInherited() error {
	inherited := m.inherited
	m.inherited = nil
	if inherited == nil || inherited.Host == nil {
		return nil
	}
	return inherited.Host.Close()
}
