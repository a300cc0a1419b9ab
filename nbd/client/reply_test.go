package client

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// Chunks may arrive in any order, and between chunks of other replies.
func TestConnTakesChunksInAnyOrder(t *testing.T) {
	everyMode(t, func(t *testing.T, mode replyMode) {
		synctest.Test(t, func(t *testing.T) {
			conn := connWith(t, against(t, func(s *script) {
				s.exports(t, mode, mebibyte)
				a, b := s.requestIn(mode), s.requestIn(mode)
				ao, bo := int(a.Offset), int(b.Offset)
				s.send(
					chunk(mode, b, 0, wire.ChunkOffsetHole, holeAt(bo+3000, 96)),
					chunk(mode, a, 0, wire.ChunkOffsetData, dataAt(ao+512, 512)),
					chunk(mode, b, 0, wire.ChunkOffsetData, dataAt(bo, 1)),
					chunk(mode, a, 0xfffe, wire.ChunkOffsetData, dataAt(ao+1024, 3072)), // unknown flags
					chunk(mode, b, done, wire.ChunkOffsetData, dataAt(bo+1, 2999)),
					chunk(mode, a, 0, wire.ChunkOffsetData, dataAt(ao, 512)),
				)
				c := s.requestIn(mode)
				s.send(chunk(mode, c, done, wire.ChunkNone, nil), chunk(mode, a, done, wire.ChunkNone, nil))
				s.discard()
			}), "a", nil)
			var wg sync.WaitGroup
			wg.Go(func() {
				p := make([]byte, 4096)
				if err := conn.Read(t.Context(), p, 8192); err != nil || !bytes.Equal(p, patternOf(8192, 4096)) {
					t.Errorf("first call: error %v or wrong data", err)
				}
			})
			synctest.Wait()
			p := bytes.Repeat([]byte{1}, 3096)
			want := append(patternOf(100, 3000), make([]byte, 96)...)
			if err := conn.Read(t.Context(), p, 100); err != nil || !bytes.Equal(p, want) {
				t.Errorf("second call: error %v or wrong data", err)
			}
			if err := conn.Flush(t.Context()); err != nil {
				t.Errorf("third call: %v", err)
			}
			wg.Wait()
		})
	})
}

func failure(t wire.ChunkType, errno wire.Errno, text string, off int) []byte {
	return wire.ChunkFailure{Errno: errno, Text: text, Offset: uint64(off)}.Append(nil, t)
}

