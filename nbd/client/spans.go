package client

import (
	"errors"
	"slices"
	"sort"
)

// maxSpans is the largest number of separate parts of one reply that are recorded. Servers
// should send chunks of at least 512 bytes (section "Structured reply types"), so the reply
// to the largest request has at most 32 Ki parts with gaps between them.
const maxSpans = 64 << 10

var (
	errOverlap   = errors.New("overlaps data that it sent before")
	errScattered = errors.New("the reply has too many separate parts")
)

// span is a range of bytes [begin, end).
type span struct{ begin, end uint64 }

// spans are the parts of a reply that have been received: sorted, with gaps between them.
type spans []span

// add adds the range [begin, end), which must not be empty. It allocates nothing if the
// server sends the parts in order.
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

// covers reports whether all bytes in [0, n) have been received.
func (s spans) covers(n uint64) bool { return len(s) == 1 && s[0] == span{0, n} }

// total returns the number of bytes that have been received.
func (s spans) total() (n uint64) {
	for _, r := range s {
		n += r.end - r.begin
	}
	return n
}
