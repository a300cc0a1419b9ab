package main

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// relay simulates the latency of a network: a proxy on loopback that sends every byte a
// fixed delay after its arrival, in both directions, at any rate. It terminates TCP on both
// sides, so the effects of latency on TCP (windows, slow start) are not simulated, only
// those on the protocol, which waits for replies.
type relay struct {
	listener net.Listener
	to       string
	delay    time.Duration
	sent     atomic.Int64    // bytes to the other end
	closed   context.Context // done once close is called
	cancel   context.CancelFunc
	active   sync.WaitGroup
}

// startRelay relays connections to an address until close.
func startRelay(to string, delay time.Duration) (*relay, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l, to: to, delay: delay}
	r.closed, r.cancel = context.WithCancel(context.Background())
	r.active.Go(r.accept) // until close
	return r, nil
}

func (r *relay) addr() string { return r.listener.Addr().String() }

// close closes all connections and waits for all goroutines.
func (r *relay) close() {
	r.cancel()
	r.listener.Close()
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
	far, err := (&net.Dialer{}).DialContext(r.closed, "tcp", r.to)
	if err != nil {
		return
	}
	defer far.Close()
	stop := context.AfterFunc(r.closed, func() {
		near.Close()
		far.Close()
	})
	defer stop()
	relayBoth(countedConn{near.(*net.TCPConn), &r.sent}, far, r.delay)
}

// countedConn counts the bytes that are read from a connection.
type countedConn struct {
	*net.TCPConn
	n *atomic.Int64
}

// Read implements net.Conn.
func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// relayBoth relays both directions until both have ended.
func relayBoth(a, b net.Conn, delay time.Duration) {
	var ways sync.WaitGroup
	ways.Go(func() { relayOneWay(a, b, delay) })
	relayOneWay(b, a, delay)
	ways.Wait()
}

// relayOneWay relays the bytes of one side and their end. A failure closes both
// connections, and so ends the other direction too.
func relayOneWay(from, to net.Conn, delay time.Duration) {
	chunks := make(chan chunk, maxChunks)
	var reader sync.WaitGroup
	reader.Go(func() { // until from ends, or its closing below
		receive(from, chunks, delay)
		close(chunks)
	})
	if err := send(to, chunks); err != nil {
		from.Close()
		to.Close()
		for range chunks { // so that the reader ends
		}
	}
	reader.Wait()
}

// maxChunks is more than clients ever have in flight, so the relay does not limit the rate.
const maxChunks = 1 << 16

// chunk is the result of one read, and the time at which it is to be sent.
type chunk struct {
	buf *[]byte // of chunkBuffers; nil at the end
	n   int
	due time.Time
	err error // of the read: io.EOF is an orderly end
}

var chunkBuffers = sync.Pool{New: func() any {
	p := make([]byte, 256*kib)
	return &p
}}

// receive reads until the connection ends.
func receive(from net.Conn, chunks chan<- chunk, delay time.Duration) {
	for {
		buf := chunkBuffers.Get().(*[]byte)
		n, err := from.Read(*buf)
		due := time.Now().Add(delay)
		if n > 0 {
			chunks <- chunk{buf: buf, n: n, due: due}
		} else {
			chunkBuffers.Put(buf)
		}
		if err != nil {
			chunks <- chunk{due: due, err: err}
			return
		}
	}
}

// send writes each chunk when it is due, until the end.
func send(to net.Conn, chunks <-chan chunk) error {
	for c := range chunks {
		if wait := time.Until(c.due); wait > 0 {
			time.Sleep(wait)
		}
		switch {
		case errors.Is(c.err, io.EOF):
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				return half.CloseWrite()
			}
			return to.Close()
		case c.err != nil:
			return c.err
		}
		_, err := to.Write((*c.buf)[:c.n])
		chunkBuffers.Put(c.buf)
		if err != nil {
			return err
		}
	}
	return nil
}
