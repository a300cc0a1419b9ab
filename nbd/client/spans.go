package client

import (
	"errors"
	"slices"
	"sort"
)

// maxSpans is how many separate pieces of one answer are kept track of. Chunks
// are at least 512 bytes in a sane answer (section "Structured reply types"), so
// that the largest request has half as many gaps as sectors.
const maxSpans = 64 << 10

var (
	errOverlap   = errors.New("overlaps what it sent before")
	errScattered = errors.New("the answer is too scattered")
)

// span is a range of bytes [begin, end).
type span struct{ begin, end uint64 }

// spans are what has come of an answer: sorted, apart from each other.
type spans []span

// add takes a range that is not empty. What comes in order costs nothing.
func (s *spans) add(begin, end uint64) error {
	list := *s
	i := len(list) // the first span behind the range
	if i > 0 && list[i-1].begin >= end {
		i = sort.Search(len(list), func(i int) bool { return list[i].begin >= end })
	}
	if i > 0 && list[i-1].end > begin {
		return errOverlap
	}
	before := i > 0 && list[i-1].end == begin
	behind := i < len(list) && list[i].begin == end
	switch {
	case before && behind:
		list[i-1].end = list[i].end
		*s = slices.Delete(list, i, i+1)
	case before:
		list[i-1].end = end
	case behind:
		list[i].begin = begin
	case len(list) >= maxSpans:
		return errScattered
	default:
		*s = slices.Insert(list, i, span{begin, end})
	}
	return nil
}

// covers reports whether everything up to n has come.
func (s spans) covers(n uint64) bool { return len(s) == 1 && s[0] == span{0, n} }

// total is how many bytes have come.
func (s spans) total() (n uint64) {
	for _, r := range s {
		n += r.end - r.begin
	}
	return n
}
