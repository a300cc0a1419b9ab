package xapi

import (
	"context"
	"fmt"
	"time"
)

const loginMethod = "session.login_with_password"

// Login opens a local root session. On the unix socket xapi ignores name and password, so
// success proves no identity. xapi allows 500 sessions per originator, so the caller must
// log out. After a TransportError with Sent a session may exist, which xapi expires.
func (c *Client) Login(ctx context.Context, originator string) (*Session, error) {
	ref, err := invoke[SessionRef](ctx, c, request{
		method: loginMethod, timeout: c.cfg.CallTimeout, params: []any{"", "", "1.0", originator},
	})
	if ref, err = nonEmpty(loginMethod, ref, err); err != nil {
		return nil, err
	}
	return c.Bind(ref), nil
}

// The pauses between login attempts: short after a restart of xapi, and longer on a booting
// host, to which the attempts are a load.
const (
	firstLoginPause = 250 * time.Millisecond
	lastLoginPause  = 4 * time.Second
)

// WaitLogin repeats Login until it succeeds or ctx ends; then its error wraps the cause of
// ctx and the error of the last attempt. It retries after every error: while a host boots,
// xapi's socket refuses connections, or xapi answers HTTP 500, HOST_STILL_BOOTING,
// UUID_INVALID for `host` or INTERNAL_ERROR.
func (c *Client) WaitLogin(ctx context.Context, originator string) (*Session, error) {
	var last error
	for pause := firstLoginPause; ; pause = min(2*pause, lastLoginPause) {
		s, err := c.Login(ctx, originator)
		if err == nil {
			if last != nil {
				c.log.InfoContext(ctx, "xapi answers")
			}
			return s, nil
		}
		if last == nil {
			c.log.WarnContext(ctx, "xapi does not answer, trying again", "err", err)
		}
		// The attempt that ctx ended says less than the one before.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, fmt.Errorf("xapi: waiting for login: %w; last attempt: %w", err, last)
		}
	}
}

// sleep waits for d. If ctx ends first it returns its error.
func sleep(ctx context.Context, d time.Duration) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}
