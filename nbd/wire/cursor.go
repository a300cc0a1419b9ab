package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrMalformed is wrapped by every error about the data of an option or a reply.
var ErrMalformed = errors.New("malformed data")

// cursor reads a byte slice from the front. After its first error it returns
// zero values, so that a parser checks once, at its end.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
	}
	c.b = nil
}

func (c *cursor) take(n int) []byte {
	if c.err != nil {
		return nil
	}
	if n > len(c.b) {
		c.fail("%d bytes announced or needed, %d there", n, len(c.b))
		return nil
	}
	b := c.b[:n]
	c.b = c.b[n:]
	return b
}

func (c *cursor) uint16() uint16 {
	if b := c.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) uint32() uint32 {
	if b := c.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) uint64() uint64 {
	if b := c.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// string reads a 32-bit length and as many bytes. It checks the length against its limit
// first.
func (c *cursor) string(limit uint32) string {
	n := c.uint32()
	if c.err == nil && n > limit {
		c.fail("string of %d bytes, at most %d allowed", n, limit)
	}
	return string(c.take(int(n)))
}

// rest returns all bytes that have not been read.
func (c *cursor) rest() []byte { return c.take(len(c.b)) }

// end returns an error unless everything was read.
func (c *cursor) end() {
	if c.err == nil && len(c.b) != 0 {
		c.fail("%d bytes too many", len(c.b))
	}
}
