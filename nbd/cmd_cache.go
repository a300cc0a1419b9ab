package nbd

import "xapi-nbd/nbd/wire"

var cmdCache = &command{
	ranged:  true,
	past:    wire.EINVAL,
	offered: func(s *session) bool { return s.can.cacher != nil },
	do:      (*transmission).cache,
}

// cache serves one CACHE.
func (t *transmission) cache(req wire.Request, _ []byte) error {
	if req.Length == 0 {
		return nil
	}
	return t.sess.can.cacher.Cache(int64(req.Offset), int64(req.Length))
}
