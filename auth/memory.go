package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"sync"
	"time"

	"xapi-nbd/xapi"
)

// Results are remembered for a short time. A rejected session is rejected again without a
// call for rejectedFor: refs are random, so an unknown one does not become valid later,
// and a xapi that was starting has started by then. An accepted session is checked each
// time, but has priority in the queue for acceptedFor.
const (
	rejectedFor = 3 * time.Second
	acceptedFor = 10 * time.Minute
	maxRejected = 4096
	maxAccepted = 1024
)

// memory remembers sessions for a short time, by digests with a key that never
// leaves the process. It is safe for concurrent use.
type memory struct {
	key [sha256.Size]byte

	mu       sync.Mutex // guards the fields below
	rejected map[digest]rejectedSession
	accepted map[digest]time.Time // expiry
}

// digest stands for a session ref, which is a secret.
type digest [sha256.Size]byte

type rejectedSession struct {
	err   error
	until time.Time
}

func newMemory() *memory {
	m := &memory{rejected: make(map[digest]rejectedSession), accepted: make(map[digest]time.Time)}
	rand.Read(m.key[:]) // never fails
	return m
}

func (m *memory) digest(ref xapi.SessionRef) (d digest) {
	h := hmac.New(sha256.New, m.key[:])
	h.Write([]byte(ref))
	h.Sum(d[:0])
	return d
}

// rejection returns the error with which xapi rejected the session less than rejectedFor
// ago, or nil.
func (m *memory) rejection(d digest) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.rejected[d]; time.Now().Before(r.until) {
		return r.err
	}
	return nil
}

// wasAccepted reports whether xapi accepted the session less than acceptedFor ago.
func (m *memory) wasAccepted(d digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Before(m.accepted[d])
}

// reject remembers that xapi has rejected the session, unless maxRejected are remembered.
func (m *memory) reject(d digest, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.accepted, d)
	now := time.Now()
	if len(m.rejected) >= maxRejected {
		for d, r := range m.rejected {
			if !now.Before(r.until) {
				delete(m.rejected, d)
			}
		}
	}
	if len(m.rejected) < maxRejected {
		m.rejected[d] = rejectedSession{err, now.Add(rejectedFor)}
	}
}

// accept remembers that xapi has accepted the session. With maxAccepted remembered it
// forgets another one.
func (m *memory) accept(d digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.accepted[d] = time.Now().Add(acceptedFor)
	for other, until := range m.accepted {
		if len(m.accepted) <= maxAccepted {
			return
		}
		if other != d || !time.Now().Before(until) {
			delete(m.accepted, other)
		}
	}
}
