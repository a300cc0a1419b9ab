package nbd

import (
	"errors"
	"io"
	"sync"

	"xapi-nbd/nbd/internal/zerocopy"
	"xapi-nbd/nbd/wire"
)

var cmdRead = &command{
	flags:   wire.CmdFlagDF,
	ranged:  true,
	past:    wire.EINVAL,
	moves:   true,
	offered: always,
}

// read is one READ on its way through the device. It is pooled.
type read struct {
	t     *transmission
	grant grant
	serve func() // serveRead of it; made once, because each go with arguments allocates
	req   wire.Request
	parts []readPart

	// Memory for looks at the page cache, which would be allocated each time if it were
	// the caller's own.
	last   [1]byte         // for File.HasCached
	sample [sampleLen]byte // for zeroSampler.finds

	// What the device gave: an error, or data in a buffer or in pipes.
	err    error
	buffer *buffer
	pipes  zerocopy.Pipes
	sparse bool // parts says what of the buffer is to be sent
}

var reads = sync.Pool{New: func() any { return new(read) }}

func (r *read) release() {
	if r.buffer != nil {
		r.buffer.release()
	}
	r.pipes.Release()
	*r = read{serve: r.serve, parts: r.parts[:0], pipes: r.pipes}
	reads.Put(r)
}

// beginRead serves one READ: here if it is expected to be fast or if no other request
// could be served meanwhile, else in a goroutine of its own. g is its memory. mine
// reports whether the caller still holds the read token.
func (t *transmission) beginRead(req wire.Request, g grant) (mine bool) {
	r := reads.Get().(*read)
	r.t, r.req, r.grant = t, req, g
	if r.serve == nil {
		r.serve = func() { r.t.serveRead(r) }
	}
	slow := t.token.isSlow()
	if slow && !t.sess.can.file.HasCache() {
		go r.serve()
		return true
	}
	alone := !slow && t.isAlone()
	n := t.beginBlocking(inFetch)
	begin := t.readTimer.begin()
	fetched := t.fetchNow(r)
	missed := !fetched
	if missed && alone {
		t.fetch(r)
		fetched = true
	}
	if fetched {
		t.readTimer.end(begin)
	} else {
		t.readTimer.cancel() // serveRead begins it again
	}
	if !t.token.end(n) {
		if fetched {
			t.deliver(r)
		} else {
			t.serveRead(r)
		}
		return false
	}
	if !fetched {
		t.token.noteStorageRead(t.hasRequest())
		go r.serve()
		return true
	}
	if missed {
		t.token.noteStorageRead(t.unread.Any())
	}
	n = t.beginBlocking(inSend)
	t.deliver(r)
	return t.token.end(n)
}

// isAlone reports whether the peer seems to wait for the reply to the request that is
// being served before it sends the next one. Then the reader of requests waits for
// storage itself: there is nothing to read meanwhile, and a hand-over would take a
// good part of the time of a short read. Only the holder of the read token may call
// it.
func (t *transmission) isAlone() bool {
	return t.unread != nil && !t.hasRequest() && !t.token.isPipelined()
}

// serveRead serves a READ in a goroutine that does not hold the read token.
func (t *transmission) serveRead(r *read) {
	begin := t.readTimer.begin()
	t.fetch(r)
	t.token.note(t.readTimer.end(begin))
	t.deliver(r)
}

// fetchNow is fetch unless that has to wait for storage, which the page cache
// tells of a file; then it reports false and nothing has been done.
func (t *transmission) fetchNow(r *read) bool {
	n, off := int64(r.req.Length), int64(r.req.Offset)
	switch {
	case n == 0 || !t.sess.can.file.HasCache():
	case n < spliceMin || t.out.sender == nil:
		return t.fetchCached(r)
	case !t.sess.can.file.HasCached(off, n, &r.last):
		return false
	}
	t.fetch(r)
	return true
}

// fetchCached is fetch for a short read of what is in the page cache.
func (t *transmission) fetchCached(r *read) (fetched bool) {
	defer func() { fetched = fetched || r.err != nil }()
	defer recoverTo(&r.err)
	n, off := int(r.req.Length), int64(r.req.Offset)
	r.buffer = getBuffer(n)
	data := r.buffer.payload(n)
	if !t.sess.can.file.ReadCached(data, off) {
		r.buffer.release()
		r.buffer = nil
		return false
	}
	if r.err = t.sess.can.file.Verify(off, int64(n)); r.err == nil && t.mayHaveHoles(r) {
		r.parts, r.sparse = findZeroes(data, off, r.parts)
	}
	return true
}

