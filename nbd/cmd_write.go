package nbd

import "xapi-nbd/nbd/wire"

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
	if _, err := t.sess.can.writer.WriteAt(payload, int64(req.Offset)); err != nil {
		return err
	}
	t.stats.bytes.Add(int64(len(payload)))
	return t.settle(req)
}

// settle does what FUA asks for: what the request wrote is on stable storage
// before its reply.
func (t *transmission) settle(req wire.Request) error {
	if req.Flags&wire.CmdFlagFUA == 0 || t.sess.can.flusher == nil {
		return nil
	}
	return t.sess.can.flusher.Flush()
}
