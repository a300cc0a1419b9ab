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

// read is the state of one READ. It is pooled.
type read struct {
	t     *transmission
	grant grant
	serve func() // calls t.serveRead; made once, because a go statement with arguments allocates
	req   wire.Request
	parts []readPart // of the range, once findHoles has returned true

	// The result of findHoles.
	asked, hasHoles bool
	hasData         bool // a part of the range is no hole

	// Memory for probes of the page cache. Local variables would be allocated each time.
	last   [1]byte         // for File.HasCached
	sample [sampleLen]byte // for zeroSampler.finds

	// The result of reading the device: an error, or data in a buffer or in pipes.
	err    error
	buffer *buffer
	pipes  zerocopy.Pipes
	sparse bool // those parts of the buffer that are zero are not sent
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

// beginRead serves one READ, with the memory g: in this goroutine if it is expected to be
// fast or if there is no other request to read meanwhile, otherwise in a goroutine of its
// own. mine reports whether the caller still holds the read token.
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
// storage itself: there is nothing to read meanwhile, and handing the request to another
// goroutine takes up to a third of the time of a short read. Only the holder of the read
// token may call it.
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

// fetchNow calls fetch, unless the page cache shows that this would wait for storage. Then
// it does nothing and returns false. It does not look into the page cache where the device
// has a hole: that would make the kernel read the hole from storage.
func (t *transmission) fetchNow(r *read) (fetched bool) {
	defer func() { fetched = fetched || r.err != nil }()
	defer recoverTo(&r.err)
	n, off := int64(r.req.Length), int64(r.req.Offset)
	switch {
	case n == 0 || !t.sess.can.file.HasCache():
	case t.sess.can.runner != nil && t.findHoles(r):
		if r.hasData {
			return false
		}
	case n < spliceMin || t.out.sender == nil:
		return t.fetchCached(r)
	case !t.sess.can.file.HasCached(off, n, &r.last):
		return false
	}
	t.fetch(r)
	return true
}

// fetchCached fetches a short read from the page cache if all of it is there. Otherwise it
// does nothing and returns false.
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

// mayHaveHoles reports whether the reply may consist of several chunks.
func (t *transmission) mayHaveHoles(r *read) bool {
	return t.sess.mode != simpleReplies && r.req.Flags&wire.CmdFlagDF == 0 && r.req.Length >= zeroUnit
}

// fetch reads the data from the device. The header of the reply must not be sent before,
// because it says whether the read succeeded.
func (t *transmission) fetch(r *read) {
	defer recoverTo(&r.err)
	n, off := int(r.req.Length), int64(r.req.Offset)
	mayHaveHoles := t.mayHaveHoles(r)
	if t.findHoles(r) {
		r.sparse = mayHaveHoles || t.sess.mode == simpleReplies
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
	// worthAsking is the shortest read, in bytes, for which an Extenter that is no
	// DataRunner is asked for holes. Shorter reads are searched for zeroes after they have been read.
	worthAsking = 64 << 10
	// maxReadParts limits the chunks of one reply: section "Structured reply types" asks
	// servers to send few.
	maxReadParts = 64
)

// readPart is a part of a READ that is either all data or all zeroes.
type readPart struct {
	off, n int64
	zero   bool
}

// findHoles asks the device, once for each READ, which parts of the range read as zeroes,
// and sets r.parts. The device need not be read there, even if holes cannot be sent to the
// client. It returns false if there are none or the device does not know.
func (t *transmission) findHoles(r *read) bool {
	if !r.asked {
		r.asked = true
		switch can := &t.sess.can; {
		case can.runner != nil:
			r.askRuns(can.runner)
		case can.extenter != nil && r.req.Length >= worthAsking:
			r.askExtents(can.extenter)
		}
	}
	return r.hasHoles
}

// askRuns is findHoles for a DataRunner.
func (r *read) askRuns(d DataRunner) {
	off, end := int64(r.req.Offset), int64(r.req.Offset+r.req.Length)
	r.parts = r.parts[:0]
	for off < end {
		data, n := d.DataRun(off, end-off)
		if n = min(n, end-off); n <= 0 {
			data, n = true, end-off
		}
		r.hasHoles, r.hasData = r.hasHoles || !data, r.hasData || data
		r.addPart(off, n, !data)
		off += n
	}
}

// askExtents is findHoles for an Extenter.
func (r *read) askExtents(d Extenter) {
	off, end := int64(r.req.Offset), int64(r.req.Offset+r.req.Length)
	extents, err := d.Extents(off, end-off)
	if err != nil {
		return // reading returns the error, if there is one
	}
	r.parts = r.parts[:0]
	for _, e := range extents {
		n := min(int64(min(e.Length, 1<<62)), end-off)
		if r.addPart(off, n, e.Status&wire.StateZero != 0) {
			r.hasHoles = true
		}
		if off += n; off == end {
			break
		}
	}
	r.addPart(off, end-off, false) // the device has no extents of the rest
}

// addPart appends to r.parts. A hole that is short, or one of too many, becomes data. It
// returns whether the part is a hole.
func (r *read) addPart(off, n int64, zero bool) bool {
	zero = zero && n >= zeroUnit && len(r.parts) < maxReadParts
	if last := len(r.parts) - 1; last >= 0 && r.parts[last].zero == zero {
		r.parts[last].n += n
	} else if n > 0 {
		r.parts = append(r.parts, readPart{off, n, zero})
	}
	return zero
}

// fetchParts reads the parts that are not holes, each to its place in the buffer.
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
