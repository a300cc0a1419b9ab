package nbd

import "context"

// Pacer is a Device whose data is to leave no faster than at some rate.
//
// When Paces says so, Pace is called before n bytes of data that were read are
// sent, by whatever way they go, and returns when they may. It is called
// concurrently. ctx ends when the server stops, the device ends or the peer has
// left: then it returns at once, since nobody who goes is to be held up.
type Pacer interface {
	Paces() bool
	Pace(ctx context.Context, n int64)
}

// pace waits until n bytes may be sent.
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
