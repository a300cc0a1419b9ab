//go:build !linux

package nbd

import (
	"errors"
	"net"
	"sync/atomic"
	"time"
)

// Elsewhere everything is read and written.
type (
	splicer  struct{}
	pipeline struct{ n int }
)

const spliceMin = 0

var errNoPipe = errors.New("no splice on this system")

func newSplicer(*conn, capabilities) *splicer          { return nil }
func (*splicer) fill(*pipeline, int64, int) error      { return errNoPipe }
func (*splicer) send(header []byte, _ *pipeline) error { return errNoPipe }
func (*pipeline) release()                             {}

type fileCache struct{}

var errNotCached = errNoPipe

func newFileCache(capabilities) *fileCache      { return nil }
func (*fileCache) sees() bool                   { return false }
func (*fileCache) has(off, n int64) bool        { return false }
func (*fileCache) read(p []byte, _ int64) error { return errNotCached }
func (*fileCache) takes(off, n int64) error     { return nil }

// socket is nothing that anybody has.
type socket struct {
	net.Conn
	manner atomic.Int32
}

func newSocket(net.Conn) *socket              { return nil }
func (*socket) writeAll(...[]byte) error      { return errNoPipe }
func (*socket) within(patience time.Duration) {}

func closeIdlePipes() {}
