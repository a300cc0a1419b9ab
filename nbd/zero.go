package nbd

import "bytes"

// zeroUnit is the granularity in which zeroes are looked for, and the shortest
// run of them that travels as a hole: a chunk's header costs about as much as
// sending this does.
const zeroUnit = 4096

var zeroBlock [zeroUnit]byte

// findZeroes splits data, which is at off of the export, into parts that are
// zero throughout and parts that are not, in the memory of parts; found is false
// when there is nothing to gain. Data that is not zero rarely begins with many
// zeroes, so looking costs little.
func findZeroes(data []byte, off int64, parts []readPart) (_ []readPart, found bool) {
	parts = parts[:0]
	for len(data) > 0 {
		// Units begin at multiples of their size in the export, as zeroes do.
		n := min(zeroUnit-int(off%zeroUnit), len(data))
		zero := n == zeroUnit && bytes.Equal(data[:n], zeroBlock[:])
		if last := len(parts) - 1; last >= 0 && parts[last].zero == zero {
			parts[last].n += int64(n)
		} else if len(parts) < maxReadParts-1 || !zero && len(parts) < maxReadParts {
			parts = append(parts, readPart{off: off, n: int64(n), zero: zero})
			found = found || zero
		} else {
			parts[last].n += int64(len(data)) // enough pieces: the rest is sent as it is
			break
		}
		data, off = data[n:], off+int64(n)
	}
	return parts, found
}
