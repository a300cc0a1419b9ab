package main

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"xapi-nbd/nbd/client"
)

const (
	idleConns   = 256 // connections that are idle at a time
	dialsAtOnce = 8   // of them while they are made
)

// idle measures the memory of a server with many connections that have
// negotiated, have read a block each, and wait.
func (b *bench) idle(ctx context.Context, s *server) (got sample, err error) {
	if got.RSSFresh, _, err = memory(s.cmd.Process.Pid); err != nil {
		return got, err
	}
	conns := make([]*client.Conn, idleConns)
	defer func() {
		for _, c := range conns {
			if c != nil {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(dialsAtOnce)
	for i := range conns {
		group.Go(func() (err error) {
			if conns[i], err = s.dial(groupCtx); err == nil {
				err = conns[i].Read(groupCtx, make([]byte, smallRead), 0)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return got, fmt.Errorf("opening %d connections: %w", idleConns, err)
	}
	got.RSS, _, err = memory(s.cmd.Process.Pid)
	return got, err
}
