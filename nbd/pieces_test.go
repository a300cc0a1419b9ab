package nbd

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// piecesServer serves everything that is longer than a reserve in pieces.
func piecesServer(t *testing.T, d Device) *testServer {
	s := newTestServer(t)
	s.MaxInflightBytes = 1
	s.serve(d)
	return s
}

// piecesLength is three pieces, of which the last is short.
const piecesLength = 2*reserveSize + 5000

func TestReadsInPieces(t *testing.T) {
	for _, opt := range chunkModes {
		for flags, want := range map[wire.CommandFlags]int{0: 3, wire.CmdFlagDF: 1} {
			synctest.Test(t, func(t *testing.T) {
				d := newDevice(1 << 20)
				p := piecesServer(t, d).chunked(opt, "a")
				got := p.content(ranged(wire.CmdRead, flags, 777, piecesLength))
				if !bytes.Equal(got.data, patternOf(777, piecesLength)) {
					t.Errorf("%v, flags %v: wrong data", opt, flags)
				}
				if got.chunks != want {
					t.Errorf("%v, flags %v: %d chunks, want %d", opt, flags, got.chunks, want)
				}
				if d.meter.maxBytes != reserveSize {
					t.Errorf("at most %d bytes were read at one time, want %d", d.meter.maxBytes, reserveSize)
				}
			})
		}
	}
	synctest.Test(t, func(t *testing.T) {
		s := piecesServer(t, newDevice(1<<20))
		p := s.negotiated("a")
		for _, length := range []int{reserveSize + 1, 2 * reserveSize, piecesLength} {
			p.reads(777, length)
		}
		synctest.Wait()
		if got := s.one().Position; got != 777+piecesLength {
			t.Errorf("position: got %d, want %d", got, 777+piecesLength)
		}
	})
}

// TestFailedPieces: after a piece that fails no further data is sent. If the reply can carry an
// error chunk the connection goes on; else it ends.
func TestFailedPieces(t *testing.T) {
	for bad := range 3 {
		failing := func() *fakeDevice {
			d := newDevice(1 << 20)
			d.onRead = func(p []byte, off int64) (int, error) {
				if off == int64(bad)*reserveSize {
					return len(p) / 2, syscall.EIO
				}
				pattern(p, off)
				return len(p), nil
			}
			return d
		}
		for _, opt := range chunkModes {
			synctest.Test(t, func(t *testing.T) {
				p := piecesServer(t, failing()).chunked(opt, "a")
				r := ranged(wire.CmdRead, 0, 0, piecesLength)
				p.request(r, nil)
				for n := range bad {
					if _, b := p.chunk(r); !bytes.Equal(b[wire.ChunkOffsetLen:], patternOf(int64(n)*reserveSize, reserveSize)) {
						t.Errorf("%v: wrong data in chunk %d", opt, n)
					}
				}
				c, b := p.chunk(r)
				f, err := wire.ParseChunkFailure(c.Type, b)
				if c.Type != wire.ChunkError || c.Flags != wire.ChunkFlagDone || err != nil || f.Errno != wire.EIO {
					t.Errorf("%v: got %v, flags %v, %v, %v; want EIO and the end of the reply", opt, c.Type, c.Flags, f, err)
				}
				p.content(ranged(wire.CmdRead, 0, 3*reserveSize, 512))
			})
		}
		synctest.Test(t, func(t *testing.T) {
			s := piecesServer(t, failing())
			p := s.negotiated("a")
			p.read(7, 0, piecesLength)
			r := p.anyReply()
			if bad == 0 {
				if r.Errno != wire.EIO {
					t.Errorf("got %v, want EIO", r.Errno)
				}
				p.reads(3*reserveSize, 512)
				return
			}
			if got := p.receive(bad * reserveSize); r.Errno != wire.Success || !bytes.Equal(got, patternOf(0, bad*reserveSize)) {
				t.Errorf("got %v and wrong data", r.Errno)
			}
			wantHard(t, p.closed(), "the device failed after the reply had begun: NBD_EIO")
			if log := s.log.String(); !strings.Contains(log, "request failed") || !strings.Contains(log, "failed=1") {
				t.Errorf("the log does not tell: %s", log)
			}
		})
	}
}

// TestRepliesBetweenPieces: other replies are sent between the chunks of a reply in pieces.
func TestRepliesBetweenPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(1 << 20)
		h := newHold(t)
		d.onRead = func(p []byte, off int64) (int, error) {
			if off == reserveSize {
				return h.read(p, off)
			}
			pattern(p, off)
			return len(p), nil
		}
		s := piecesServer(t, d)
		p := s.chunked(wire.OptStructuredReply, "a")
		long := ranged(wire.CmdRead, 0, 0, piecesLength)
		long.Cookie = 1
		p.request(long, nil)
		p.chunk(long)
		synctest.Wait()
		if errno := p.fails(wire.Request{Command: wire.CmdFlush, Cookie: 2}, nil); errno != wire.EINVAL && errno != wire.EPERM {
			t.Errorf("FLUSH of a read-only device: got %v", errno)
		}
		h.release()
		p.chunk(long)
		if c, _ := p.chunk(long); c.Flags != wire.ChunkFlagDone {
			t.Error("the last chunk does not say so")
		}
	})
}

func TestWritesInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newWritable(1 << 20)
		p := piecesServer(t, capableDevice{d}).negotiated("a")
		data := patternOf(3, piecesLength)
		p.writes(wire.CmdFlagFUA, 777, data)
		want := fmt.Sprintf("[write 777+%d write %d+%d write %d+5000 flush]", reserveSize, 777+reserveSize, reserveSize, 777+2*reserveSize)
		if got := fmt.Sprint(d.took()); got != want {
			t.Errorf("the device was asked for %v, want %v", got, want)
		}
		if !bytes.Equal(d.content()[777:777+piecesLength], data) {
			t.Error("the device does not contain the written data")
		}
	})
}

// A WRITE that fails in the middle is answered after all of its payload has been read, and
// the request after it is parsed correctly.
func TestFailedWriteInPieces(t *testing.T) {
	for bad := range 3 {
		synctest.Test(t, func(t *testing.T) {
			d := newWritable(1 << 20)
			n := 0
			d.before = func(string) error {
				if n++; n == bad+1 {
					return syscall.ENOSPC
				}
				return nil
			}
			p := piecesServer(t, d).negotiated("a")
			p.wants(wire.ENOSPC, ranged(wire.CmdWrite, 0, 0, piecesLength), patternOf(0, piecesLength))
			if got := len(d.took()); got != bad {
				t.Errorf("%d pieces were written, want %d", got, bad)
			}
			p.writes(0, 0, patternOf(9, 512))
		})
	}
}

// TestShortWriteInPieces: a short write without an error fails the request.
func TestShortWriteInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piecesServer(t, shortWriter{newDevice(1 << 20)}).negotiated("a")
		p.wants(wire.EIO, ranged(wire.CmdWrite, 0, 0, piecesLength), patternOf(0, piecesLength))
	})
}

// shortWriter stores one byte less than it was given.
type shortWriter struct{ *fakeDevice }

func (shortWriter) WriteAt(p []byte, _ int64) (int, error) { return len(p) - 1, nil }

// If the connection ends in the middle of a request in pieces, all memory is given back. A
// shutdown waits for the request.
func TestEndsInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := piecesServer(t, nil)
		s.exports.open = func(context.Context, Peer, string) (Device, error) { return newWritable(1 << 20), nil }
		reader, writer := s.negotiated("a"), s.negotiated("a")
		reader.read(1, 0, piecesLength)
		reader.receive(wire.SimpleReplyLen + 1000)
		writer.send(ranged(wire.CmdWrite, 0, 0, piecesLength).Append(nil))
		writer.send(make([]byte, reserveSize+1))
		reader.nc.Close()
		writer.nc.Close()
		wantHard(t, reader.end(), "")
		wantHard(t, writer.end(), "inside a payload")
		synctest.Wait()
		if len(s.budget.conns) != 0 || s.budget.used != 0 {
			t.Errorf("%d connections and %d bytes are left in the budget", len(s.budget.conns), s.budget.used)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := piecesServer(t, newDevice(1<<20))
		p := s.negotiated("a")
		p.read(1, 0, piecesLength)
		p.receive(wire.SimpleReplyLen + 1000)
		go s.Shutdown(context.Background())
		time.Sleep(time.Second)
		if got := p.receive(piecesLength - 1000); !bytes.Equal(got, patternOf(1000, piecesLength-1000)) {
			t.Error("wrong data")
		}
		p.closed()
	})
}

// TestWaitForASlowDeviceIsNotStuck: a simple reply in pieces holds up the peer's other replies
// while the device is slow. The connection does not count as stuck for that.
func TestWaitForASlowDeviceIsNotStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHold(t)
		d := newDevice(1 << 20)
		d.onRead = func(p []byte, off int64) (int, error) {
			if off == reserveSize {
				return h.read(p, off)
			}
			pattern(p, off)
			return len(p), nil
		}
		s := piecesServer(t, d)
		p := s.negotiated("a")
		synctest.Wait() // until it transmits
		p.read(1, 0, piecesLength)
		p.receive(wire.SimpleReplyLen + reserveSize)
		synctest.Wait() // the second piece is with the device
		i := inflightOf(t, s)
		setMeter(s, new(testMeter))
		i.budget.mu.Lock()
		i.taken += mib // as of another request whose reply waits behind the pieces
		i.budget.used += mib
		for n := range 2 { // when it is first seen, and when its time would be over
			if i.isStuck(time.Now().Add(time.Duration(n) * 2 * stuckAfter)) {
				t.Error("the peer is blamed for the time of its device")
			}
		}
		i.taken -= mib
		i.budget.used -= mib
		i.budget.mu.Unlock()
		h.release()
		if got := p.receive(piecesLength - reserveSize); !bytes.Equal(got, patternOf(reserveSize, piecesLength-reserveSize)) {
			t.Error("wrong data")
		}
		synctest.Wait()
		i.budget.mu.Lock()
		defer i.budget.mu.Unlock()
		if i.blocked != 0 || !i.seenAt.IsZero() {
			t.Errorf("%d reads still count as blocked, and the peer's time did not begin anew (%v)", i.blocked, i.seenAt)
		}
	})
}

// inflightOf returns the inflight of the only connection in the transmission phase.
func inflightOf(t *testing.T, s *testServer) *inflight {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if tr := c.view.transmission.Load(); tr != nil {
			return tr.inflight
		}
	}
	t.Fatal("no connection transmits")
	return nil
}
