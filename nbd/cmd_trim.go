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
	if err := t.sess.can.trimmer.Trim(int64(req.Offset), int64(req.Length)); err != nil {
		return err
	}
	return t.settle(req)
}
