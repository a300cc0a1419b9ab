package nbd

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// recordingConn records the bytes of each call of Write.
type recordingConn struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
}

func (c *recordingConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.writes = append(c.writes, bytes.Clone(p))
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// Clients read a whole answer with one call, and a header alone in a packet
// costs a round trip with some of them.
func TestOneWritePerReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		var rec *recordingConn
		p := s.connectBy(func(nc net.Conn) net.Conn {
			rec = &recordingConn{Conn: nc}
			return rec
		})
		p.greet(fixedNoZeroes)
		p.goTo("a", wire.InfoName, wire.InfoBlockSize)
		lengths := []int{0, 1, 512, 4096, 4097, 1 << 20}
		for i, n := range lengths {
			p.read(uint64(i), 0, n)
			p.answer(uint64(i), 0, n)
		}
		p.read(99, 1<<20, 1)
		p.answer(99, 0, 0)
		p.disc()
		p.closed()
		if got, want := len(rec.writes), 2+len(lengths)+1; got != want {
			t.Fatalf("%d writes, want %d: greeting, answer to GO, and one for each reply", got, want)
		}
		for i, n := range append(lengths, 0) {
			if got := len(rec.writes[2+i]); got != wire.SimpleReplyLen+n {
				t.Errorf("reply %d: a write of %d bytes, want %d", i, got, wire.SimpleReplyLen+n)
			}
		}
	})
}

// XO and others read the 134 bytes of the old answer with one call.
func TestExportNameAnswerIsOneWrite(t *testing.T) {
	for flags, want := range map[wire.ClientFlags]int{0: 134, wire.FlagCFixedNewstyle: 134, fixedNoZeroes: 10} {
		synctest.Test(t, func(t *testing.T) {
			var rec *recordingConn
			p := newTestServer(t).connectBy(func(nc net.Conn) net.Conn {
				rec = &recordingConn{Conn: nc}
				return rec
			})
			p.greet(flags)
			p.option(wire.OptExportName, []byte("a"))
			p.receive(want)
			p.reads(0, 512)
			if got := len(rec.writes[1]); got != want {
				t.Errorf("client flags %v: answer in a write of %d bytes, want %d", flags, got, want)
			}
		})
	}
}
