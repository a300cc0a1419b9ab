package mirror

import "math/bits"

// bitmap is a set of granules, by their numbers. The summary has one bit for each word that
// is not 0, so that a sparse set of a large disk is walked and emptied quickly.
type bitmap struct {
	words   []uint64
	summary []uint64
	n       int64 // members
}

func newBitmap(granules int64) bitmap {
	words := (granules + 63) / 64
	return bitmap{words: make([]uint64, words), summary: make([]uint64, (words+63)/64)}
}

// has reports whether granule i is in the set.
func (b *bitmap) has(i int64) bool { return b.words[i/64]&(1<<(i%64)) != 0 }

// mask returns the bits of word w that belong to the granules from begin to end.
func mask(w, begin, end int64) uint64 {
	m := ^uint64(0)
	if first := w * 64; begin > first {
		m <<= begin - first
	}
	if last := w*64 + 64; end < last {
		m &= ^uint64(0) >> (last - end)
	}
	return m
}

// put makes the granules from begin to end members, or removes them.
func (b *bitmap) put(begin, end int64, member bool) {
	for w := begin / 64; w*64 < end; w++ {
		word := b.words[w] &^ mask(w, begin, end)
		if member {
			word = b.words[w] | mask(w, begin, end)
		}
		b.replace(w, word)
	}
}

// replace sets word w.
func (b *bitmap) replace(w int64, word uint64) {
	b.n += int64(bits.OnesCount64(word) - bits.OnesCount64(b.words[w]))
	b.words[w] = word
	if word != 0 {
		b.summary[w/64] |= 1 << (w % 64)
	} else {
		b.summary[w/64] &^= 1 << (w % 64)
	}
}

// add makes all members of other members, which has the same size.
func (b *bitmap) add(other *bitmap) {
	for w := other.nextWord(0); w >= 0; w = other.nextWord(w + 1) {
		b.replace(w, b.words[w]|other.words[w])
	}
}

// clear removes all members.
func (b *bitmap) clear() {
	for w := b.nextWord(0); w >= 0; w = b.nextWord(w + 1) {
		b.replace(w, 0)
	}
}

// nextWord returns the first word from w on that is not 0, or -1.
func (b *bitmap) nextWord(w int64) int64 {
	for s := w / 64; s < int64(len(b.summary)); s++ {
		word := b.summary[s]
		if s == w/64 {
			word &= ^uint64(0) << (w % 64)
		}
		if word != 0 {
			return s*64 + int64(bits.TrailingZeros64(word))
		}
	}
	return -1
}

// next returns the first member from i on, or -1.
func (b *bitmap) next(i int64) int64 {
	w := i / 64
	if w >= int64(len(b.words)) {
		return -1
	}
	if word := b.words[w] & (^uint64(0) << (i % 64)); word != 0 {
		return w*64 + int64(bits.TrailingZeros64(word))
	}
	if w = b.nextWord(w + 1); w < 0 {
		return -1
	}
	return w*64 + int64(bits.TrailingZeros64(b.words[w]))
}

// any reports whether one of the granules from begin to end is a member.
func (b *bitmap) any(begin, end int64) bool {
	i := b.next(begin)
	return i >= 0 && i < end
}
