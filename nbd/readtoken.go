package nbd

import (
	"sync/atomic"
	"time"
)

// readToken is held by the one goroutine that reads the requests of a connection.
// That goroutine also serves READ requests, because on a fast device handing them to
// another goroutine takes longer than the read. While it is blocked in the device or in the
// socket, the stall monitor may take the token and start another reader, so that no request
// waits for the reply to another one.
type readToken struct {
	// blocked is 0 while the holder reads requests. Otherwise it identifies the
	// call that may block: a serial number, and the blockedIn in the lowest bit.
	// Setting it back to 0 takes or keeps the token.
	blocked atomic.Uint64

	serial    uint64 // of the last call that may block; owned by the holder
	slowReads int    // reads that got a goroutine since slow was set; owned by the holder
	seen      uint64 // value of blocked at the monitor's last look; owned by the monitor

	// pipelined is how many more reads from storage get a goroutine of their own because
	// the peer sent a request before it had received the reply to the one before; owned
	// by the holder.
	pipelined int

	// slow is true if reads of this device take so long that each gets a goroutine of its
	// own, until fastRun of them in a row were fast. Reads of a file whose page cache can
	// be probed get one only if they have to wait for storage.
	slow atomic.Bool
	fast atomic.Int32 // number of fast reads in a row
}

// blockedIn is the call in which the holder of the token may be blocked.
type blockedIn uint64

const (
	inSend  blockedIn = 0 // sending a reply
	inFetch blockedIn = 1 // reading the device
)

// begin marks the beginning of a call that may block, and returns its number.
func (t *readToken) begin(in blockedIn) uint64 {
	t.serial++
	n := t.serial<<1 | uint64(in)
	t.blocked.Store(n)
	return n
}

// end marks the end of that call, and reports whether the caller still holds the
// token.
func (t *readToken) end(n uint64) bool { return t.blocked.CompareAndSwap(n, 0) }

const (
	// fastRead is the longest time of a fast read.
	fastRead = 300 * time.Microsecond
	// fastRun is how many reads in a row must be fast before the device no longer counts
	// as slow.
	fastRun = 64
	// retryEvery is after how many reads the reader of requests reads a slow device
	// itself again: with many reads at a time even a fast device looks slow.
	retryEvery = 1024
	// pipelinedReads is the value of pipelined after the peer had several requests in
	// flight.
	pipelinedReads = 64
)

// isSlow reports whether the next read should get a goroutine of its own. Only
// the holder may call it.
func (t *readToken) isSlow() bool {
	if !t.slow.Load() {
		t.slowReads = 0
		return false
	}
	if t.slowReads++; t.slowReads%retryEvery == 0 {
		t.slow.Store(false) // the stall monitor sets it again if the device is slow
		return false
	}
	return true
}

// isPipelined reports whether the peer is expected to send further requests before it
// receives the reply to the present one. Only the holder may call it.
func (t *readToken) isPipelined() bool { return t.pipelined > 0 }

// noteStorageRead records that a read had to wait for storage, and whether the peer had
// sent a further request by then. Only the holder may call it.
func (t *readToken) noteStorageRead(further bool) {
	if further {
		t.pipelined = pipelinedReads
	} else if t.pipelined > 0 {
		t.pipelined--
	}
}

// note records how long a read took that had a goroutine of its own.
func (t *readToken) note(took time.Duration) {
	if took > fastRead {
		t.fast.Store(0)
	} else if t.fast.Add(1) >= fastRun {
		t.fast.Store(0)
		t.slow.Store(false)
	}
}
