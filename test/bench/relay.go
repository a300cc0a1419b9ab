package main

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// relay stands for distance: a proxy on loopback that passes every byte on a
// fixed time after it came, each way, and does not limit how much is under way.
// It ends the connections of both sides, so what TCP makes of distance (windows,
// slow start) is not in it; what a protocol makes of it, by waiting for replies,
// is.
type relay struct {
	listener net.Listener
	to       string
	delay    time.Duration

	mu     sync.Mutex
	conns  map[net.Conn]struct{} // both sides; nil once closed
	active sync.WaitGroup
}

// startRelay relays to an address until close.
func startRelay(to string, delay time.Duration) (*relay, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l, to: to, delay: delay, conns: map[net.Conn]struct{}{}}
	r.active.Go(r.accept) // until close
	return r, nil
}

func (r *relay) addr() string { return r.listener.Addr().String() }

// close ends all connections and waits until nothing runs.
func (r *relay) close() {
	r.listener.Close()
	r.mu.Lock()
	for c := range r.conns {
		c.Close()
	}
	r.conns = nil
	r.mu.Unlock()
	r.active.Wait()
}

func (r *relay) accept() {
	for {
		near, err := r.listener.Accept()
		if err != nil {
			return // closed
		}
		r.active.Go(func() { r.serve(near) }) // until either side ends, or close
	}
}

func (r *relay) serve(near net.Conn) {
	defer near.Close()
	far, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer far.Close()
	if !r.add(near, far) {
		return
	}
	defer r.remove(near, far)
	relayBoth(near, far, r.delay)
}

// add keeps connections to be closed by close; false after it.
func (r *relay) add(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		return false
	}
	for _, c := range conns {
		r.conns[c] = struct{}{}
	}
	return true
}

func (r *relay) remove(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		delete(r.conns, c)
	}
}

// relayBoth passes on what comes, both ways, until both have ended.
func relayBoth(a, b net.Conn, delay time.Duration) {
	var ways sync.WaitGroup
	ways.Go(func() { relayOneWay(a, b, delay) })
	relayOneWay(b, a, delay)
	ways.Wait()
}

// relayOneWay passes on what comes from one side, and its end. A failure ends
// both connections, and so the other way too.
func relayOneWay(from, to net.Conn, delay time.Duration) {
	q := newQueue()
	var reader sync.WaitGroup
	reader.Go(func() { receive(from, q, delay) }) // until from ends
	if err := send(to, q); err != nil {
		from.Close()
		to.Close()
	}
	reader.Wait()
}

// chunk is what was read at once, and when it is to be passed on.
type chunk struct {
	buf  *[]byte // of chunkBuffers; nil for the end
	n    int
	due  time.Time
	fail bool // an end that is none of the protocol's
}

// chunkBuffers are large: the relay must not be what limits.
var chunkBuffers = sync.Pool{New: func() any {
	p := make([]byte, 256*kib)
	return &p
}}

// receive reads until the connection ends, which it queues as well.
func receive(from net.Conn, q *queue, delay time.Duration) {
	for {
		buf := chunkBuffers.Get().(*[]byte)
		n, err := from.Read(*buf)
		due := time.Now().Add(delay)
		if n > 0 {
			q.put(chunk{buf: buf, n: n, due: due})
		} else {
			chunkBuffers.Put(buf)
		}
		if err != nil {
			q.put(chunk{due: due, fail: !errors.Is(err, io.EOF)})
			return
		}
	}
}

// send writes each chunk when it is due, until the end.
func send(to net.Conn, q *queue) error {
	for {
		c := q.take()
		if wait := time.Until(c.due); wait > 0 {
			time.Sleep(wait)
		}
		switch {
		case c.fail:
			return net.ErrClosed
		case c.buf == nil:
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				return half.CloseWrite()
			}
			return to.Close()
		}
		_, err := to.Write((*c.buf)[:c.n])
		chunkBuffers.Put(c.buf)
		if err != nil {
			return err
		}
	}
}

// queue has no limit: what is under way is limited by what clients have in
// flight.
type queue struct {
	mu     sync.Mutex
	filled *sync.Cond
	chunks []chunk
}

func newQueue() *queue {
	q := &queue{}
	q.filled = sync.NewCond(&q.mu)
	return q
}

func (q *queue) put(c chunk) {
	q.mu.Lock()
	q.chunks = append(q.chunks, c)
	q.mu.Unlock()
	q.filled.Signal()
}

// take waits for the next chunk.
func (q *queue) take() chunk {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.chunks) == 0 {
		q.filled.Wait()
	}
	c := q.chunks[0]
	q.chunks = q.chunks[1:]
	return c
}
