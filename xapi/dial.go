package xapi

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"time"
)

// The pauses between attempts to connect while xapi's backlog is full.
const (
	firstDialPause = 5 * time.Millisecond
	lastDialPause  = 250 * time.Millisecond
)

// dial connects to xapi's socket. A non-blocking connect fails with EAGAIN if the backlog of
// the unix socket is full: xapi is running but has not accepted for a moment, for example
// during a garbage collection. Nothing was sent, so dial tries again until ctx ends. Other
// errors, such as that no process listens, are returned.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	var dialer net.Dialer
	for pause := firstDialPause; ; pause = min(2*pause, lastDialPause) {
		conn, err := dialer.DialContext(ctx, "unix", socket)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		// The jitter is for callers that wait at the same time.
		if sleep(ctx, pause/2+rand.N(pause)) != nil {
			return nil, err
		}
	}
}
