package nbd

import (
	"math/bits"
	"sync"
	"unsafe"
)

// headerRoom is how many bytes a buffer has in front of the payload, so that
// header and payload leave in one write without being copied together. It fits
// every reply header of the protocol and keeps the payload aligned.
const headerRoom = 64

// Buffers come in sizes of powers of 2; the smallest is a page.
const (
	minBufferShift = 12
	maxBufferShift = 25 // 32 MiB, the largest payload
)

// buffer holds one reply. It belongs to one request from getBuffer to release.
type buffer struct {
	b     []byte
	class int
}

var buffers [maxBufferShift - minBufferShift + 1]sync.Pool

// getBuffer returns a buffer with room for a payload of n bytes, at most
// 32 MiB. Its content is what an earlier request left: write before you send.
func getBuffer(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1)), minBufferShift) - minBufferShift
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: newBytes(1 << (class + minBufferShift)), class: class}
}

const (
	pageSize = 4096
	// alignedFrom is the smallest payload that has a place of its own in a page. For
	// smaller ones it would be too much memory; theirs are as good by nature.
	alignedFrom = 16 * pageSize
	// payloadPlace is where in a page a payload begins. Whole sectors, because reads
	// past the page cache need that, but not the beginning of the page: a copy to an
	// address up to 31 bytes behind its source, by their places in a page, takes a
	// processor with fast short REP MOVSB ten times as long (TestPayloadPlace). A header in
	// front of a payload that begins with a page, sent to a fresh page of the
	// socket, is such a copy.
	payloadPlace = 512
)

// newBytes makes room for a header and a payload of n bytes behind it.
func newBytes(n int) []byte {
	if n < alignedFrom {
		return make([]byte, headerRoom+n)
	}
	b := make([]byte, headerRoom+n+pageSize-1)
	skip := (payloadPlace - int(uintptr(unsafe.Pointer(&b[headerRoom])))) & (pageSize - 1)
	return b[skip : skip+headerRoom+n]
}

// payload is the part of the buffer for n bytes of data.
func (b *buffer) payload(n int) []byte { return b.b[headerRoom : headerRoom+n : headerRoom+n] }

// message is a header of h bytes, to be written by the caller, and the n bytes
// of data behind it.
func (b *buffer) message(h, n int) []byte { return b.b[headerRoom-h : headerRoom+n] }

// from is the bytes of the buffer from one offset of the payload to another; the
// first may lie before it, in the room for the header.
func (b *buffer) from(begin, end int) []byte { return b.b[headerRoom+begin : headerRoom+end] }

func (b *buffer) release() { buffers[b.class].Put(b) }
