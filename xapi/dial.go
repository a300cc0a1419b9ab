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

// dial connects to xapi's socket. A socket that does not wait gets EAGAIN when the
// backlog of a unix socket is full: xapi is there and has only not accepted for a
// moment, as when it collects garbage or its host is busy. Nothing was sent, so dial
// tries again until ctx ends. Other errors mean that nobody listens, for an unknown
// time, and are the caller's to handle.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	var dialer net.Dialer
	for pause := firstDialPause; ; pause = min(2*pause, lastDialPause) {
		conn, err := dialer.DialContext(ctx, "unix", socket)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		// Many wait for the same place at the same time.
		if sleep(ctx, pause/2+rand.N(pause)) != nil {
			return nil, err
		}
	}
}
