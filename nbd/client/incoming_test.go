package client

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// readCounter counts the reads from a connection.
type readCounter struct {
	net.Conn
	mu    sync.Mutex
	reads int
	whole int // those that ask for a whole receiveBuffer
}

func (c *readCounter) Read(p []byte) (int, error) {
	c.mu.Lock()
	c.reads++
	if len(p) == receiveBuffer {
		c.whole++
	}
	c.mu.Unlock()
	return c.Conn.Read(p)
}

// counts returns the numbers of reads up to now.
func (c *readCounter) counts() (reads, whole int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reads, c.whole
}

// TestLongDataIsReadPastTheBuffer: only the first of several replies with long data is read into
// the buffer, and of short replies many at once.
func TestLongDataIsReadPastTheBuffer(t *testing.T) {
	const n = 10 // the export has 1 MiB
	for name, length := range map[string]int{"long": 100_000, "short": 1000} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nc := &readCounter{Conn: against(t, func(s *script) {
					s.transmission()
					var all []byte
					for range n {
						r := s.request()
						all = append(all, simpleReply(wire.Success, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...)...)
					}
					s.send(all)
					s.discard()
				})}
				conn := connTo(t, nc, "a")
				before, wholeBefore := nc.counts()
				var calls sync.WaitGroup
				for i := range n {
					calls.Go(func() {
						p, off := make([]byte, length), int64(i*length)
						if err := conn.Read(t.Context(), p, off); err != nil || !bytes.Equal(p, patternOf(off, length)) {
							t.Errorf("at %d: error %v, or wrong data", off, err)
						}
					})
				}
				calls.Wait()
				reads, whole := nc.counts()
				reads, whole = reads-before, whole-wholeBefore
				if length >= longData && whole > 2 {
					t.Errorf("%d reads into the whole buffer, want those of the first reply only", whole)
				}
				if length < longData && reads > n/2 {
					t.Errorf("%d reads for %d short replies, want one for many", reads, n)
				}
			})
		})
	}
}

// TestStatusAfterLongData: a long reply to BLOCK_STATUS is read in few reads, also behind one
// with long data.
func TestStatusAfterLongData(t *testing.T) {
	const n, length = 4000, 100_000
	synctest.Test(t, func(t *testing.T) {
		nc := &readCounter{Conn: against(t, func(s *script) {
			s.exports(t, structuredReplies, mebibyte, wire.MetaContext{ID: 7, Name: wire.BaseAllocation})
			r := s.request()
			offset := make([]byte, wire.ChunkOffsetLen)
			s.send(chunk(structuredReplies, r, done, wire.ChunkOffsetData, append(offset, make([]byte, length)...)))
			var all extents
			for i := range uint64(n) {
				all = append(all, wire.Extent{Length: 100, Status: i % 2})
			}
			s.send(status(structuredReplies, s.request(), done, 7, all))
			s.discard()
		})}
		conn := connWith(t, nc, "a", &Config{MetaContexts: []string{wire.BaseAllocation}})
		if err := conn.Read(t.Context(), make([]byte, length), 0); err != nil {
			t.Fatal(err)
		}
		before, _ := nc.counts()
		got, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, 0, n*100)
		if len(got) != n || err != nil {
			t.Errorf("got %d extents and error %v, want %d", len(got), err, n)
		}
		if reads, _ := nc.counts(); reads-before > 8 {
			t.Errorf("%d reads for a reply of %d bytes", reads-before, n*wire.ExtentLen)
		}
	})
}
