package client

import (
	"bytes"
	"errors"
	"io/fs"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

// Block sizes that the protocol allows are observed, others replaced.
func TestConnBlockSizes(t *testing.T) {
	const mib = 1 << 20
	tests := []struct {
		name       string
		size       uint64
		said, want wire.BlockSizes
	}{
		{"nothing", mib, wire.BlockSizes{}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 32 * mib}},
		{"ordinary", mib, wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: mib}, wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: mib}},
		{"small but valid", mib, wire.BlockSizes{Min: 1, Preferred: 512, MaxPayload: 512}, wire.BlockSizes{Min: 1, Preferred: 512, MaxPayload: 512}},
		{"no multiple", mib, wire.BlockSizes{Min: 4096, Preferred: 4096, MaxPayload: mib - 1}, wire.BlockSizes{Min: 4096, Preferred: 4096, MaxPayload: mib - 4096}},
		{"no limit", mib, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 1<<32 - 1}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 32 * mib}},
		{"maximum of 10", mib, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 10}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 4096}},
		{"maximum of 10 with a preferred size of 1 MiB", mib, wire.BlockSizes{Min: 1, Preferred: mib, MaxPayload: 10}, wire.BlockSizes{Min: 1, Preferred: mib, MaxPayload: mib}},
		{"maximum below the minimum", mib, wire.BlockSizes{Min: 4096, Preferred: 4096, MaxPayload: 4095}, wire.BlockSizes{Min: 4096, Preferred: 4096, MaxPayload: 4096}},
		{"maximum of 0", mib, wire.BlockSizes{Min: 1, Preferred: 4096}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 32 * mib}},
		{"tiny export", 10, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 10}, wire.BlockSizes{Min: 1, Preferred: 512, MaxPayload: 10}},
		{"maximum below the preferred size", 8 * mib, wire.BlockSizes{Min: 1, Preferred: 4 * mib, MaxPayload: mib}, wire.BlockSizes{Min: 1, Preferred: mib, MaxPayload: mib}},
		{"minimum no power of two", mib, wire.BlockSizes{Min: 3000, Preferred: 4096, MaxPayload: mib}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: mib}},
		{"minimum above 64 KiB", mib, wire.BlockSizes{Min: 1 << 17, Preferred: 1 << 17, MaxPayload: mib}, wire.BlockSizes{Min: 1, Preferred: 1 << 17, MaxPayload: mib}},
		{"preferred below the minimum", mib, wire.BlockSizes{Min: 8192, Preferred: 512, MaxPayload: mib}, wire.BlockSizes{Min: 8192, Preferred: 8192, MaxPayload: mib}},
		{"preferred no power of two", mib, wire.BlockSizes{Min: 1, Preferred: 3000, MaxPayload: mib}, wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: mib}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				info := wire.ExportInfo{Size: tt.size, Flags: allFlags, BlockSizes: tt.said}
				conn, requests, _ := recorder(t, structuredReplies, info)
				if diff := cmp.Diff(tt.want, conn.BlockSizes()); diff != "" {
					t.Errorf("sizes (-want +got):\n%s", diff)
				}
				if got := conn.Info().BlockSizes; got != tt.said {
					t.Errorf("Info has %+v, want the server's words %+v", got, tt.said)
				}
				p := make([]byte, min(tt.size, 10_000))
				if err := conn.Read(t.Context(), p, 0); err != nil || !bytes.Equal(p, patternOf(0, len(p))) {
					t.Errorf("error %v or wrong data", err)
				}
				// No more requests than necessary.
				most := uint64(len(p))/uint64(tt.want.MaxPayload) + 1
				if got := uint64(len(requests())); got > most {
					t.Errorf("%d requests for %d bytes, want at most %d", got, len(p), most)
				}
			})
		})
	}
}

// Errors of the server match the errors of the system that mean the same.
func TestClientErrorsMatchTheSystems(t *testing.T) {
	for errno, want := range map[wire.Errno][]error{
		wire.EPERM: {syscall.EPERM, fs.ErrPermission}, wire.EIO: {syscall.EIO}, wire.ENOMEM: {syscall.ENOMEM},
		wire.EINVAL: {syscall.EINVAL}, wire.ENOSPC: {syscall.ENOSPC}, wire.EOVERFLOW: {syscall.EOVERFLOW},
		wire.ENOTSUP: {syscall.ENOTSUP, errors.ErrUnsupported}, wire.ESHUTDOWN: {syscall.ESHUTDOWN},
	} {
		synctest.Test(t, func(t *testing.T) {
			conn := connTo(t, against(t, func(s *script) {
				s.transmission()
				s.send(simpleReply(errno, s.request().Cookie))
				s.discard()
			}), "a")
			err := conn.Read(t.Context(), make([]byte, 512), 0)
			for _, target := range append(want, errno) {
				if !errors.Is(err, target) {
					t.Errorf("%v does not match %v", err, target)
				}
			}
			for _, other := range []error{syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.ENOSPC, fs.ErrExist} {
				if errors.Is(err, other) && !errors.Is(want[0], other) {
					t.Errorf("%v matches %v too", err, other)
				}
			}
		})
	}
	for reply, want := range map[wire.OptionReply]error{
		wire.RepErrUnsup: errors.ErrUnsupported, wire.RepErrPolicy: fs.ErrPermission,
		wire.RepErrUnknown: fs.ErrNotExist, wire.RepErrShutdown: syscall.ESHUTDOWN,
	} {
		var err error = &Error{Op: "NBD_OPT_GO", Reply: reply}
		if !errors.Is(err, want) || errors.Is(err, syscall.EIO) {
			t.Errorf("%v does not match %v, or too much", err, want)
		}
	}
	if !errors.Is(ErrUnsupported, errors.ErrUnsupported) {
		t.Error("ErrUnsupported does not match that of package errors")
	}
}
