package interop

import (
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"xapi-nbd/nbd/wire"
)

// atLimit is the action of a relay at its limit.
type atLimit int

const (
	hold   atLimit = iota // relays nothing more to a client until it disconnects
	cutOne                // ends the connection that reached the limit
	cutAll                // ends all connections
)

// relay relays connections to the service on loopback.
type relay struct {
	// old makes it answer every option except EXPORT_NAME and ABORT like a server without
	// it, so that clients fall back to EXPORT_NAME.
	old bool
	// limit is the number of bytes to all clients after which it acts as then says,
	// instead of relaying; 0 is none.
	limit int64
	then  atLimit
	// act is called, times times, after each further part of the bytes to all clients,
	// before they are relayed. nil: never.
	act   func()
	part  int64
	times int

	to      string
	addr    string
	reached chan struct{} // closed at the limit
	ended   sync.WaitGroup

	mu       sync.Mutex // guards the fields below, and limit and then
	carried  int64      // bytes to all clients
	acted    int        // calls of act
	accepted int
	conns    map[*relayed]struct{}
	closed   bool
}

// relayed is one connection through a relay.
type relayed struct {
	client, server net.Conn
	gone           chan struct{} // closed when the client has closed its end
}

// start listens until the end of the test.
func (r *relay) start(t *testing.T, to string) {
	t.Helper()
	r.to, r.reached, r.conns = to, make(chan struct{}), map[*relayed]struct{}{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	r.ended.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.ended.Go(func() { r.carry(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		r.closed = true
		r.closeAll()
		r.mu.Unlock()
		r.ended.Wait()
	})
}

// closeAll ends all connections; r.mu is held.
func (r *relay) closeAll() {
	for c := range r.conns {
		c.close()
	}
}

func (c *relayed) close() {
	c.client.Close()
	c.server.Close()
}

func (r *relay) carry(client net.Conn) {
	server, err := net.Dial("tcp", r.to)
	if err != nil {
		client.Close() // the client sees it, and its test
		return
	}
	c := &relayed{client, server, make(chan struct{})}
	defer c.close()
	r.mu.Lock()
	r.accepted++
	r.conns[c] = struct{}{}
	closed := r.closed
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.conns, c)
		r.mu.Unlock()
	}()
	if closed || r.old && haggle(client, server) != nil {
		return
	}
	var toServer sync.WaitGroup
	toServer.Go(func() {
		_, _ = io.Copy(server, client)
		close(c.gone)
		c.close()
	})
	r.toClient(c)
	c.close()
	toServer.Wait()
}

// toClient relays bytes of the service up to the limit.
func (r *relay) toClient(c *relayed) {
	buf := make([]byte, 64<<10)
	for {
		n, err := c.server.Read(buf)
		if n > 0 && r.stopsAt(c, n) {
			return
		}
		r.actAtParts()
		if _, writeErr := c.client.Write(buf[:n]); err != nil || writeErr != nil {
			return
		}
	}
}

// actAtParts calls act as often as the bytes counted so far ask for. Meanwhile nothing is
// relayed to any client.
func (r *relay) actAtParts() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.act != nil && r.acted < r.times && r.carried > int64(r.acted+1)*r.part {
		r.acted++
		r.act()
	}
}

// arm makes the next byte to a client the limit.
func (r *relay) arm(then atLimit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.limit, r.then = r.carried+1, then
}

// stopsAt counts n bytes for c and reports whether they must not be relayed: the limit is
// reached, and the action has been taken.
func (r *relay) stopsAt(c *relayed, n int) bool {
	r.mu.Lock()
	r.carried += int64(n)
	came := r.limit > 0 && r.carried >= r.limit
	first := came && r.carried-int64(n) < r.limit
	if first {
		close(r.reached)
	}
	if first && r.then == cutAll {
		r.closeAll()
	}
	holds := came && r.then == hold
	r.mu.Unlock()
	if holds {
		<-c.gone
	}
	return holds || first
}

// haggle is the option haggling of an old server in front of a new one, up to the option that
// ends it.
func haggle(client, server net.Conn) error {
	if _, err := io.CopyN(client, server, wire.GreetingLen); err != nil {
		return err
	}
	if _, err := io.CopyN(server, client, 4); err != nil { // the client's flags
		return err
	}
	for {
		var raw [wire.OptionHeaderLen]byte
		if _, err := io.ReadFull(client, raw[:]); err != nil {
			return err
		}
		h, err := wire.ParseOptionHeader(&raw)
		if err != nil {
			return err
		}
		if h.Length > 1<<16 {
			return fmt.Errorf("%v with %d bytes", h.Option, h.Length)
		}
		data := make([]byte, h.Length)
		if _, err := io.ReadFull(client, data); err != nil {
			return err
		}
		if h.Option == wire.OptExportName || h.Option == wire.OptAbort {
			_, err := server.Write(wire.AppendOption(nil, h.Option, data))
			return err
		}
		if _, err := client.Write(wire.AppendOptionReply(nil, h.Option, wire.RepErrUnsup, nil)); err != nil {
			return err
		}
	}
}

// count returns the number of accepted connections.
func (r *relay) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accepted
}
