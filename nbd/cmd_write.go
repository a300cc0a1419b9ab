package nbd

import (
	"io"

	"xapi-nbd/nbd/wire"
)

var cmdWrite = &command{
	flags:   wire.CmdFlagPayloadLen,
	writes:  true,
	ranged:  true,
	past:    wire.ENOSPC,
	moves:   true,
	offered: always,
	do:      (*transmission).write,
}

// write serves one WRITE, whose payload has been read.
func (t *transmission) write(req wire.Request, payload []byte) error {
	if err := t.store(payload, int64(req.Offset), t.passesFUA(req)); err != nil {
		return err
	}
	t.stats.bytes.Add(int64(len(payload)))
	return t.settle(req)
}

// store writes all of p to the device.
func (t *transmission) store(p []byte, off int64, fua bool) error {
	if fua {
		return t.sess.can.fua.WriteFUA(p, off)
	}
	n, err := t.sess.can.writer.WriteAt(p, off)
	if err == nil && n < len(p) {
		return io.ErrShortWrite
	}
	return err
}

// passesFUA reports whether the device gets the FUA of a request together with the
// change. Otherwise settle keeps that promise.
func (t *transmission) passesFUA(req wire.Request) bool {
	return req.Flags&wire.CmdFlagFUA != 0 && t.sess.can.fua != nil
}

// settle does what FUA asks for: what the request changed is on stable storage before
// its reply.
func (t *transmission) settle(req wire.Request) error {
	if req.Flags&wire.CmdFlagFUA == 0 || t.sess.can.fua != nil || t.sess.can.through {
		return nil
	}
	return t.sess.can.flusher.Flush()
}
