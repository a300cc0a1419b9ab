package nbd

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// cheapDevice costs next to nothing to read, so that what is measured is the
// protocol. Nothing of it can travel as a hole.
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := &Server{Exporter: cheapExporter{}}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	b.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			b.Error(err)
		}
		<-served
	})
	for _, size := range []int{4 << 10, 64 << 10, 2 << 20} {
		for _, depth := range []int{1, 16} {
			b.Run(fmt.Sprintf("size=%dKiB/depth=%d", size>>10, depth), func(b *testing.B) {
				benchmarkRead(b, l.Addr().String(), size, depth)
			})
		}
	}
}

func benchmarkRead(b *testing.B, addr string, size, depth int) {
	c, err := Dial(b.Context(), "tcp", addr, nil)
	if err != nil {
		b.Fatal(err)
	}
	conn, err := c.Go(b.Context(), "cheap")
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
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
