package main

import (
	"net"
	"sync"
	"testing"
	"time"
)

// gate is a network between clients and a service, which can stand still: it carries
// connections, and nothing passes while it is closed.
type gate struct {
	addr  string
	ended sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	open    *sync.Cond // wakes those who wait for a closed gate, or for refused
	to      string     // address of the service
	conns   map[net.Conn]struct{}
	left    int64         // bytes until it closes; negative if it does not
	closed  bool          // nothing passes
	reached chan struct{} // closed when the gate closes
	refused int           // connections that were attempted while it was closed
	over    bool          // the test has ended
}

// newGate listens until the end of the test. Nothing passes before lead.
func newGate(t *testing.T) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	g := &gate{addr: l.Addr().String(), conns: map[net.Conn]struct{}{}, left: -1}
	g.open = sync.NewCond(&g.mu)
	g.ended.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.ended.Go(func() { g.carry(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		g.mu.Lock()
		g.over, g.closed = true, false
		g.mu.Unlock()
		g.cut()
		g.ended.Wait()
	})
	return g
}

// lead makes the gate lead to the service at addr. Connections to another one stay.
func (g *gate) lead(addr string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.to = addr
}

// closeAfter closes the gate when it has carried n more bytes, and returns a channel that is
// closed then.
func (g *gate) closeAfter(n int64) (reached <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left, g.reached, g.refused = n, make(chan struct{}), 0
	return g.reached
}

// letPass opens the gate, and takes a closeAfter back that is not reached yet.
func (g *gate) letPass() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left, g.closed = -1, false
	g.open.Broadcast()
}

// cut ends all connections.
func (g *gate) cut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		c.Close()
	}
	g.open.Broadcast()
}

// waitRefused waits until clients have attempted n connections since closeAfter while the
// gate was closed.
func (g *gate) waitRefused(t *testing.T, n int) {
	t.Helper()
	late := false
	defer time.AfterFunc(patience, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		late = true
		g.open.Broadcast()
	}).Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.refused < n && !late {
		g.open.Wait()
	}
	if late {
		t.Errorf("%d connections were attempted while the network stood still, want %d", g.refused, n)
	}
}

// enter registers a connection and returns where it leads. It refuses one while the gate is
// closed.
func (g *gate) enter(c net.Conn) (to string, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.over {
		g.refused++
		g.open.Broadcast()
		return "", false
	}
	g.conns[c] = struct{}{}
	return g.to, true
}

func (g *gate) leave(c net.Conn) {
	c.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
}

func (g *gate) carry(client net.Conn) {
	defer g.leave(client)
	to, ok := g.enter(client)
	if !ok {
		return
	}
	service, err := net.Dial("tcp", to)
	if err != nil { // the client sees that its connection ends
		return
	}
	defer g.leave(service)
	if _, ok := g.enter(service); !ok {
		return
	}
	var answers sync.WaitGroup
	answers.Go(func() { g.pass(client, service) })
	g.pass(service, client)
	answers.Wait()
}

// pass carries one direction, and ends both when one side has ended.
func (g *gate) pass(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			g.wait(n)
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// wait counts n bytes and waits while the gate is closed.
func (g *gate) wait(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.left >= 0 {
		if g.left -= int64(n); g.left < 0 {
			g.closed = true
			close(g.reached)
		}
	}
	for g.closed {
		g.open.Wait()
	}
}
