package nbd

import (
	"io"

	"xapi-nbd/nbd/wire"
)

var cmdRead = &command{
	flags:   wire.CmdFlagDF,
	ranged:  true,
	past:    wire.EINVAL,
	moves:   true,
	offered: always,
	answer:  (*transmission).read,
}

// read serves one READ. Only when all bytes are there is it known whether the
// answer is a success; the header is made then, and not before.
func (t *transmission) read(req wire.Request, _ []byte) {
	n := int(req.Length)
	if t.sess.mode != simpleReplies && req.Flags&wire.CmdFlagDF == 0 {
		if parts := t.readParts(req); parts != nil {
			t.readSparse(req, parts)
			return
		}
	}
	b := getBuffer(n)
	defer b.release()
	if err := readFull(t.sess.device, b.payload(n), int64(req.Offset)); err != nil {
		t.failed(req, err)
		return
	}
	t.stats.bytes.Add(int64(n))
	t.out.sendRead(req, b, n)
}

// readFull reads all of p, or fails.
func readFull(d Device, p []byte, off int64) error {
	got, err := d.ReadAt(p, off)
	switch {
	case got == len(p):
		return nil
	case err == nil:
		return io.ErrUnexpectedEOF
	}
	return err
}

const (
	// worthAHole is the shortest run of zeroes that travels as a hole: a
	// chunk's header costs about as much as sending this does.
	worthAHole = 4096
	// maxReadParts bounds the chunks of one reply, section "Structured reply
	// types" wants few.
	maxReadParts = 64
)

// readPart is a piece of a READ that is data or zeroes throughout.
type readPart struct {
	off, n int64
	zero   bool
}

// readParts asks the device where the range reads as zeroes; nil when that is
// not known or nowhere, so that the range is read as one.
func (t *transmission) readParts(req wire.Request) []readPart {
	if t.sess.can.extenter == nil || req.Length < worthAHole {
		return nil
	}
	off, end := int64(req.Offset), int64(req.Offset+req.Length)
	extents, err := t.sess.can.extenter.Extents(off, end-off)
	if err != nil {
		return nil // reading will tell
	}
	var parts []readPart
	add := func(n int64, zero bool) {
		if last := len(parts) - 1; last >= 0 && parts[last].zero == zero {
			parts[last].n += n
		} else if n > 0 {
			parts = append(parts, readPart{off, n, zero})
		}
		off += n
	}
	holes := false
	for _, e := range extents {
		n := min(int64(min(e.Length, 1<<62)), end-off)
		zero := e.Status&wire.StateZero != 0 && n >= worthAHole && len(parts) < maxReadParts
		add(n, zero)
		holes = holes || zero
		if off == end {
			break
		}
	}
	add(end-off, false) // what the device said nothing of
	if !holes {
		return nil
	}
	return parts
}

// readSparse answers a READ by one chunk for each part. Zeroes are not read.
func (t *transmission) readSparse(req wire.Request, parts []readPart) {
	b := make([]byte, 0, t.out.sparseLen(parts))
	for i, p := range parts {
		flags := wire.ChunkFlags(0)
		if i == len(parts)-1 {
			flags = wire.ChunkFlagDone
		}
		if p.zero {
			b = t.out.appendChunk(b, req, wire.ChunkOffsetHole, flags, wire.ChunkHoleLen)
			b = wire.AppendHole(b, uint64(p.off), uint32(p.n))
			continue
		}
		b = t.out.appendChunk(b, req, wire.ChunkOffsetData, flags, wire.ChunkOffsetLen+uint64(p.n))
		b = appendUint64(b, uint64(p.off))
		data := b[len(b) : len(b)+int(p.n)]
		if err := readFull(t.sess.device, data, p.off); err != nil {
			t.failed(req, err)
			return
		}
		b = b[:len(b)+len(data)]
	}
	t.stats.bytes.Add(int64(req.Length))
	t.out.send(b)
}
