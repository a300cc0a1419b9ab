package nbd

import "xapi-nbd/nbd/wire"

var cmdWriteZeroes = &command{
	flags:   wire.CmdFlagNoHole | wire.CmdFlagFastZero,
	writes:  true,
	ranged:  true,
	past:    wire.ENOSPC,
	offered: always,
	do:      (*transmission).writeZeroes,
}

// zeroes is written to devices that are no ZeroWriter.
var zeroes [1 << 20]byte

// maxZero is the most bytes that are zeroed at a time on a device that paces, where zeroing is
// not fast: a request may be for gigabytes.
const maxZero = 16 << 20

// writeZeroes serves one WRITE_ZEROES, at the pace of a Pacer. A fast one is not paced: it moves
// no data, and fails as a whole where zeroing is not fast.
func (t *transmission) writeZeroes(req wire.Request, _ []byte) error {
	if req.Length == 0 {
		return nil
	}
	off, n := int64(req.Offset), int64(req.Length)
	fast := req.Flags&wire.CmdFlagFastZero != 0
	switch {
	case t.sess.can.zeroer == nil:
		return t.storeZeroes(req, off, n)
	case fast || !t.paces():
		return t.zero(req, off, n)
	}
	for n > 0 {
		piece := min(n, maxZero)
		if err := t.pace(piece); err != nil {
			return err
		}
		if err := t.zero(req, off, piece); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

// zero zeroes a range of a ZeroWriter, and makes it durable if the request has FUA.
func (t *transmission) zero(req wire.Request, off, n int64) error {
	noHole, fast := req.Flags&wire.CmdFlagNoHole != 0, req.Flags&wire.CmdFlagFastZero != 0
	if t.passesFUA(req) {
		return t.sess.can.fua.WriteZeroesFUA(off, n, noHole, fast)
	}
	if err := t.sess.can.zeroer.WriteZeroes(off, n, noHole, fast); err != nil {
		return err
	}
	return t.settle(req)
}

// storeZeroes writes zeroes to a device that is no ZeroWriter.
func (t *transmission) storeZeroes(req wire.Request, off, n int64) error {
	for n > 0 {
		part := zeroes[:min(n, int64(len(zeroes)))]
		if err := t.store(part, off, t.passesFUA(req)); err != nil {
			return err
		}
		off, n = off+int64(len(part)), n-int64(len(part))
	}
	return t.settle(req)
}
