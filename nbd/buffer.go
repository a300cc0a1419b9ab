package nbd

import (
	"math/bits"
	"sync"
	"unsafe"
)

// headerRoom is how many bytes a buffer has in front of the payload, so that header and
// payload are next to each other and can be sent in one write. Every reply header fits.
const headerRoom = 64

// The sizes of buffers are powers of 2; the smallest is a page.
const (
	minBufferShift = 12
	maxBufferShift = 25 // 32 MiB, the largest payload
)

// buffer holds the payload of one request or reply. It is pooled: only the goroutine that
// called getBuffer may use it, and must release it.
type buffer struct {
	b     []byte
	class int
}

var buffers [maxBufferShift - minBufferShift + 1]sync.Pool

// getBuffer returns a buffer with room for a payload of n bytes, at most 32 MiB. It holds
// the data of an earlier request, which must be overwritten before it is sent.
func getBuffer(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1)), minBufferShift) - minBufferShift
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: newBytes(1 << (class + minBufferShift)), class: class}
}

const (
	pageSize = 4096
	// alignedFrom is the smallest payload, in bytes, that begins at payloadPlace. Smaller
	// ones would need too much memory for that, and begin at a good place anyway.
	alignedFrom = 16 * pageSize
	// payloadPlace is the offset in a page at which a payload begins. It is a multiple of
	// the sector size, because reads with O_DIRECT need that. It is not 0: if a copy's
	// target is 1 to 31 bytes after its source, modulo a page, the copy takes ten times as
	// long on processors with fast short REP MOVSB (TestPayloadPlace). The kernel makes such
	// a copy when it sends a header of 16 bytes and a payload at the beginning of a page
	// to a new page of the socket.
	payloadPlace = 512
)

// newBytes returns memory for headerRoom and a payload of n bytes after it.
func newBytes(n int) []byte {
	if n < alignedFrom {
		return make([]byte, headerRoom+n)
	}
	b := make([]byte, headerRoom+n+pageSize-1)
	skip := (payloadPlace - int(uintptr(unsafe.Pointer(&b[headerRoom])))) & (pageSize - 1)
	return b[skip : skip+headerRoom+n]
}

// payload returns the part of the buffer for n bytes of payload.
func (b *buffer) payload(n int) []byte { return b.b[headerRoom : headerRoom+n : headerRoom+n] }

// message returns the part of the buffer for a header of h bytes and n bytes of payload.
func (b *buffer) message(h, n int) []byte { return b.b[headerRoom-h : headerRoom+n] }

// from returns the part of the buffer between two offsets in the payload. begin may be
// negative, within the room for the header.
func (b *buffer) from(begin, end int) []byte { return b.b[headerRoom+begin : headerRoom+end] }

// release gives the buffer back to the pool.
func (b *buffer) release() { buffers[b.class].Put(b) }
