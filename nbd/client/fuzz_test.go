package client

import (
	"bytes"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"context"

	"xapi-nbd/nbd/wire"
)

// FuzzClientConn sends the bytes of a server to a client that makes every kind of call.
// synctest finds calls that never return and goroutines that are left. The memory around
// buffers must not change, nor the buffers of calls whose context is done.
func FuzzClientConn(f *testing.F) {
	greeting := wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	opt := func(o wire.Option, typ wire.OptionReply, data []byte) []byte {
		return wire.AppendOptionReply(nil, o, typ, data)
	}
	info := wire.ExportInfo{Size: 100_000, Flags: allFlags}
	context := wire.MetaContext{ID: 1, Name: wire.BaseAllocation}
	for _, mode := range []replyMode{simpleReplies, structuredReplies, extendedHeaders} {
		b := bytes.Clone(greeting)
		switch mode {
		case extendedHeaders:
			b = append(b, opt(wire.OptExtendedHeaders, wire.RepAck, nil)...)
		case structuredReplies:
			b = slices.Concat(b, opt(wire.OptExtendedHeaders, wire.RepErrUnsup, nil), opt(wire.OptStructuredReply, wire.RepAck, nil))
		default:
			b = slices.Concat(b, opt(wire.OptExtendedHeaders, wire.RepErrUnsup, nil), opt(wire.OptStructuredReply, wire.RepErrUnsup, nil))
		}
		b = slices.Concat(b, serverReply("a", ""), opt(wire.OptList, wire.RepAck, nil))
		if mode != simpleReplies {
			b = slices.Concat(b, opt(wire.OptSetMetaContext, wire.RepMetaContext, context.Append(nil)), opt(wire.OptSetMetaContext, wire.RepAck, nil))
		}
		b = slices.Concat(b, goReply(wire.RepInfo, info.AppendInfo(nil, wire.InfoExport)), goReply(wire.RepAck, nil))
		r := wire.Request{Cookie: 1, Length: 1000}
		if mode == simpleReplies {
			f.Add(append(b, simpleReply(0, 1, make([]byte, 1000)...)...))
			continue
		}
		s := wire.Request{Cookie: 2, Length: 4096}
		f.Add(slices.Concat(b, chunk(mode, r, 0, wire.ChunkOffsetHole, holeAt(0, 500)), chunk(mode, s, done, wire.ChunkNone, nil),
			chunk(mode, r, done, wire.ChunkOffsetData, dataAt(500, 500)), chunk(mode, s, 0, wire.ChunkError, failure(wire.ChunkError, 5, "x", 0))))
		f.Add(slices.Concat(b, status(mode, wire.Request{Cookie: 1}, done, 1, ext(512, 3)), chunk(mode, r, done, wire.ChunkErrorOffset, failure(wire.ChunkErrorOffset, 5, "x", 0))))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			c, err := New(t.Context(), against(t, func(s *script) {
				var wg sync.WaitGroup
				wg.Go(s.discard)
				s.nc.Write(b)
				synctest.Wait()
				s.nc.Close()
				wg.Wait()
			}), &Config{MetaContexts: []string{wire.BaseAllocation}})
			if err != nil {
				return
			}
			useClient(t, c)
		})
	})
}

// useClient makes every kind of call, some of them with a context that is done early.
func useClient(t *testing.T, c *Client) {
	defer c.Abort()
	c.List(t.Context())
	conn, err := c.Go(t.Context(), "a")
	if err != nil {
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, ctx := range []context.Context{t.Context(), ctx} {
		n := int(min(conn.Size(), 1000))
		wg.Go(func() {
			room := bytes.Repeat([]byte{0xa5}, n+20)
			conn.Read(ctx, room[10:10+n], 0)
			snapshot := bytes.Clone(room)
			<-conn.Done()
			if !bytes.Equal(room, snapshot) || bytes.Count(room[:10], []byte{0xa5}) != 10 || bytes.Count(room[10+n:], []byte{0xa5}) != 10 {
				t.Error("memory was written to that is not the client's")
			}
		})
		wg.Go(func() {
			if e, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, int64(n)); err == nil {
				var sum uint64
				for _, e := range e {
					sum += e.Length
				}
				if sum == 0 || sum > uint64(n) {
					t.Errorf("extents of %d bytes for %d", sum, n)
				}
			}
		})
		wg.Go(func() { conn.Write(ctx, make([]byte, n), 0, false) })
		wg.Go(func() { conn.Flush(ctx) })
		wg.Go(func() { conn.WriteZeroes(ctx, 0, int64(n), ZeroOptions{NoHole: true}) })
		wg.Go(func() { io.ReadFull(io.NewSectionReader(conn, 0, int64(n)), make([]byte, n)) })
	}
	wg.Wait()
}
