package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// notices prints events of connections. A notice with the same text as the last one is
// left out. The methods may be called concurrently.
type notices struct {
	w        io.Writer
	retryFor time.Duration

	mu sync.Mutex // guards w and the fields of all serverNotices
}

// print prints a message.
func (n *notices) print(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.printLocked(format, args...)
}

func (n *notices) printLocked(format string, args ...any) {
	fmt.Fprintf(n.w, "nbd-tool: "+format+"\n", args...)
}

// of returns the notices about one server.
func (n *notices) of(server string) *serverNotices { return &serverNotices{all: n, server: server} }

// serverNotices has notices for the connections to one server.
type serverNotices struct {
	all     *notices
	server  string
	missing int    // connections that are lost
	last    string // the text of the last failed attempt
}

// lost is called when a connection has been lost.
func (s *serverNotices) lost(err error) {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	if s.missing++; s.missing == 1 {
		s.last = ""
		s.all.printLocked("%s: %v; connecting again for up to %v", s.server, err, s.all.retryFor)
	}
}

// failed is called after an attempt to connect again has failed.
func (s *serverNotices) failed(err error) {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	if text := err.Error(); text != s.last {
		s.last = text
		s.all.printLocked("%s; trying again", text)
	}
}

// restored is called when a connection has been made again.
func (s *serverNotices) restored() {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	if s.missing--; s.missing == 0 {
		s.all.printLocked("%s: connected again", s.server)
	}
}
