package nbd

import "context"

// Pacer is a Device that limits the rate at which its data is sent and written.
//
// If Paces returns true, the server calls Pace before it sends n bytes that it has read, before
// it calls WriteAt or WriteFUA with n bytes, and before it calls WriteZeroes or WriteZeroesFUA,
// without fast, for n bytes, at most 16 MiB at a time. It goes on when Pace returns. Trims and
// fast zeroing, which move no data, are not paced. Both methods are called concurrently. ctx is
// done when the server stops, the device is revoked or the peer has left; Pace must then return at
// once.
type Pacer interface {
	Paces() bool
	Pace(ctx context.Context, n int64)
}

// paces reports whether the device is a Pacer that limits the rate now.
func (t *transmission) paces() bool { return t.sess.can.pacer != nil && t.sess.can.pacer.Paces() }

// pace waits until n bytes may be sent or written.
func (t *transmission) pace(n int64) (err error) {
	defer recoverTo(&err)
	if t.paces() {
		t.sess.can.pacer.Pace(t.ctx, n)
	}
	return nil
}
