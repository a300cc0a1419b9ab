//go:build !race

package main

// stressMemory is the memory use of the service.
type stressMemory struct{ usage }

// startStress is start, and returns a function that reads the memory use after a garbage
// collection.
func (w *world) startStress(more ...string) (*process, func() stressMemory) {
	w.t.Helper()
	p, ask := w.startMeasured(more...)
	return p, func() stressMemory { return stressMemory{ask()} }
}

// wantFlat compares with an earlier idle phase.
func (m stressMemory) wantFlat(s *stress, before stressMemory) {
	s.t.Helper()
	const heapAllowed, rssAllowed = 4 << 20, 16 << 20
	if m.heap > before.heap+heapAllowed {
		s.t.Errorf("heap in use grew by %d bytes, at most %d allowed", m.heap-before.heap, heapAllowed)
	}
	if m.rss > before.rss+rssAllowed {
		s.t.Errorf("RSS grew by %d bytes, at most %d allowed", m.rss-before.rss, rssAllowed)
	}
}
