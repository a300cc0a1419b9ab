package nbd

import "bytes"

// zeroUnit is the granularity, in bytes, of the search for zeroes, and the shortest range of
// them that is sent as a hole: sending the header of a chunk costs about as much as
// sending this many bytes.
const zeroUnit = 4096

var zeroBlock [zeroUnit]byte

// findZeroes splits data, which is at off of the export, into parts that are all zeroes and
// parts that are not. It uses the memory of parts. found reports whether there are zeroes.
// It is cheap, because a unit that is not all zeroes rarely begins with many of them.
func findZeroes(data []byte, off int64, parts []readPart) (_ []readPart, found bool) {
	parts = parts[:0]
	for len(data) > 0 {
		// Units begin at multiples of their size in the export, as ranges of zeroes
		// usually do.
		n := min(zeroUnit-int(off%zeroUnit), len(data))
		zero := n == zeroUnit && bytes.Equal(data[:n], zeroBlock[:])
		if last := len(parts) - 1; last >= 0 && parts[last].zero == zero {
			parts[last].n += int64(n)
		} else if len(parts) < maxReadParts-1 || !zero && len(parts) < maxReadParts {
			parts = append(parts, readPart{off: off, n: int64(n), zero: zero})
			found = found || zero
		} else {
			parts[last].n += int64(len(data)) // no further parts: the rest is sent as it is
			break
		}
		data, off = data[n:], off+int64(n)
	}
	return parts, found
}
