package nbd

import (
	"sync/atomic"

	"xapi-nbd/nbd/internal/zerocopy"
)

// Data that is spliced is not seen by the server, so the zeroes in it would be sent as
// they are. Samples of the page cache tell where zeroes are likely. Such a range is
// read to memory and looked at whole: a sample alone never makes a hole.
const (
	// sampleEvery is the distance of the samples, at multiples of it in the export. A
	// sample costs about half a microsecond, and a spliced piece of that length 20.
	sampleEvery = 64 << 10
	// sampleLen is the length of a sample in bytes.
	sampleLen = 16
	// zeroShare of a range, as a divisor, has to be zeroes for reading it to memory: that
	// takes up to twice the processor time of splicing it.
	zeroShare = 4
	// wrongSamples is how many reads are not sampled after samples were wrong, that is,
	// the range held fewer zeroes than that.
	wrongSamples = 32
)

// zeroSampler decides for one connection which reads are spliced, and which are read
// to memory because of the zeroes in them. Its methods may be called concurrently.
type zeroSampler struct {
	inZeroes atomic.Bool  // the last read to memory held many zeroes
	pause    atomic.Int32 // reads that are not to be sampled
}

// expects reports whether a range is likely to hold many zeroes because the range
// read before did: then it is read to memory at once.
func (z *zeroSampler) expects() bool { return z.inZeroes.Load() }

// finds reports whether samples of n bytes at off of the file say that the range holds
// many zeroes. The range has just been spliced, so it is in the page cache. sample is
// memory for one sample.
func (z *zeroSampler) finds(f *zerocopy.File, off, n int64, sample *[sampleLen]byte) bool {
	if !f.HasCache() {
		return false
	}
	if z.pause.Load() > 0 {
		z.pause.Add(-1)
		return false
	}
	first := (off + sampleEvery - 1) / sampleEvery * sampleEvery
	left := (off+n-sampleLen-first)/sampleEvery + 1
	wanted := max(1, left/zeroShare)
	for at := first; wanted > 0 && left >= wanted; at += sampleEvery {
		if f.ReadCached(sample[:], at) && *sample == [sampleLen]byte{} {
			wanted--
		}
		left--
	}
	return wanted == 0
}

// note records what a range that was read to memory turned out to be. sampled: the
// reason was what finds said of it.
func (z *zeroSampler) note(parts []readPart, n int64, sampled bool) {
	zeroes := int64(0)
	for _, p := range parts {
		if p.zero {
			zeroes += p.n
		}
	}
	many := zeroes >= n/zeroShare
	z.inZeroes.Store(many)
	if sampled && !many {
		z.pause.Store(wrongSamples)
	}
}
