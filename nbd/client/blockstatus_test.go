package client

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/wire"
)

type extents = []wire.Extent

// ext returns extents; its parameters are the length and the status of each.
func ext(pairs ...uint64) extents {
	var e extents
	for i := 0; i < len(pairs); i += 2 {
		e = append(e, wire.Extent{Length: pairs[i], Status: pairs[i+1]})
	}
	return e
}

// status returns a status chunk of the type for the mode.
func status(m replyMode, r wire.Request, flags wire.ChunkFlags, id uint32, e extents) []byte {
	if m == extendedHeaders {
		return chunk(m, r, flags, wire.ChunkBlockStatusExt, wire.AppendBlockStatusExt(nil, id, e))
	}
	return chunk(m, r, flags, wire.ChunkBlockStatus, wire.AppendBlockStatus(nil, id, e))
}

// asksStatus negotiates two contexts, calls BlockStatus for the first, and then
// Flush, which fails if the connection has ended.
func asksStatus(t *testing.T, mode replyMode, off, n int64, answer func(r wire.Request) []byte) (got extents, r wire.Request, err error, ended bool) {
	info := wire.ExportInfo{Size: 1<<20 - 100, Flags: allFlags, BlockSizes: wire.BlockSizes{Min: 512, Preferred: 4096, MaxPayload: 1 << 20}}
	conn := connWith(t, against(t, func(s *script) {
		s.exports(t, mode, info, wire.MetaContext{ID: 7, Name: wire.BaseAllocation}, wire.MetaContext{ID: 0, Name: "x:y"}, wire.MetaContext{ID: 9, Name: "not:wanted"})
		r = s.requestIn(mode)
		s.send(answer(r))
		s.send(chunk(mode, s.requestIn(mode), done, wire.ChunkNone, nil))
	}), "a", &Config{MetaContexts: []string{wire.BaseAllocation, "x:"}})
	if diff := cmp.Diff([]string{wire.BaseAllocation, "x:y"}, conn.MetaContexts()); diff != "" {
		t.Errorf("contexts (-want +got):\n%s", diff)
	}
	got, err = conn.BlockStatus(t.Context(), wire.BaseAllocation, off, n)
	return got, r, err, conn.Flush(t.Context()) != nil
}

func TestConnBlockStatus(t *testing.T) {
	tests := []struct {
		name   string
		off, n int64
		answer extents
		want   extents
	}{
		{"exact", 512, 1024, ext(512, 3, 512, 0), ext(512, 3, 512, 0)},
		{"short", 512, 1024, ext(100, 1), ext(100, 1)},
		{"long", 512, 1024, ext(1<<31, 2), ext(1024, 2)},
		{"too many", 512, 1024, ext(512, 1, 1024, 2, 512, 3), ext(512, 1, 512, 2)},
		{"unaligned", 700, 1, ext(100, 0, 88, 1, 324, 2), ext(1, 2)},
		{"at the odd end", 1<<20 - 101, 1, ext(412, 5), ext(1, 5)},
		{"unknown bits", 0, 512, ext(512, 0xfffffffc), ext(512, 0xfffffffc)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					got, r, err, ended := asksStatus(t, mode, tt.off, tt.n, func(r wire.Request) []byte {
						return slices.Concat(status(mode, r, 0, 9, ext(1, 1)), status(mode, r, 0, 7, tt.answer), status(mode, r, done, 0, ext(5, 5)))
					})
					if diff := cmp.Diff(tt.want, got); diff != "" || err != nil || ended {
						t.Errorf("error %v, connection ended: %v, extents (-want +got):\n%s", err, ended, diff)
					}
					if r.Command != wire.CmdBlockStatus || r.Offset%512 != 0 || r.Length%512 != 0 && r.Offset+r.Length != 1<<20-100 {
						t.Errorf("request %+v is not aligned", r)
					}
				})
			})
		})
	}
}

// A status that violates the protocol is an error.
func TestConnBlockStatusInvalid(t *testing.T) {
	good := ext(1024, 1)
	tests := []struct {
		name   string
		answer func(m replyMode, r wire.Request) []byte
		want   string
		ends   bool
	}{
		{"no status", func(m replyMode, r wire.Request) []byte { return chunk(m, r, done, wire.ChunkNone, nil) }, "left out", false},
		{"another context only", func(m replyMode, r wire.Request) []byte { return status(m, r, done, 0, good) }, "left out", false},
		{"wrong id", func(m replyMode, r wire.Request) []byte {
			return append(status(m, r, 0, 8, good), status(m, r, done, 7, good)...)
		}, "not granted", false},
		{"twice", func(m replyMode, r wire.Request) []byte {
			return append(status(m, r, 0, 7, good), status(m, r, done, 7, good)...)
		}, "twice", false},
		{"refused", func(m replyMode, r wire.Request) []byte {
			return append(status(m, r, 0, 7, good), chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, wire.EIO, "", 0))...)
		}, "NBD_EIO", false},
		{"no extents", func(m replyMode, r wire.Request) []byte { return status(m, r, done, 7, nil) }, "malformed", true},
		{"empty extent", func(m replyMode, r wire.Request) []byte { return status(m, r, done, 7, ext(512, 0, 0, 1)) }, "malformed", true},
		{"half an extent", func(m replyMode, r wire.Request) []byte {
			typ := wire.ChunkBlockStatus
			if m == extendedHeaders {
				typ = wire.ChunkBlockStatusExt
			}
			return chunk(m, r, done, typ, make([]byte, 22))
		}, "malformed", true},
		{"the other kind", func(m replyMode, r wire.Request) []byte {
			if m == extendedHeaders {
				return chunk(m, r, done, wire.ChunkBlockStatus, wire.AppendBlockStatus(nil, 7, good))
			}
			return chunk(m, r, done, wire.ChunkBlockStatusExt, wire.AppendBlockStatusExt(nil, 7, good))
		}, "unknown chunk", true},
		{"data", func(m replyMode, r wire.Request) []byte {
			return chunk(m, r, done, wire.ChunkOffsetData, dataAt(int(r.Offset), int(r.Length)))
		}, "NBD_REPLY_TYPE_OFFSET_DATA", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					_, _, err, ended := asksStatus(t, mode, 600, 1024, func(r wire.Request) []byte { return tt.answer(mode, r) })
					if err == nil || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("got error %v, want one that says %q", err, tt.want)
					}
					if ended != tt.ends {
						t.Errorf("connection ended: %v, want %v", ended, tt.ends)
					}
				})
			})
		})
	}
}

