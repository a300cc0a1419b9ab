package nbd

import "context"

// Pacer is a Device that limits the rate at which its data is sent and written.
//
// If Paces returns true, the server calls Pace before it sends n bytes that it has read, and
// before it calls WriteAt or WriteFUA with n bytes. It goes on when Pace returns. Both are called concurrently. ctx is done when the
// server stops, the device is revoked or the peer has left; Pace must then return at once.
type Pacer interface {
	Paces() bool
	Pace(ctx context.Context, n int64)
}

// pace waits until n bytes may be sent or written.
func (t *transmission) pace(n int64) (err error) {
	p := t.sess.can.pacer
	if p == nil {
		return nil
	}
	defer recoverTo(&err)
	if p.Paces() {
		p.Pace(t.ctx, n)
	}
	return nil
}
