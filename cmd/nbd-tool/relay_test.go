package main

import (
	"io"
	"net"
	"sync"
	"testing"
)

// relay forwards connections to a server, and breaks them after a number of bytes.
type relay struct {
	l net.Listener

	mu    sync.Mutex // guards the fields below
	to    string     // address of the server; "" refuses
	cuts  []int64    // bytes in either direction after which the next connections break
	conns []net.Conn
	// refused is called when a connection is refused; it may be nil.
	refused func()
}

// startRelay relays to the server of a URI until the end of the test. It returns the URI to
// use in its place.
func startRelay(t *testing.T, to string, cuts ...int64) (r *relay, uri string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr, export := splitURI(t, to)
	r = &relay{l: l, to: addr, cuts: cuts}
	var active sync.WaitGroup
	active.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			active.Go(func() { r.forward(near) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.cutAll()
		active.Wait()
	})
	return r, "nbd://" + l.Addr().String() + "/" + export
}

// splitURI returns the address and the export of a URI.
func splitURI(t *testing.T, uri string) (addr, export string) {
	t.Helper()
	s, err := parseSide(uri, &secretInput{secrets: new(secrets)})
	if err != nil || s.uri == nil {
		t.Fatalf("%q: %v", uri, err)
	}
	return s.uri.Addr, s.uri.Export
}

// redirect makes further connections go to the server of another URI; "" refuses them. The
// existing ones end.
func (r *relay) redirect(t *testing.T, to string) {
	addr := ""
	if to != "" {
		addr, _ = splitURI(t, to)
	}
	r.mu.Lock()
	r.to = addr
	r.mu.Unlock()
	r.cutAll()
}

// cutAll ends the existing connections.
func (r *relay) cutAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// onRefusal sets a function that is called when a connection is refused.
func (r *relay) onRefusal(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused = f
}

func (r *relay) forward(near net.Conn) {
	defer near.Close()
	r.mu.Lock()
	to, limit := r.to, int64(1<<62)
	if len(r.cuts) > 0 {
		limit, r.cuts = r.cuts[0], r.cuts[1:]
	}
	r.mu.Unlock()
	if to == "" {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.refused != nil {
			r.refused()
		}
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer far.Close()
	r.mu.Lock()
	r.conns = append(r.conns, near, far)
	r.mu.Unlock()
	var ways sync.WaitGroup
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		ways.Go(func() {
			_, _ = io.CopyN(way[1], way[0], limit)
			near.Close()
			far.Close()
		})
	}
	ways.Wait()
}
