package nbd

import (
	"testing"
	"unsafe"
)

// Copies between a buffer and memory that begins with a page, as the page cache
// and a fresh page of a socket do, are never the slow ones that payloadPlace is
// about; and reads past the page cache may go straight into a large one.
func TestPayloadPlace(t *testing.T) {
	slow := func(to, from uintptr) bool {
		d := (to - from) % pageSize
		return d >= 1 && d <= 31
	}
	for n := 1; n <= 1<<maxBufferShift; n *= 2 {
		// Several, as their places may differ.
		for range 4 {
			b := getBuffer(n)
			payload := uintptr(unsafe.Pointer(&b.payload(n)[0]))
			if n >= alignedFrom && payload%512 != 0 {
				t.Errorf("a payload of %d bytes begins at %#x, which is no whole sector", n, payload)
			}
			if slow(payload, 0) {
				t.Errorf("a payload of %d bytes begins at %#x: reading into it is slow", n, payload)
			}
			for h := range headerRoom + 1 {
				if slow(0, payload-uintptr(h)) {
					t.Errorf("a payload of %d bytes begins at %#x: sending it with a header of %d bytes is slow", n, payload, h)
				}
			}
		}
	}
}
