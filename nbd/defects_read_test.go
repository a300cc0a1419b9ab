package nbd

import (
	"net"
	"syscall"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// The header of the reply to a READ reported success before the device had been read.
func TestDefectSuccessSentBeforeTheRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newDevice(8 << 20)
		d.onRead = func(p []byte, off int64) (int, error) {
			pattern(p, off)
			return len(p) - 1, syscall.EIO // nearly all of it
		}
		s.serve(d)
		p := s.negotiated("a")
		for _, n := range []int{1, 512, 4 << 20} {
			p.wants(wire.EIO, ranged(wire.CmdRead, 0, 0, n), nil)
		}
	})
}

// Header and data of a reply were sent in two packets, which cost 40 ms each if
// acknowledgements are delayed.
func TestDefectSmallReadsTakeTwoWrites(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		for _, opt := range []wire.Option{0, wire.OptStructuredReply, wire.OptExtendedHeaders} {
			var rec *recordingConn
			p := s.connectBy(func(nc net.Conn) net.Conn {
				rec = &recordingConn{Conn: nc}
				return rec
			})
			p.greet(fixedNoZeroes)
			r, n := ranged(wire.CmdRead, 0, 512, 512).Append(nil), wire.SimpleReplyLen+512
			switch opt {
			case wire.OptStructuredReply:
				p.refused(opt, nil, wire.RepAck)
				n = wire.ChunkLen + wire.ChunkOffsetLen + 512
			case wire.OptExtendedHeaders:
				p.refused(opt, nil, wire.RepAck)
				r = ranged(wire.CmdRead, 0, 512, 512).AppendExtended(nil)
				n = wire.ExtendedChunkLen + wire.ChunkOffsetLen + 512
			}
			p.goTo("a")
			before := len(rec.writes)
			for range 5 {
				p.send(r)
				p.receive(n)
			}
			synctest.Wait()
			if got := len(rec.writes) - before; got != 5 {
				t.Errorf("option %v: %d writes for 5 small reads", opt, got)
			}
			p.nc.Close()
			p.end()
		}
	})
}