// The client rounds the offset down to a block. A reply that ends before the caller's offset
// has no extent for the caller: base:allocation reports data instead.
func TestConnBlockStatusEndsBeforeTheOffset(t *testing.T) {
	everyMode(t, func(t *testing.T, mode replyMode) {
		synctest.Test(t, func(t *testing.T) {
			info := wire.ExportInfo{Size: 1 << 20, Flags: allFlags, BlockSizes: wire.BlockSizes{Min: 4096, Preferred: 4096, MaxPayload: 1 << 20}}
			contexts := []wire.MetaContext{{ID: 7, Name: wire.BaseAllocation}, {ID: 8, Name: "x:y"}}
			conn := connWith(t, against(t, func(s *script) {
				s.exports(t, mode, info, contexts...)
				for {
					r := s.requestIn(mode)
					s.send(status(mode, r, 0, 8, ext(512, 1)), status(mode, r, done, 7, ext(512, uint64(wire.StateZero))))
				}
			}), "a", &Config{MetaContexts: []string{wire.BaseAllocation, "x:y"}})
			for _, tt := range []struct {
				off, n int64
				want   extents
			}{
				{0, 8192, ext(512, uint64(wire.StateZero))},
				{512, 8192, ext(4096-512, 0)},
				{512, 10, ext(10, 0)},
				{4096, 8192, ext(512, uint64(wire.StateZero))},
			} {
				got, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, tt.off, tt.n)
				if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
					t.Errorf("%d bytes at %d: error %v, extents (-want +got):\n%s", tt.n, tt.off, err, diff)
				}
			}
			// Only base:allocation has a status that is always safe.
			if got, err := conn.BlockStatus(t.Context(), "x:y", 512, 8192); err == nil || !strings.Contains(err.Error(), "no status of the range") {
				t.Errorf("another context: got %v, error %v", got, err)
			}
		})
	})
}

// Without metadata contexts the export can be read, and BlockStatus fails.
func TestConnWithoutContexts(t *testing.T) {
	answers := map[string]func(s *script){
		"none":    func(s *script) { s.ack(wire.OptSetMetaContext) },
		"refused": func(s *script) { s.refuse(wire.OptSetMetaContext, wire.RepErrUnsup) },
		"another": func(s *script) {
			m := wire.MetaContext{ID: 1, Name: "something:else"}
			s.send(wire.AppendOptionReply(nil, wire.OptSetMetaContext, wire.RepMetaContext, m.Append(nil)))
			s.ack(wire.OptSetMetaContext)
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := connWith(t, against(t, func(s *script) {
					s.replies(t, structuredReplies)
					s.want(t, wire.OptSetMetaContext)
					answer(s)
					s.want(t, wire.OptGo)
					s.send(goReply(wire.RepInfo, exportInfoData(allFlags)), goReply(wire.RepAck, nil))
					s.discard()
				}), "a", &Config{MetaContexts: []string{wire.BaseAllocation}})
				for _, m := range []string{wire.BaseAllocation, "something:else", ""} {
					if _, err := conn.BlockStatus(t.Context(), m, 0, 512); !errors.Is(err, ErrUnsupported) {
						t.Errorf("%q: got error %v, want ErrUnsupported", m, err)
					}
				}
				if got := conn.MetaContexts(); got != nil {
					t.Errorf("contexts %q, want none", got)
				}
			})
		})
	}
}

// TestConnExtents has a server whose replies cover less than the client asks for.
func TestConnExtents(t *testing.T) {
	everyMode(t, func(t *testing.T, mode replyMode) {
		synctest.Test(t, func(t *testing.T) {
			nc := against(t, func(s *script) {
				s.exports(t, mode, mebibyte, wire.MetaContext{ID: 1, Name: wire.BaseAllocation})
				for _, e := range []extents{ext(512, 0, 1024, 3), ext(2048, 0), ext(4096, 3)} {
					s.send(status(mode, s.requestIn(mode), done, 1, e))
				}
				s.send(chunk(mode, s.requestIn(mode), done, wire.ChunkError, failure(wire.ChunkError, wire.EIO, "", 0)))
				s.discard()
			})
			conn := connWith(t, nc, "a", &Config{MetaContexts: []string{wire.BaseAllocation}})
			var got extents
			for e, err := range conn.Extents(t.Context(), wire.BaseAllocation, 4096, 5632) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e)
			}
			if diff := cmp.Diff(ext(512, 0, 1024, 3, 2048, 0, 2048, 3), got); diff != "" {
				t.Errorf("extents (-want +got):\n%s", diff)
			}
			for e, err := range conn.Extents(t.Context(), wire.BaseAllocation, 0, 512) {
				if !errors.Is(err, wire.EIO) || e != (wire.Extent{}) {
					t.Errorf("got %v, %v, want NBD_EIO", e, err)
				}
			}
		})
	})
}
