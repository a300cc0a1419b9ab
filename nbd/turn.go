package nbd

import (
	"sync"
	"sync/atomic"
	"time"
)

// turn is whose turn it is to read the requests of a connection. Usually that is
// one goroutine, which also serves what it reads, without a hand-over: on a
// device that answers at once nothing is faster or cheaper. While it waits for
// the device or for the peer it can be relieved: then another goroutine reads
// on, so that no request waits for the answer to another one.
type turn struct {
	// away is 0 while the reader reads, else what it does instead: the number of
	// that, and in the lowest bit whether the device may be to blame for the time
	// it takes. Whoever sets it back to 0 has the turn.
	away      atomic.Uint64
	last      uint64 // number of what the reader did last; owned by whoever has the turn
	slowReads int    // since the device was tried last; owned by whoever has the turn
	seen      uint64 // what the relief saw the last time; owned by it

	// slow: the device is not what it takes to serve without a hand-over, so each
	// request gets a goroutine of its own until a run of them were fast. Of a file
	// it only says that such goroutines want a processor while the reader waits.
	slow atomic.Bool
	fast atomic.Int32 // how long that run is
}

// doing is what a reader does when it does not read.
type doing uint64

const (
	sending  doing = 0
	fetching doing = 1 // from the device
)

// begin begins something for which the reader can be relieved.
func (t *turn) begin(what doing) uint64 {
	t.last++
	n := t.last<<1 | uint64(what)
	t.away.Store(n)
	return n
}

// end ends it and reports whether the turn is still the caller's.
func (t *turn) end(n uint64) bool { return t.away.CompareAndSwap(n, 0) }

const (
	// reliefEvery is how long a reader may be away, roughly, before it is
	// relieved: much more than memory takes, less than most storage.
	reliefEvery = time.Millisecond
	// fastEnough is what a read may take for the device to count as fast again.
	fastEnough = 300 * time.Microsecond
	// fastRun is how many reads in a row must be so.
	fastRun = 64
	// retryEvery is after how many reads a slow device is tried again in any case:
	// on a busy machine even a fast one looks slow to who serves many at a time.
	retryEvery = 1024
	// reliefRests is how many looks without any request let the relief go home.
	reliefRests = 20
)

// isSlow reports whether the next read should get a goroutine of its own. Only
// for whoever has the turn.
func (t *turn) isSlow() bool {
	if !t.slow.Load() {
		t.slowReads = 0
		return false
	}
	if t.slowReads++; t.slowReads%retryEvery == 0 {
		t.slow.Store(false) // if it is slow still, the relief will say so
		return false
	}
	return true
}

// note puts down how long a read took while the device counted as slow.
func (t *turn) note(took time.Duration) {
	if took > fastEnough {
		t.fast.Store(0)
	} else if t.fast.Add(1) >= fastRun {
		t.fast.Store(0)
		t.slow.Store(false)
	}
}

// relief relieves readers that do not come back, for all connections of a
// server. Its goroutine looks around every millisecond, but only while there
// are requests.
type relief struct {
	busy atomic.Bool // a reader went away since the last look

	mu            sync.Mutex // guards all below
	transmissions map[*transmission]struct{}
	stop          chan struct{} // ends the goroutine that looks; nil while there is none
}

func (r *relief) add(t *transmission) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.transmissions == nil {
		r.transmissions = make(map[*transmission]struct{})
	}
	r.transmissions[t] = struct{}{}
}

// remove ends the looking after t: when it has returned t is not relieved. It
// reports whether nobody is left to look after.
func (r *relief) remove(t *transmission) (last bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.transmissions, t)
	if len(r.transmissions) > 0 {
		return false
	}
	r.goHome()
	return true
}

// wake makes sure that somebody looks.
func (r *relief) wake() {
	if r.busy.Load() {
		return
	}
	r.busy.Store(true)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stop == nil {
		r.stop = make(chan struct{})
		go r.run(r.stop)
	}
}

// goHome ends the looking; r.mu is held.
func (r *relief) goHome() {
	if r.stop != nil {
		close(r.stop)
		r.stop = nil
		r.busy.Store(false) // so that the next request wakes somebody
	}
}

func (r *relief) run(stop <-chan struct{}) {
	tick := time.NewTicker(reliefEvery)
	defer tick.Stop()
	rests := 0
	for {
		select {
		case <-tick.C:
			rests = r.look(stop, rests)
		case <-stop:
			return
		}
	}
}

// look relieves who was away for the same thing at the last look, and
// returns how many looks in a row there was nothing to look at. Enough of them
// end the looking.
func (r *relief) look(stop <-chan struct{}, rests int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stop == nil || (<-chan struct{})(r.stop) != stop {
		return 0 // it is not ours to look any more
	}
	active := r.busy.Swap(false)
	for t := range r.transmissions {
		n := t.turn.away.Load()
		active = active || n != 0
		if n == 0 || n != t.turn.seen {
			t.turn.seen = n
			continue
		}
		if t.turn.end(n) { // it is ours to give now
			if doing(n&1) == fetching {
				t.turn.slow.Store(true)
			}
			go t.readOn() // ends with the connection, or relieved itself
		}
	}
	switch {
	case active:
		return 0
	case rests+1 >= reliefRests:
		r.goHome()
	}
	return rests + 1
}
