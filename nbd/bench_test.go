package nbd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
)

// cheapDevice is a device whose reads take almost no time, so that the benchmark measures the
// protocol. It has no zeroes.
type cheapDevice int64

func (d cheapDevice) Size() int64 { return int64(d) }
func (cheapDevice) Close() error  { return nil }

func (cheapDevice) ReadAt(p []byte, _ int64) (int, error) {
	for i := 0; i < len(p); i += zeroUnit {
		p[i] = 1
	}
	return len(p), nil
}

type cheapExporter struct{}

func (cheapExporter) Open(context.Context, Peer, string) (Device, error) {
	return cheapDevice(1 << 30), nil
}

// BenchmarkRead reads over loopback TCP with our own client, depth requests
// in flight on one connection.
func BenchmarkRead(b *testing.B) {
	l := listen(b, "tcp")
	serveOn(b, &Server{Exporter: cheapExporter{}}, l)
	for _, size := range []int{4 << 10, 64 << 10, 2 << 20} {
		for _, depth := range []int{1, 16} {
			b.Run(fmt.Sprintf("size=%dKiB/depth=%d", size>>10, depth), func(b *testing.B) {
				benchmarkRead(b, l, size, depth)
			})
		}
	}
}

func benchmarkRead(b *testing.B, l net.Listener, size, depth int) {
	conn := dialGo(b, l)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range depth {
		wg.Go(func() {
			p := make([]byte, size)
			for {
				i := next.Add(1) - 1
				if i >= int64(b.N) {
					return
				}
				off := i * int64(size) % (conn.Size() - int64(size))
				if _, err := conn.ReadAt(p, off-off%4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkBuffer gets a buffer from the pool and returns it.
func BenchmarkBuffer(b *testing.B) {
	for _, size := range []int{4 << 10, 256 << 10, 2 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				getBuffer(size).release()
			}
		})
	}
}

// nowhere is a connection that discards writes.
type nowhere struct{ net.Conn }

func (nowhere) Write(p []byte) (int, error)      { return len(p), nil }
func (nowhere) SetWriteDeadline(time.Time) error { return nil }
func (nowhere) RemoteAddr() net.Addr             { return &net.UnixAddr{} }

// BenchmarkReplyWriter makes the replies of reads of 4 KiB.
func BenchmarkReplyWriter(b *testing.B) {
	for _, mode := range []replyMode{simpleReplies, structuredReplies} {
		b.Run(fmt.Sprintf("mode=%d", mode), func(b *testing.B) {
			s := &Server{Exporter: cheapExporter{}, Logger: slog.New(slog.DiscardHandler)}
			s.init()
			w := replyWriter{c: newConn(s, nowhere{}, "1"), mode: mode, sending: newSendLock()}
			buf := getBuffer(4096)
			req := wire.Request{Command: wire.CmdRead, Cookie: 1, Length: 4096}
			b.SetBytes(4096)
			b.ReportAllocs()
			for b.Loop() {
				w.sendRead(req, buf, 4096)
			}
		})
	}
}
