package client

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

// recorder is a server that reports success for every request, and records the requests and
// the data of writes.
func recorder(t *testing.T, mode replyMode, info wire.ExportInfo) (*Conn, func() []wire.Request, *[]byte) {
	var got []wire.Request
	payload := new([]byte)
	conn := connWith(t, against(t, func(s *script) {
		s.exports(t, mode, info)
		for {
			r := s.requestIn(mode)
			if r.Command == wire.CmdDisc {
				return
			}
			if r.Command == wire.CmdWrite {
				*payload = append(*payload, s.receive(int(r.Length))...)
			}
			reply := chunk(mode, r, done, wire.ChunkNone, nil)
			switch {
			case mode == simpleReplies && r.Command == wire.CmdRead:
				reply = simpleReply(0, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...)
			case mode == simpleReplies:
				reply = simpleReply(0, r.Cookie)
			case r.Command == wire.CmdRead:
				reply = chunk(mode, r, done, wire.ChunkOffsetData, dataAt(int(r.Offset), int(r.Length)))
			}
			r.Cookie = 0
			got = append(got, r)
			s.send(reply)
		}
	}), "a", nil)
	return conn, func() []wire.Request {
		synctest.Wait()
		r := got
		got = nil
		return r
	}, payload
}

var threeModes = map[string]replyMode{"simple": simpleReplies, "structured": structuredReplies, "extended": extendedHeaders}

// Every call sends the command, flags, offset and length that its arguments ask for.
func TestConnCommands(t *testing.T) {
	blocky := wire.ExportInfo{Size: 10<<30 + 100, Flags: allFlags, BlockSizes: wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: 8192}}
	const big = 9 << 30
	type req = wire.Request
	data := patternOf(3, 20000)[:19968]
	tests := []struct {
		name     string
		call     func(ctx context.Context, c *Conn) error
		compact  []req
		extended []req // nil: the same
	}{
		{"write", func(ctx context.Context, c *Conn) error { return c.Write(ctx, data, 512, false) }, []req{
			{Command: wire.CmdWrite, Offset: 512, Length: 8192}, {Command: wire.CmdWrite, Offset: 8704, Length: 8192},
			{Command: wire.CmdWrite, Offset: 16896, Length: 3584},
		}, []req{
			{Command: wire.CmdWrite, Flags: wire.CmdFlagPayloadLen, Offset: 512, Length: 8192},
			{Command: wire.CmdWrite, Flags: wire.CmdFlagPayloadLen, Offset: 8704, Length: 8192},
			{Command: wire.CmdWrite, Flags: wire.CmdFlagPayloadLen, Offset: 16896, Length: 3584},
		}},
		{"flush", func(ctx context.Context, c *Conn) error { return c.Flush(ctx) }, []req{{Command: wire.CmdFlush}}, nil},
		{"trim with FUA", func(ctx context.Context, c *Conn) error { return c.Trim(ctx, 512, 1024, true) },
			[]req{{Command: wire.CmdTrim, Flags: wire.CmdFlagFUA, Offset: 512, Length: 1024}}, nil},
		{"trim of much", func(ctx context.Context, c *Conn) error { return c.Trim(ctx, 0, big, false) }, []req{
			{Command: wire.CmdTrim, Length: maxCompactLength},
			{Command: wire.CmdTrim, Offset: maxCompactLength, Length: maxCompactLength},
			{Command: wire.CmdTrim, Offset: 2 * maxCompactLength, Length: big - 2*maxCompactLength},
		}, []req{{Command: wire.CmdTrim, Length: big}}},
		{"zeroes", func(ctx context.Context, c *Conn) error {
			return c.WriteZeroes(ctx, 1024, 512, ZeroOptions{NoHole: true, Fast: true, FUA: true})
		}, []req{{Command: wire.CmdWriteZeroes, Flags: wire.CmdFlagFUA | wire.CmdFlagNoHole | wire.CmdFlagFastZero, Offset: 1024, Length: 512}}, nil},
		{"zeroes at the odd end", func(ctx context.Context, c *Conn) error { return c.WriteZeroes(ctx, 10<<30, 100, ZeroOptions{}) },
			[]req{{Command: wire.CmdWriteZeroes, Offset: 10 << 30, Length: 100}}, nil},
		{"cache", func(ctx context.Context, c *Conn) error { return c.Cache(ctx, 1000, 100) },
			[]req{{Command: wire.CmdCache, Offset: 512, Length: 1024}}, nil},
		{"nothing", func(ctx context.Context, c *Conn) error {
			return errors.Join(c.Read(ctx, nil, 5), c.Write(ctx, nil, 512, true), c.Trim(ctx, 0, 0, false), c.Cache(ctx, 7, 0))
		}, nil, nil},
	}
	for how, mode := range threeModes {
		for _, tt := range tests {
			t.Run(how+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					conn, requests, payload := recorder(t, mode, blocky)
					if err := tt.call(t.Context(), conn); err != nil {
						t.Fatal(err)
					}
					want := tt.compact
					if mode == extendedHeaders && tt.extended != nil {
						want = tt.extended
					}
					if diff := cmp.Diff(want, requests()); diff != "" {
						t.Errorf("requests (-want +got):\n%s", diff)
					}
					if tt.name == "write" && !bytes.Equal(*payload, data) {
						t.Error("wrong data was written")
					}
				})
			})
		}
	}
}
