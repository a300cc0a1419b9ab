package nbd

import "sync/atomic"

// position is where a connection reads or writes: the offset in bytes after its last
// READ or WRITE. Requests are served concurrently, so their order may change by a little;
// one that ends less than maxDisorder before the position does not move it back.
// Its methods may be called concurrently.
type position struct{ end atomic.Int64 }

// maxDisorder is how far apart requests of one connection may be served that its
// peer sent one after the other, in bytes: 32 of 2 MiB, as Xen Orchestra sends them.
// On small disks it is a sixteenth of the size, so that a peer which reads the last
// sectors first, for a partition table, is seen to begin at the start then.
const maxDisorder = 64 << 20

// moveTo records that a request was served that ends at end, of a device with size bytes.
func (p *position) moveTo(end, size int64) {
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

// countWritten counts n bytes at off that were written for the peer.
func (t *transmission) countWritten(off, n int64) {
	t.stats.bytes.Add(n)
	t.stats.written.Add(n)
	t.stats.position.moveTo(off+n, int64(t.sess.info.Size))
}
