package nbd

import "xapi-nbd/nbd/wire"

var cmdFlush = &command{
	offered: func(s *session) bool { return s.can.canFlush() },
	do:      (*transmission).flush,
}

// flush serves one FLUSH. There is nothing to do for a WriteThrough.
func (t *transmission) flush(wire.Request, []byte) error {
	if t.sess.can.flusher == nil {
		return nil
	}
	return t.sess.can.flusher.Flush()
}
