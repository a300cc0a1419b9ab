//go:build !race

package main

import (
	"bufio"
	"os"
	"strconv"
	"strings"
)

// stormMemory is what the service has taken of the memory.
type stormMemory struct{ usage }

// startStorm is start, and how to ask the service, after a collection.
func (w *world) startStorm(more ...string) (*process, func() stormMemory) {
	w.t.Helper()
	questionsRead, questionsWrite, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	answersRead, answersWrite, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	w.childFiles = []*os.File{questionsRead, answersWrite}
	p := w.start(more...)
	questionsRead.Close()
	answersWrite.Close()
	w.t.Cleanup(func() { questionsWrite.Close(); answersRead.Close() })
	answers := bufio.NewReader(answersRead)
	return p, func() stormMemory {
		if _, err := questionsWrite.Write([]byte{'?'}); err != nil {
			w.t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			w.t.Fatal(err)
		}
		heap, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			w.t.Fatal(err)
		}
		return stormMemory{usage{heap: heap, rss: p.residentBytes(), descriptors: p.descriptors()}}
	}
}

// wantFlat compares with an earlier calm.
func (m stormMemory) wantFlat(s *storm, before stormMemory) {
	s.t.Helper()
	const heapAllowed, rssAllowed = 4 << 20, 16 << 20
	if m.heap > before.heap+heapAllowed {
		s.t.Errorf("heap in use grew by %d bytes, at most %d allowed", m.heap-before.heap, heapAllowed)
	}
	if m.rss > before.rss+rssAllowed {
		s.t.Errorf("RSS grew by %d bytes, at most %d allowed", m.rss-before.rss, rssAllowed)
	}
}
