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

// hostLocks gives the lock of a host to one process at a time. It is an interface
// so that tests in fake time need no sockets.
type hostLocks interface {
	// lock takes the lock of the host with that INSTALLATION_UUID, or returns a
	// *LockedError. Closing it, and the end of the process, give it back.
	lock(ctx context.Context, installation string, holder lockHolder) (io.Closer, error)
}

// lockHolder is what whoever holds the lock of a host says of itself.
type lockHolder struct {
	PID      int    `json:"pid"`
	Owner    string `json:"owner"`
	StateDir string `json:"state_dir"`
}

// socketLocks are sockets in the abstract namespace: they need no folder that all
// instances may write to, whatever their settings, and leave nothing behind when
// a process is killed. Their names are those of one network namespace: instances
// in different ones are kept apart by the lock of a state folder only.
type socketLocks struct{}

func lockAddress(installation string) string { return "@xapi-nbd/" + installation }

// answerTimeout bounds the question who holds a lock.
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

// answer tells everybody who asks who holds the lock.
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
		// Fits into the buffer of any socket, so nobody can keep us waiting.
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

// askHolder asks who holds a lock; what cannot be heard in time is empty.
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

// holdHost takes the lock of this host, unless it is held already. It is called
// whenever the inventory was read: it may not have been readable before.
func (m *Manager) holdHost(ctx context.Context, h host) error {
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	if m.hostLock != nil && m.lockedHost == h.installation {
		return nil
	}
	lock, err := m.locks.lock(ctx, h.installation, lockHolder{Owner: m.owner, StateDir: m.cfg.StateDir})
	if err != nil {
		return err
	}
	if m.hostLock != nil { // the host got another uuid
		m.hostLock.Close()
	}
	m.hostLock, m.lockedHost = lock, h.installation
	return nil
}

// releaseHost gives the lock back.
func (m *Manager) releaseHost() {
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	if m.hostLock != nil {
		m.hostLock.Close()
		m.hostLock = nil
	}
}
