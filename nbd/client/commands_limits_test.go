package client

import (
	"bytes"
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// Requests that the server does not advertise, or would have to refuse, are not sent.
func TestConnRefusesByItself(t *testing.T) {
	bare := wire.ExportInfo{Size: 1 << 20, Flags: wire.FlagHasFlags, BlockSizes: wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: 8192}}
	with := func(f wire.TransmissionFlags) wire.ExportInfo {
		info := bare
		info.Flags |= f
		return info
	}
	p := make([]byte, 512)
	tests := []struct {
		name string
		info wire.ExportInfo
		call func(ctx context.Context, c *Conn) error
		want error
		text string
	}{
		{"flush", bare, func(ctx context.Context, c *Conn) error { return c.Flush(ctx) }, ErrUnsupported, "SEND_FLUSH"},
		{"trim", bare, func(ctx context.Context, c *Conn) error { return c.Trim(ctx, 0, 512, false) }, ErrUnsupported, "SEND_TRIM"},
		{"zeroes", bare, func(ctx context.Context, c *Conn) error { return c.WriteZeroes(ctx, 0, 512, ZeroOptions{}) }, ErrUnsupported, "WRITE_ZEROES"},
		{"fast zeroes", with(wire.FlagSendWriteZeroes), func(ctx context.Context, c *Conn) error { return c.WriteZeroes(ctx, 0, 512, ZeroOptions{Fast: true}) }, ErrUnsupported, "FAST_ZERO"},
		{"FUA", bare, func(ctx context.Context, c *Conn) error { return c.Write(ctx, p, 0, true) }, ErrUnsupported, "SEND_FUA"},
		{"cache", bare, func(ctx context.Context, c *Conn) error { return c.Cache(ctx, 0, 512) }, ErrUnsupported, "SEND_CACHE"},
		{"status", bare, func(ctx context.Context, c *Conn) error {
			_, err := c.BlockStatus(ctx, "base:allocation", 0, 512)
			return err
		}, ErrUnsupported, "base:allocation"},
		{"write to a read-only export", with(wire.FlagReadOnly), func(ctx context.Context, c *Conn) error { return c.Write(ctx, p, 0, false) }, ErrUnsupported, "read-only"},
		{"trim of a read-only export", with(wire.FlagReadOnly | wire.FlagSendTrim), func(ctx context.Context, c *Conn) error { return c.Trim(ctx, 0, 512, false) }, ErrUnsupported, "read-only"},
		{"unaligned offset", bare, func(ctx context.Context, c *Conn) error { return c.Write(ctx, p, 1, false) }, wire.EINVAL, "minimum block of 512"},
		{"unaligned length", bare, func(ctx context.Context, c *Conn) error { _, err := c.WriteAt(p[1:], 0); return err }, wire.EINVAL, "minimum block of 512"},
		{"write past the end", bare, func(ctx context.Context, c *Conn) error { return c.Write(ctx, p, 1<<20, false) }, wire.EINVAL, "outside"},
		{"read past the end", bare, func(ctx context.Context, c *Conn) error { return c.Read(ctx, p, 1<<20-511) }, wire.EINVAL, "outside"},
		{"negative offset", bare, func(ctx context.Context, c *Conn) error { return c.Read(ctx, p, -1) }, wire.EINVAL, "outside"},
		{"negative length", with(wire.FlagSendTrim), func(ctx context.Context, c *Conn) error { return c.Trim(ctx, 512, -512, false) }, wire.EINVAL, "outside"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn, requests, _ := recorder(t, structuredReplies, tt.info)
				if err := tt.call(t.Context(), conn); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got error %v, want one that matches %v and says %q", err, tt.want, tt.text)
				}
				if got := requests(); got != nil {
					t.Errorf("the client sent %v", got)
				}
			})
		})
	}
}

// Offsets near the largest possible size do not overflow.
func TestConnOfTheLargestExport(t *testing.T) {
	for _, unit := range []uint32{1, 512, 65536} {
		synctest.Test(t, func(t *testing.T) {
			info := wire.ExportInfo{Size: math.MaxInt64, Flags: allFlags, BlockSizes: wire.BlockSizes{Min: unit, Preferred: 65536, MaxPayload: 1 << 20}}
			conn, requests, _ := recorder(t, extendedHeaders, info)
			p := make([]byte, 10)
			if err := conn.Read(t.Context(), p, math.MaxInt64-10); err != nil || !bytes.Equal(p, patternOf(math.MaxInt64-10, 10)) {
				t.Errorf("error %v or wrong data", err)
			}
			if err := conn.Trim(t.Context(), 0, math.MaxInt64, false); err != nil {
				t.Error(err)
			}
			for _, r := range requests() {
				if r.Offset+r.Length > math.MaxInt64 {
					t.Errorf("request %+v is outside the export", r)
				}
			}
			if err := conn.Cache(t.Context(), math.MaxInt64, 1); !errors.Is(err, wire.EINVAL) {
				t.Errorf("behind the end: got error %v", err)
			}
		})
	}
}
