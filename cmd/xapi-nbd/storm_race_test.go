//go:build race

package main

// stormMemory is nothing: the race detector's own would be measured.
type stormMemory struct{}

func (stormMemory) String() string { return "memory is not measured" }

func (w *world) startStorm(more ...string) (*process, func() stormMemory) {
	return w.start(more...), func() stormMemory { return stormMemory{} }
}

func (stormMemory) wantFlat(*storm, stormMemory) {}
