package vhd

import "math/bits"

// BlockSet is a set of blocks of 2 MiB (BlockSize) of one disk. It needs 64 KiB of
// memory for each TiB. It is not safe for concurrent use while it is changed.
type BlockSet struct {
	size  int64
	words []uint64
}

// NewBlockSet returns an empty set for a disk of size bytes.
func NewBlockSet(size int64) *BlockSet {
	blocks := (size + BlockSize - 1) / BlockSize
	return &BlockSet{size: size, words: make([]uint64, (blocks+63)/64)}
}

// add adds the block that holds the n bytes at off, which never cross the border of a
// block.
func (s *BlockSet) add(off, n int64) {
	if n > 0 {
		block := off / BlockSize
		s.words[block/64] |= 1 << (block % 64)
	}
}

// Run reports whether the block at off is in the set, and how many bytes from off on are
// like it: up to limit bytes, or to the end of the disk. off is in [0, size of the disk)
// and limit is above 0.
func (s *BlockSet) Run(off, limit int64) (inSet bool, n int64) {
	limit = min(limit, s.size-off)
	block := off / BlockSize
	inSet = s.has(block)
	for end := block + 1; ; {
		if end*BlockSize-off >= limit {
			return inSet, limit
		}
		word := s.words[end/64]
		if inSet {
			word = ^word
		}
		// Zeroes in word are blocks like the first one, from the bit of end on.
		same := int64(bits.TrailingZeros64(word >> (end % 64)))
		rest := 64 - end%64
		if same < rest {
			return inSet, min((end+same)*BlockSize-off, limit)
		}
		end += rest
	}
}

func (s *BlockSet) has(block int64) bool { return s.words[block/64]&(1<<(block%64)) != 0 }

// Bytes returns the number of bytes of the disk that are in blocks of the set.
func (s *BlockSet) Bytes() int64 {
	var blocks int64
	for _, w := range s.words {
		blocks += int64(bits.OnesCount64(w))
	}
	n := blocks * BlockSize
	if last := (s.size - 1) / BlockSize; s.size > 0 && s.has(last) {
		n -= (last+1)*BlockSize - s.size
	}
	return n
}

// Size returns the size of the disk in bytes.
func (s *BlockSet) Size() int64 { return s.size }
