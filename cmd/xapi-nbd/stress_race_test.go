//go:build race

package main

// stressMemory is empty, as the memory of the race detector would be measured.
type stressMemory struct{}

func (stressMemory) String() string { return "memory is not measured" }

func (w *world) startStress(more ...string) (*process, func() stressMemory) {
	return w.start(more...), func() stressMemory { return stressMemory{} }
}

func (stressMemory) wantFlat(*stress, stressMemory) {}