// A failed request does not end the connection, as long as the client can find the next
// reply.
func TestConnGoesOnAfterAFailure(t *testing.T) {
	const off, n = 4096, 1024
	text := strings.Repeat("x", wire.MaxString)
	tests := []struct {
		name   string
		answer func(mode replyMode, r wire.Request) [][]byte
		errno  wire.Errno // 0: none
		where  int64      // of an OffsetError
		want   string
	}{
		{"error", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, wire.EIO, "disk\x07 on fire", 0))}
		}, wire.EIO, 0, "NBD_EIO: disk  on fire"},
		{"longest text", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, wire.ENOMEM, text, 0))}
		}, wire.ENOMEM, 0, text},
		{"at an offset", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{
				chunk(m, r, 0, wire.ChunkOffsetData, dataAt(off, 512)),
				chunk(m, r, 0, wire.ChunkErrorOffset, failure(wire.ChunkErrorOffset, wire.EIO, "here", off+512)),
				chunk(m, r, 0, wire.ChunkErrorOffset, failure(wire.ChunkErrorOffset, wire.EPERM, "and here", off+600)),
				chunk(m, r, done, wire.ChunkNone, nil),
			}
		}, wire.EIO, off + 512, "here (at offset 4608)"},
		{"beside all data", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{
				chunk(m, r, 0, wire.ChunkOffsetData, dataAt(off, n)),
				chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, wire.EIO, "", 0)),
			}
		}, wire.EIO, 0, ""},
		{"unknown number", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, 4711, "", 0))}
		}, wire.EINVAL, 0, ""},
		{"unknown type", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, 1<<15|4711, append(failure(wire.ChunkError, wire.ENOSPC, "", 0), make([]byte, 1000)...))}
		}, wire.ENOSPC, 0, ""},
		{"unknown type without a number", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, 1<<15|4711, []byte{1})}
		}, wire.EINVAL, 0, ""},
		{"nothing", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{chunk(m, r, done, wire.ChunkNone, nil)}
		}, 0, 0, "0 of 1024 bytes"},
		{"a gap", func(m replyMode, r wire.Request) [][]byte {
			return [][]byte{
				chunk(m, r, 0, wire.ChunkOffsetData, dataAt(off, 511)),
				chunk(m, r, done, wire.ChunkOffsetHole, holeAt(off+512, 512)),
			}
		}, 0, 0, "1023 of 1024 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					conn := connWith(t, against(t, func(s *script) {
						s.exports(t, mode, mebibyte)
						s.send(tt.answer(mode, s.requestIn(mode))...)
						s.send(chunk(mode, s.requestIn(mode), done, wire.ChunkOffsetData, dataAt(off, n)))
						s.discard()
					}), "a", nil)
					err := conn.Read(t.Context(), make([]byte, n), off)
					var refused *Error
					if err == nil || errors.As(err, &refused) != (tt.errno != 0) || !strings.Contains(err.Error(), tt.want) {
						t.Fatalf("got error %v, want one that says %q", err, tt.want)
					}
					if tt.errno != 0 && (!errors.Is(err, tt.errno) || refused.Op != "NBD_CMD_READ") {
						t.Errorf("got error %v, want %v of NBD_CMD_READ", err, tt.errno)
					}
					var at *OffsetError
					if errors.As(err, &at) != (tt.where != 0) || at != nil && at.Offset != tt.where {
						t.Errorf("got error %#v, want it at %d", err, tt.where)
					}
					p := make([]byte, n)
					if err := conn.Read(t.Context(), p, off); err != nil || !bytes.Equal(p, patternOf(off, n)) {
						t.Errorf("the next read: error %v or wrong data", err)
					}
				})
			})
		})
	}
}

