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

// writeZeroes serves one WRITE_ZEROES.
func (t *transmission) writeZeroes(req wire.Request, _ []byte) error {
	if req.Length == 0 {
		return nil
	}
	off, n := int64(req.Offset), int64(req.Length)
	if z := t.sess.can.zeroer; z != nil {
		noHole, fast := req.Flags&wire.CmdFlagNoHole != 0, req.Flags&wire.CmdFlagFastZero != 0
		if t.passesFUA(req) {
			return t.sess.can.fua.WriteZeroesFUA(off, n, noHole, fast)
		}
		if err := z.WriteZeroes(off, n, noHole, fast); err != nil {
			return err
		}
		return t.settle(req)
	}
	for n > 0 {
		part := zeroes[:min(n, int64(len(zeroes)))]
		if err := t.store(part, off, t.passesFUA(req)); err != nil {
			return err
		}
		off, n = off+int64(len(part)), n-int64(len(part))
	}
	return t.settle(req)
}
