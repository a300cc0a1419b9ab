package main

import (
	"context"
	"time"
)

// startupGrace is how long after the start a client waits for xapi's first answer
// before it is refused. xapi answers within milliseconds if it is there at all, and
// the connection with which systemd starts the service, through xapi-nbd.socket, is
// always earlier.
const startupGrace = time.Second

// firstAnswer is xapi's.
type firstAnswer struct {
	latch           // open when it has come
	until time.Time // clients wait for it
}

// came waits for the answer, within the grace, and reports whether it has come.
func (f firstAnswer) came(ctx context.Context) bool {
	if f.isOpen() {
		return true
	}
	ctx, cancel := context.WithDeadline(ctx, f.until)
	defer cancel()
	select {
	case <-f.latch:
		return true
	case <-ctx.Done():
		return f.isOpen()
	}
}
