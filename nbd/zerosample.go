package nbd

import (
	"sync/atomic"

	"xapi-nbd/nbd/internal/zerocopy"
)

// The server does not see data that is spliced, so it cannot send zeroes in it as holes.
// Samples from the page cache show in which ranges zeroes are likely. Such a range is read
// to memory and searched: a sample alone never makes a hole.
const (
	// sampleEvery is the distance of the samples in bytes. They are taken at multiples of
	// it in the export. A sample costs about 0.5 µs, splicing that many bytes about 20 µs.
	sampleEvery = 64 << 10
	// sampleLen is the length of a sample in bytes.
	sampleLen = 16
	// zeroShare is the share of zeroes, as a divisor, from which on a range is read to
	// memory, which takes up to twice the processor time of splicing it.
	zeroShare = 4
	// wrongSamples is how many reads are not sampled after samples were wrong: the range
	// had fewer zeroes than zeroShare.
	wrongSamples = 32
)

// zeroSampler decides which reads of one connection are read to memory instead of spliced,
// because of the zeroes in them. Its methods may be called concurrently.
type zeroSampler struct {
	inZeroes atomic.Bool  // the last range that was read to memory had many zeroes
	pause    atomic.Int32 // number of reads that are not to be sampled
}

// expects reports whether the next range probably has many zeroes, because the last range
// had. It is then read to memory without being spliced first.
func (z *zeroSampler) expects() bool { return z.inZeroes.Load() }

// finds takes samples of n bytes at off of the file, and reports whether the range probably
// has many zeroes. The range has just been spliced, so it is in the page cache. sample is
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

// note records the parts of a range that was read to memory. sampled reports whether it was
// because of finds.
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
