package nbd

import (
	"io"
	"time"

	"xapi-nbd/nbd/wire"
)

// readInPieces serves a READ that got no memory of the budget. It reads and sends one piece
// after the other, in the connection's reserve. A structured reply has a chunk for each
// piece. A simple reply, and one that must not be fragmented, reports success before the
// later pieces have been read; if one of them fails, the connection is closed, because the
// error cannot be sent any more.
func (t *transmission) readInPieces(req wire.Request, g grant) {
	defer t.inflight.end(g)
	b := getBuffer(reserveSize)
	defer b.release()
	s := pieceSender{w: &t.out, req: req, fragments: t.out.mode != simpleReplies && req.Flags&wire.CmdFlagDF == 0}
	defer s.end()
	for done := 0; done < int(req.Length); {
		n := min(reserveSize, int(req.Length)-done)
		if err := t.readPiece(&s, b.payload(n), int64(req.Offset)+int64(done)); err != nil {
			t.noteFailure(req, err)
			s.fail(errnoFor(req, err))
			return
		}
		t.countRead(int64(req.Offset)+int64(done), int64(n))
		if !s.send(b, done, n) {
			return
		}
		t.c.meter.Add(int64(n))
		done += n
	}
}

// readPiece reads one piece from the device, and waits until it may be sent.
func (t *transmission) readPiece(s *pieceSender, p []byte, off int64) error {
	if s.locked {
		t.inflight.blocks(true)
		defer t.inflight.blocks(false)
	}
	begin := t.readTimer.begin()
	err := errorOf(func() error { return readFull(t.sess.device, p, off) })
	t.readTimer.end(begin)
	if err != nil {
		return err
	}
	return t.pace(int64(len(p)))
}

// pieceSender sends the reply to one READ, piece by piece.
type pieceSender struct {
	w         *replyWriter
	req       wire.Request
	fragments bool // each piece is a chunk, so other replies may be sent in between
	locked    bool // the reply has begun and no other reply may be sent in between
}

// send sends the n bytes in b, which are at off of the requested range. It reports whether
// the connection still works.
func (s *pieceSender) send(b *buffer, off, n int) bool {
	w := s.w
	if !s.locked {
		w.sending.lock()
		s.locked = true
	}
	h := 0
	switch {
	case s.fragments:
		flags := wire.ChunkFlags(0)
		if off+n == int(s.req.Length) {
			flags = wire.ChunkFlagDone
		}
		h = w.dataHeaderLen()
		w.appendDataHeader(b.message(h, n)[:0], s.req, flags, s.req.Offset+uint64(off), n)
	case off == 0:
		h = w.dataHeaderLen()
		w.appendDataHeader(b.message(h, n)[:0], s.req, wire.ChunkFlagDone, s.req.Offset, int(s.req.Length))
	}
	if w.err == nil {
		w.failedWith(w.c.write(b.message(h, n)))
	}
	works := w.err == nil
	if s.fragments {
		s.end()
	}
	return works
}

// fail ends the reply with an error.
func (s *pieceSender) fail(errno wire.Errno) {
	if !s.locked {
		s.w.sendResult(s.req, errno)
		return
	}
	s.w.c.srv.view.errors.add(errno)
	s.w.err = hardDisconnect("the device failed after the reply had begun", errno)
	s.w.c.kill(s.w.err)
}

// end permits other replies to be sent.
func (s *pieceSender) end() {
	if s.locked {
		s.locked = false
		s.w.sending.unlock()
	}
}

// writeInPieces serves a WRITE that got no memory of the budget. The reader of requests
// writes each piece of the payload to the device before it reads the next one. After an
// error it reads and drops the rest.
func (t *transmission) writeInPieces(req wire.Request, g grant) error {
	b := getBuffer(reserveSize)
	defer b.release()
	var failed error
	for done := 0; done < int(req.Length); {
		p := b.payload(min(reserveSize, int(req.Length)-done))
		if err := t.receive(p); err != nil {
			t.inflight.end(g)
			return err
		}
		t.c.meter.Add(int64(len(p)))
		if failed == nil {
			failed = errorOf(func() error { return t.store(p, int64(req.Offset)+int64(done), t.passesFUA(req)) })
		}
		done += len(p)
	}
	go func() { // the reader of requests must not wait for a flush or for the peer
		defer t.inflight.end(g)
		if failed == nil {
			t.countWritten(int64(req.Offset), int64(req.Length))
			failed = errorOf(func() error { return t.settle(req) })
		}
		t.answer(req, failed)
	}()
	return nil
}

// receive reads a payload or a part of one.
func (t *transmission) receive(p []byte) error {
	t.deadline = time.Time{} // readPayload sets another one
	err := t.c.readPayload(int64(len(p)), func() error {
		_, err := io.ReadFull(t.in, p)
		return err
	})
	if err != nil {
		return hardDisconnect("connection lost inside a payload", err)
	}
	return nil
}