// A chunk that violates the protocol ends the connection with an error that says how.
func TestConnEndsAfterABrokenChunk(t *testing.T) {
	const off, n = 4096, 1024
	one := func(flags wire.ChunkFlags, typ wire.ChunkType, payload []byte) func(replyMode, wire.Request) []byte {
		return func(m replyMode, r wire.Request) []byte { return chunk(m, r, flags, typ, payload) }
	}
	two := func(a, b []byte) func(replyMode, wire.Request) []byte {
		return func(m replyMode, r wire.Request) []byte {
			return append(chunk(m, r, 0, wire.ChunkOffsetData, a), chunk(m, r, 0, wire.ChunkOffsetData, b)...)
		}
	}
	tests := []struct {
		name   string
		answer func(replyMode, wire.Request) []byte
		want   string
	}{
		{"simple reply", func(_ replyMode, r wire.Request) []byte {
			return simpleReply(wire.Success, r.Cookie, make([]byte, n)...)
		}, ""},
		{"simple error", func(_ replyMode, r wire.Request) []byte { return simpleReply(wire.EIO, r.Cookie, make([]byte, 32)...) }, ""},
		{"wrong magic", func(replyMode, wire.Request) []byte { return make([]byte, 32) }, "bad magic"},
		{"wrong cookie", func(m replyMode, r wire.Request) []byte {
			r.Cookie++
			return chunk(m, r, done, wire.ChunkNone, nil)
		}, "not made"},
		{"after the end", func(m replyMode, r wire.Request) []byte {
			b := chunk(m, r, done, wire.ChunkError, failure(wire.ChunkError, wire.EIO, "", 0))
			return append(b, b...)
		}, "not made"},
		{"before the request", one(0, wire.ChunkOffsetData, dataAt(off-1, 2)), "outside the request"},
		{"behind the request", one(0, wire.ChunkOffsetData, dataAt(off+n-1, 2)), "outside the request"},
		{"longer than the request", one(0, wire.ChunkOffsetData, dataAt(off, n+1)), "outside the request"},
		{"hole before", one(0, wire.ChunkOffsetHole, holeAt(0, off+1)), "outside the request"},
		{"hole of 4 GiB", one(0, wire.ChunkOffsetHole, wire.AppendHole(nil, off, 1<<32-1)), "outside the request"},
		{"offset that overflows", one(0, wire.ChunkOffsetHole, holeAt(-1, 2)), "outside the request"},
		{"twice", two(dataAt(off, 10), dataAt(off, 10)), "overlaps"},
		{"overlap", two(dataAt(off, 10), dataAt(off+9, 2)), "overlaps"},
		{"overlap around", two(dataAt(off+5, 1), dataAt(off, n)), "overlaps"},
		{"no data", one(0, wire.ChunkOffsetData, dataAt(off, 0)), "malformed"},
		{"half an offset", one(0, wire.ChunkOffsetData, make([]byte, 4)), "malformed"},
		{"hole of nothing", one(0, wire.ChunkOffsetHole, holeAt(off, 0)), "malformed"},
		{"long hole", one(0, wire.ChunkOffsetHole, append(holeAt(off, 1), 0)), "malformed"},
		{"short hole", one(0, wire.ChunkOffsetHole, holeAt(off, 1)[:11]), "malformed"},
		{"NONE in the middle", one(0, wire.ChunkNone, nil), "malformed"},
		{"NONE with something", one(done, wire.ChunkNone, []byte{1}), "malformed"},
		{"unknown", one(done, 3, nil), "unknown chunk"},
		{"status", one(done, wire.ChunkBlockStatus, wire.AppendBlockStatus(nil, 1, []wire.Extent{{Length: 1}})), "NBD_REPLY_TYPE_BLOCK_STATUS"},
		{"extended status", one(done, wire.ChunkBlockStatusExt, wire.AppendBlockStatusExt(nil, 1, []wire.Extent{{Length: 1}})), "NBD_REPLY_TYPE_BLOCK_STATUS_EXT"},
		{"error of success", one(done, wire.ChunkError, failure(wire.ChunkError, 0, "", 0)), "malformed"},
		{"short error", one(done, wire.ChunkError, make([]byte, 5)), "malformed"},
		{"text behind its chunk", one(done, wire.ChunkError, []byte{0, 0, 0, 5, 0, 9, 'x'}), "malformed"},
		{"long error", one(done, wire.ChunkError, make([]byte, 5000)), "too long"},
		{"error outside", one(done, wire.ChunkErrorOffset, failure(wire.ChunkErrorOffset, 5, "", off+n)), "outside the request"},
		{"end in a chunk", func(m replyMode, r wire.Request) []byte {
			b := chunk(m, r, done, wire.ChunkOffsetData, dataAt(off, n))
			return b[:len(b)-1]
		}, "connection lost"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					conn := connWith(t, against(t, func(s *script) {
						s.exports(t, mode, mebibyte)
						s.send(tt.answer(mode, s.requestIn(mode)))
					}), "a", nil)
					room := bytes.Repeat([]byte{0xa5}, n+32)
					if err := conn.Read(t.Context(), room[16:16+n], off); err == nil {
						t.Error("the read succeeded")
					}
					for _, b := range [][]byte{room[:16], room[16+n:]} {
						if !bytes.Equal(b, bytes.Repeat([]byte{0xa5}, 16)) {
							t.Error("written outside the buffer")
						}
					}
					<-conn.Done()
					if err := conn.Err(); err == nil || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("ended with error %v, want one that says %q", err, tt.want)
					}
				})
			})
		})
	}
}

