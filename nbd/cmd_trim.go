package nbd

import "xapi-nbd/nbd/wire"

var cmdTrim = &command{
	writes:  true,
	ranged:  true,
	past:    wire.EINVAL,
	offered: func(s *session) bool { return s.can.trimmer != nil },
	do:      (*transmission).trim,
}

// trim serves one TRIM.
func (t *transmission) trim(req wire.Request, _ []byte) error {
	if req.Length == 0 {
		return nil
	}
	off, n := int64(req.Offset), int64(req.Length)
	if t.passesFUA(req) {
		return t.sess.can.fua.TrimFUA(off, n)
	}
	if err := t.sess.can.trimmer.Trim(off, n); err != nil {
		return err
	}
	return t.settle(req)
}
