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

// write serves one WRITE.
func (t *transmission) write(req wire.Request, payload []byte) error {
	if err := t.store(payload, int64(req.Offset), t.passesFUA(req)); err != nil {
		return err
	}
	t.countWritten(int64(req.Offset), int64(len(payload)))
	return t.settle(req)
}

// store writes all of p to the device, at the pace of a Pacer.
func (t *transmission) store(p []byte, off int64, fua bool) error {
	if err := t.pace(int64(len(p))); err != nil {
		return err
	}
	if fua {
		return t.sess.can.fua.WriteFUA(p, off)
	}
	n, err := t.sess.can.writer.WriteAt(p, off)
	if err == nil && n < len(p) {
		return io.ErrShortWrite
	}
	return err
}

// passesFUA reports whether a request has FUA and the device is a FUAWriter. For other
// devices settle flushes the change.
func (t *transmission) passesFUA(req wire.Request) bool {
	return req.Flags&wire.CmdFlagFUA != 0 && t.sess.can.fua != nil
}

// settle flushes the device if the request has FUA, unless its change is on stable storage
// already.
func (t *transmission) settle(req wire.Request) error {
	if req.Flags&wire.CmdFlagFUA == 0 || t.sess.can.fua != nil || t.sess.can.through {
		return nil
	}
	return t.sess.can.flusher.Flush()
}