// mayHaveHoles reports whether the answer may consist of several chunks.
func (t *transmission) mayHaveHoles(r *read) bool {
	return t.sess.mode != simpleReplies && r.req.Flags&wire.CmdFlagDF == 0 && r.req.Length >= zeroUnit
}

// fetch gets the data from the device. Only when all bytes are there is it known
// whether the answer is a success; the header is made then, and not before.
func (t *transmission) fetch(r *read) {
	defer recoverTo(&r.err)
	n, off := int(r.req.Length), int64(r.req.Offset)
	mayHaveHoles := t.mayHaveHoles(r)
	if t.findHoles(r) {
		r.sparse = mayHaveHoles
		r.err = t.fetchParts(r)
		return
	}
	long := t.out.sender != nil && n >= spliceMin
	sampled := false
	if long && (!mayHaveHoles || !t.zeroes.expects()) {
		if r.err = t.sess.can.file.Fill(&r.pipes, off, n); !errors.Is(r.err, zerocopy.ErrNoPipe) {
			sampled = r.err == nil && mayHaveHoles && t.zeroes.finds(t.sess.can.file, off, int64(n), &r.sample)
			if !sampled {
				return
			}
			r.pipes.Release()
		}
	}
	r.buffer = getBuffer(n)
	data := r.buffer.payload(n)
	if r.err = readFull(t.sess.device, data, off); r.err != nil || !mayHaveHoles {
		return
	}
	r.parts, r.sparse = findZeroes(data, off, r.parts)
	if long {
		t.zeroes.note(r.parts, int64(n), sampled)
	}
}

// deliver sends the reply and ends the request.
func (t *transmission) deliver(r *read) {
	defer t.endRead(r)
	if r.err == nil {
		r.err = t.pace(int64(r.req.Length))
	}
	if r.err != nil {
		t.failed(r.req, r.err)
		return
	}
	t.inflight.move(&r.grant, withPeer)
	t.countRead(int64(r.req.Offset), int64(r.req.Length))
	switch {
	case r.sparse:
		t.out.sendSparse(r.req, r.buffer, r.parts)
	case r.buffer != nil:
		t.out.sendRead(r.req, r.buffer, int(r.req.Length))
	default:
		t.out.sendPipes(r.req, &r.pipes)
	}
	t.c.meter.Add(int64(r.req.Length))
}

// endRead ends a READ and gives back its memory.
func (t *transmission) endRead(r *read) {
	g := r.grant
	r.release()
	t.inflight.end(g)
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
	// worthAsking is the shortest read for which a device that knows its holes is
	// asked for them: what is shorter is read and looked at.
	worthAsking = 64 << 10
	// maxReadParts bounds the chunks of one reply, section "Structured reply
	// types" wants few.
	maxReadParts = 64
)

// readPart is a piece of a READ that is data or zeroes throughout.
type readPart struct {
	off, n int64
	zero   bool
}

// findHoles asks the device where the range reads as zeroes: the device need not be
// read there, even if the client cannot be sent holes. False: that is not known or
// nowhere, so that the range is read as one.
func (t *transmission) findHoles(r *read) bool {
	if t.sess.can.extenter == nil || r.req.Length < worthAsking {
		return false
	}
	off, end := int64(r.req.Offset), int64(r.req.Offset+r.req.Length)
	extents, err := t.sess.can.extenter.Extents(off, end-off)
	if err != nil {
		return false // reading will tell
	}
	parts, holes := r.parts[:0], false
	add := func(n int64, zero bool) {
		if last := len(parts) - 1; last >= 0 && parts[last].zero == zero {
			parts[last].n += n
		} else if n > 0 {
			parts = append(parts, readPart{off, n, zero})
		}
		off += n
	}
	for _, e := range extents {
		n := min(int64(min(e.Length, 1<<62)), end-off)
		zero := e.Status&wire.StateZero != 0 && n >= zeroUnit && len(parts) < maxReadParts
		add(n, zero)
		holes = holes || zero
		if off == end {
			break
		}
	}
	add(end-off, false) // what the device said nothing of
	r.parts = parts
	return holes
}

// fetchParts reads what is not a hole, each part to its place in the buffer.
func (t *transmission) fetchParts(r *read) error {
	r.buffer = getBuffer(int(r.req.Length))
	data := r.buffer.payload(int(r.req.Length))
	for _, p := range r.parts {
		at := p.off - int64(r.req.Offset)
		if p.zero {
			if !r.sparse {
				clear(data[at : at+p.n]) // is sent, and buffers are used again
			}
			continue
		}
		if err := readFull(t.sess.device, data[at:at+p.n], p.off); err != nil {
			return err
		}
	}
	return nil
}
