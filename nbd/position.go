package nbd

import "sync/atomic"

// readPosition is where a connection reads: the offset in bytes after its last
// READ. Requests are served concurrently, so their order may change by a little; a
// READ that ends less than maxDisorder before the position does not move it back.
// Its methods may be called concurrently.
type readPosition struct{ end atomic.Int64 }

// maxDisorder is how far apart requests of one connection may be served that its
// peer sent one after the other, in bytes: 32 of 2 MiB, as Xen Orchestra sends them.
// On small disks it is a sixteenth of the size, so that a peer which reads the last
// sectors first, for a partition table, is seen to begin at the start then.
const maxDisorder = 64 << 20

// moveTo records that a READ was served that ends at end, of a device with size bytes.
func (p *readPosition) moveTo(end, size int64) {
	for {
		now := p.end.Load()
		if end <= now && end >= now-min(maxDisorder, size/16) || p.end.CompareAndSwap(now, end) {
			return
		}
	}
}

// countRead counts n bytes at off that were read for the peer.
func (t *transmission) countRead(off, n int64) {
	t.stats.bytes.Add(n)
	t.stats.position.moveTo(off+n, int64(t.sess.info.Size))
}
