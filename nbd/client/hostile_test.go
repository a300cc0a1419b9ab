package client

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// A message that violates the protocol ends the handshake with an error that says how.
func TestClientEndsBrokenNegotiation(t *testing.T) {
	afterGo := func(b ...[]byte) func(s *script) {
		return func(s *script) {
			s.greet()
			s.option()
			s.send(b...)
			s.discard()
		}
	}
	info := goReply(wire.RepInfo, exportInfoData(wire.FlagHasFlags))
	absurd := wire.ExportInfo{Size: 1 << 63, Flags: wire.FlagHasFlags}
	withLength := func(n uint32) []byte {
		b := goReply(wire.RepInfo, nil)
		b[16], b[17], b[18], b[19] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
		return b
	}
	tests := []struct {
		name string
		run  func(s *script)
		want string
	}{
		{"foreign greeting", func(s *script) { s.send([]byte("SSH-2.0-OpenSSH_9.9p1\r\n")); s.discard() }, "not a newstyle NBD server"},
		{"oldstyle", func(s *script) { s.send([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00")); s.discard() }, "not a newstyle NBD server"},
		{"short greeting", func(s *script) { s.send([]byte("NBDMAGICIHAVE")) }, "no greeting"},
		{"wrong magic", afterGo(make([]byte, wire.OptionReplyHeaderLen)), "bad magic"},
		{"another option", afterGo(wire.AppendOptionReply(nil, wire.OptInfo, wire.RepAck, nil)), "another option"},
		{"long reply", afterGo(withLength(maxReplyData + 1)), "too long"},
		{"absurd reply", afterGo(withLength(1<<32 - 1)), "too long"},
		{"ACK with data", afterGo(info, goReply(wire.RepAck, []byte{0})), "NBD_REP_ACK with data"},
		{"endless replies", afterGo(bytes.Repeat(info, 10_000)), "endless"},
		{"ACK without information", afterGo(goReply(wire.RepAck, nil)), "without NBD_INFO_EXPORT"},
		{"reply to LIST", afterGo(goReply(wire.RepServer, make([]byte, 4))), "unexpected reply"},
		{"empty information", afterGo(goReply(wire.RepInfo, nil)), "malformed"},
		{"short information", afterGo(goReply(wire.RepInfo, exportInfoData(1)[:11])), "malformed"},
		{"long information", afterGo(goReply(wire.RepInfo, append(exportInfoData(1), 0))), "malformed"},
		{"without HAS_FLAGS", afterGo(goReply(wire.RepInfo, exportInfoData(wire.FlagReadOnly)), goReply(wire.RepAck, nil)), "NBD_FLAG_HAS_FLAGS"},
		{"impossible size", afterGo(goReply(wire.RepInfo, absurd.AppendInfo(nil, wire.InfoExport)), goReply(wire.RepAck, nil)), "impossible size"},
		{"unknown error", afterGo(goReply(1<<31|4711, []byte("odd"))), "odd"},
		{"end instead of an answer", func(s *script) { s.greet(); s.option() }, "no answer"},
		{"end inside an answer", func(s *script) { s.greet(); s.option(); s.send(info[:len(info)-1]) }, "cut short"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nc := against(t, tt.run)
				c, err := New(t.Context(), nc, &Config{NoStructured: true})
				if err == nil {
					_, err = c.Go(t.Context(), "a")
				}
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v, want one that says %q", err, tt.want)
				}
			})
		})
	}
}

// A reply that violates the protocol ends the connection for all calls. A lost connection is
// an error, never less data than the caller asked for.
func TestConnEndsAfterABrokenReply(t *testing.T) {
	tests := []struct {
		name  string
		reply func(first, second uint64) []byte
		want  string
	}{
		{"unknown cookie", func(a, _ uint64) []byte { return simpleReply(wire.Success, a+1000) }, "not made"},
		{"the same answer twice", func(a, _ uint64) []byte {
			return append(simpleReply(wire.EIO, a), simpleReply(wire.EIO, a)...)
		}, "not made"},
		{"wrong magic", func(uint64, uint64) []byte { return make([]byte, wire.SimpleReplyLen) }, "bad magic"},
		{"structured reply", func(a, _ uint64) []byte {
			b := simpleReply(wire.Success, a)
			copy(b, []byte{0x66, 0x8e, 0x33, 0xef})
			return b
		}, "bad magic"},
		{"end", func(uint64, uint64) []byte { return nil }, "connection lost"},
		{"end inside a header", func(a, _ uint64) []byte { return simpleReply(wire.Success, a)[:15] }, "connection lost"},
		{"end before the data", func(a, _ uint64) []byte { return simpleReply(wire.Success, a) }, "inside a reply"},
		{"end inside the data", func(a, _ uint64) []byte { return simpleReply(wire.Success, a, make([]byte, 511)...) }, "inside a reply"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := connTo(t, against(t, func(s *script) {
					s.transmission()
					a, b := s.request(), s.request()
					s.send(tt.reply(a.Cookie, b.Cookie))
				}), "a")
				var wg sync.WaitGroup
				var found bool
				var mu sync.Mutex
				for range 2 {
					wg.Go(func() {
						n, err := conn.ReadAt(make([]byte, 512), 0)
						if err == nil || n != 0 || errors.Is(err, io.EOF) {
							t.Errorf("got %d bytes and error %v", n, err)
							return
						}
						mu.Lock()
						defer mu.Unlock()
						found = found || strings.Contains(err.Error(), tt.want)
					})
				}
				wg.Wait()
				if !found {
					t.Errorf("no call failed with an error that says %q", tt.want)
				}
				if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
					t.Error("the connection can still be used")
				}
				if err := conn.Close(); err != nil {
					t.Errorf("Close after the end: %v", err)
				}
			})
		})
	}
}
