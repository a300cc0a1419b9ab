package vdi

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"

	"xapi-nbd/internal/passfd"
)

// Locks are the locks of a state folder and of a host, to be passed to the process that
// takes the work over. They are open files: a lock is held until all processes that have it
// have closed it.
type Locks struct {
	State        *os.File
	Host         *os.File // nil if the host is not locked yet
	Installation string   // INSTALLATION_UUID of the locked host
}

// Close closes the files.
func (l *Locks) Close() error {
	var err error
	if l.Host != nil {
		err = l.Host.Close()
	}
	return errors.Join(l.State.Close(), err)
}

// errNotPassed is the error of Locks for locks that are no files of this host.
var errNotPassed = errors.New("the locks cannot be passed to another process")

// Locks returns copies of the locks of this manager. The caller closes them. It fails
// before Lock has succeeded.
func (m *Manager) Locks() (*Locks, error) {
	state, err := m.journal.lockFile()
	if err != nil {
		return nil, err
	}
	l := &Locks{State: state}
	if l.Host, l.Installation, err = m.hostLockFile(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// hostLockFile returns a copy of the lock of the host, also of one that an earlier process has
// passed and that is not in use yet; nil if there is none.
func (m *Manager) hostLockFile() (lock *os.File, installation string, err error) {
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	switch held := m.hostLock.(type) {
	case nil:
		if m.inherited == nil || m.inherited.Host == nil {
			return nil, "", nil
		}
		lock, err = passfd.Dup(m.inherited.Host)
		return lock, m.inherited.Installation, err
	case *hostLock:
		lock, err = passfd.Dup(held.listener.(*net.UnixListener))
		return lock, m.lockedHost, err
	}
	return nil, "", errNotPassed
}

// ReleaseLocks gives up the locks of the state folder and of the host, which another process
// has taken over. This manager keeps its attachments, its leftovers and its generation, and
// may still make attachments. KeepRecovering must have ended.
func (m *Manager) ReleaseLocks() error {
	err := m.journal.handOver()
	m.leaveToOthers()
	m.hostMu.Lock()
	defer m.hostMu.Unlock()
	if m.hostLock != nil {
		err = errors.Join(err, m.hostLock.Close())
	}
	m.hostLock, m.passed = nil, true
	return errors.Join(err, m.closeInherited())
}

// leaveToOthers gives up the leftovers of earlier processes. The process that has the locks
// finds them.
func (m *Manager) leaveToOthers() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leftovers = slices.DeleteFunc(m.leftovers, func(l *leftover) bool {
		if ownerOfNonce(l.nonce) == m.owner {
			return false
		}
		l.stop()
		l.signalChanged() // those who wait for the leftover look again
		return true
	})
}

// lockFile returns a copy of the lock of the state folder.
func (j *journal) lockFile() (*os.File, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch lock := j.lock.(type) {
	case nil:
		return nil, ErrNotLocked
	case *os.File:
		return passfd.Dup(lock)
	}
	return nil, errNotPassed
}

// closeInherited closes the lock of the state folder that an earlier process has passed, if open
// was not called since.
func (j *journal) closeInherited() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	lock := j.inherited
	j.inherited = nil
	if lock == nil {
		return nil
	}
	return lock.Close()
}

// handOver gives up the lock of the state folder; the journal goes on to work.
func (j *journal) handOver() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed || j.lock == nil {
		return nil
	}
	lock := j.lock
	j.lock = io.NopCloser(nil)
	return lock.Close()
}
