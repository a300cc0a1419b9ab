package copying

import "sync"

// chunkPool keeps the buffers of a copy for its verification, which would need as much
// memory again otherwise.
type chunkPool struct {
	mu   sync.Mutex
	free [][]byte
}

// take returns n buffers of chunkSize bytes each.
func (p *chunkPool) take(n int) [][]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	bufs := make([][]byte, n)
	for i := range bufs {
		if last := len(p.free) - 1; last >= 0 {
			bufs[i], p.free = p.free[last], p.free[:last]
		} else {
			bufs[i] = make([]byte, chunkSize)
		}
	}
	return bufs
}

func (p *chunkPool) put(bufs [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, bufs...)
}