// Section "Structured reply magics": commands other than READ may get simple replies,
// but not with extended headers.
func TestConnSimpleRepliesToOtherCommands(t *testing.T) {
	everyMode(t, func(t *testing.T, mode replyMode) {
		synctest.Test(t, func(t *testing.T) {
			conn := connWith(t, against(t, func(s *script) {
				s.exports(t, mode, mebibyte)
				s.send(simpleReply(wire.Success, s.requestIn(mode).Cookie, make([]byte, 16)[:16*int(mode-1)]...))
				s.send(simpleReply(wire.EIO, s.requestIn(mode).Cookie))
			}), "a", nil)
			err := conn.Flush(t.Context())
			if ok := err == nil; ok != (mode == structuredReplies) {
				t.Errorf("first: got error %v", err)
			}
			if err := conn.Trim(t.Context(), 0, 512, false); errors.Is(err, wire.EIO) != (mode == structuredReplies) {
				t.Errorf("second: got error %v", err)
			}
		})
	})
}

// After NBD_ESHUTDOWN the client sends no new requests, waits for the replies to those in
// flight, and disconnects.
func TestConnLeavesAServerThatShutsDown(t *testing.T) {
	everyMode(t, func(t *testing.T, mode replyMode) {
		synctest.Test(t, func(t *testing.T) {
			answer := make(chan struct{})
			left := make(chan wire.Command, 1)
			conn := connWith(t, against(t, func(s *script) {
				s.exports(t, mode, mebibyte)
				a, b := s.requestIn(mode), s.requestIn(mode)
				s.send(chunk(mode, b, done, wire.ChunkError, failure(wire.ChunkError, wire.ESHUTDOWN, "", 0)))
				<-answer
				s.send(chunk(mode, a, done, wire.ChunkOffsetHole, holeAt(int(a.Offset), int(a.Length))))
				left <- s.requestIn(mode).Command
			}), "a", nil)
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := conn.Read(t.Context(), make([]byte, 512), 0); err != nil {
					t.Errorf("request under way: %v", err)
				}
			})
			synctest.Wait()
			for range 2 {
				if err := conn.Flush(t.Context()); !errors.Is(err, wire.ESHUTDOWN) {
					t.Errorf("got error %v, want NBD_ESHUTDOWN", err)
				}
			}
			close(answer)
			wg.Wait()
			<-conn.Done()
			if got := <-left; got != wire.CmdDisc {
				t.Errorf("the client left with %v, want NBD_CMD_DISC", got)
			}
			if err := conn.Err(); !errors.Is(err, wire.ESHUTDOWN) {
				t.Errorf("ended with error %v", err)
			}
		})
	})
}

// The client allocates no memory for data that is announced and has not arrived.
func TestConnDoesNotAllocateForAnnouncements(t *testing.T) {
	announce := func(typ wire.ChunkType, n uint64) func(replyMode, wire.Request) []byte {
		return func(m replyMode, r wire.Request) []byte {
			b := chunk(m, r, 0, typ, nil)
			if m == extendedHeaders {
				binary.BigEndian.PutUint64(b[24:], n)
			} else {
				binary.BigEndian.PutUint32(b[16:], uint32(n))
			}
			return append(b, 0, 0, 0, 1, 0, 0, 0, 0)
		}
	}
	allocated := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.TotalAlloc
	}
	before := allocated()
	for _, typ := range []wire.ChunkType{wire.ChunkNone, wire.ChunkOffsetData, wire.ChunkOffsetHole, wire.ChunkBlockStatus, wire.ChunkBlockStatusExt, wire.ChunkError, 1<<15 | 9, 77} {
		for _, n := range []uint64{4 + 1<<20*8, 8 + 1<<20*16, 1 << 25, 1<<32 - 4, 1 << 63} {
			everyMode(t, func(t *testing.T, mode replyMode) {
				synctest.Test(t, func(t *testing.T) {
					conn := connWith(t, against(t, func(s *script) {
						s.exports(t, mode, mebibyte, wire.MetaContext{ID: 1, Name: wire.BaseAllocation})
						s.send(announce(typ, n)(mode, s.requestIn(mode)))
					}), "a", &Config{MetaContexts: []string{wire.BaseAllocation}})
					if _, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, 0, 512); err == nil || errors.Is(err, net.ErrClosed) {
						t.Errorf("%v of %d bytes: error %v", typ, n, err)
					}
				})
			})
		}
	}
	if got := allocated() - before; got > 64<<20 {
		t.Errorf("%d MiB were allocated for announcements", got>>20)
	}
}
