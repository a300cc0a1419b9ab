package nbd

import (
	"slices"
	"sync/atomic"
	"time"
)

// readLatencyBounds are the upper bounds of the buckets of ReadLatency: from the time
// of a read from the page cache or a fast disk to that of storage that is about to
// fail. The bound itself belongs to the bucket.
var readLatencyBounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second,
	10 * time.Second, 30 * time.Second, time.Minute,
}

// latencyBuckets is the number of buckets: one for each bound, and one for reads that
// took longer than all of them.
const latencyBuckets = len(readLatencyBounds) + 1

// ReadLatencyBounds returns the upper bounds of the buckets of [ReadLatency] in
// ascending order. They are the same for all servers and never change.
func ReadLatencyBounds() []time.Duration { return slices.Clone(readLatencyBounds[:]) }

// ReadLatency is a histogram of the time from when a device was asked for the data of
// a READ until all of it was there or the device failed. It does not include the time
// that the peer took. A READ that is served in pieces counts once for each piece. Data
// that was found in the page cache counts as well, and so does a read that failed. A
// read that hangs counts when it ends; until then see [ConnStatus].ReadStall.
type ReadLatency struct {
	// Counts are the reads in each bucket. Counts[i] reads took no longer than
	// ReadLatencyBounds()[i], and longer than the bound before it. The last element
	// has no bound: it counts the reads that took longer than all bounds.
	Counts []int64
	Sum    time.Duration // of all reads
}

// latencySum is a ReadLatency inside the package: it can be copied and added up without
// allocating.
type latencySum struct {
	counts [latencyBuckets]int64
	sum    time.Duration
}

func (l *latencySum) add(other latencySum) {
	for i, n := range other.counts {
		l.counts[i] += n
	}
	l.sum += other.sum
}

func (l latencySum) export() ReadLatency {
	return ReadLatency{Counts: slices.Clone(l.counts[:]), Sum: l.sum}
}

// readTimer measures the reads of one connection's device. Its methods may be called
// concurrently.
type readTimer struct {
	base time.Time // all times below count from it

	underWay atomic.Int64 // reads that have begun and not ended
	progress atomic.Int64 // when the last one ended, or when the first of the running ones began

	counts [latencyBuckets]atomic.Int64
	sum    atomic.Int64
}

// begin marks the beginning of a read, and returns when that was. It has to be followed
// by end or cancel.
func (t *readTimer) begin() time.Duration {
	now := time.Since(t.base)
	// Before it counts: stalled must not take the time without any read for a stall.
	if t.underWay.Load() == 0 {
		t.progress.Store(int64(now))
	}
	t.underWay.Add(1)
	return now
}

// end counts a read that began at begin, and returns how long it took.
func (t *readTimer) end(begin time.Duration) (took time.Duration) {
	now := time.Since(t.base)
	took = now - begin
	t.counts[bucketOf(took)].Add(1)
	t.sum.Add(int64(took))
	t.progress.Store(int64(now))
	t.underWay.Add(-1)
	return took
}

// cancel takes back a begin: the data was not there without waiting, and the read will
// begin again elsewhere.
func (t *readTimer) cancel() { t.underWay.Add(-1) }

// stalled returns how long reads have been running without one of them ending, 0
// if none is running.
func (t *readTimer) stalled() time.Duration {
	if t.underWay.Load() == 0 {
		return 0
	}
	return time.Since(t.base) - time.Duration(t.progress.Load())
}

// now returns the counts so far.
func (t *readTimer) now() (l latencySum) {
	for i := range t.counts {
		l.counts[i] = t.counts[i].Load()
	}
	l.sum = time.Duration(t.sum.Load())
	return l
}

// bucketOf returns the index of the bucket that counts a duration.
func bucketOf(took time.Duration) int {
	for i, bound := range readLatencyBounds {
		if took <= bound {
			return i
		}
	}
	return len(readLatencyBounds)
}
