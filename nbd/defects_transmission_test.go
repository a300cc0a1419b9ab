package nbd

import (
	"bytes"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// The defects of the transmission phase; see defects_test.go.

// A WRITE to a read-only export stopped the connection: its payload was not read, and was
// parsed as requests.
func TestDefectStuckAfterAWrite(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, d *writableDevice) {
		payload := bytes.Repeat(readRequest(1, 0, 512), 100) // if they were requests, there would be answers
		for _, dev := range []Device{capableDevice{d}, newDevice(1 << 20)} {
			s.serve(dev)
			p := s.connect()
			p.greet(fixedNoZeroes)
			readOnly := p.goTo("a").Flags&wire.FlagReadOnly != 0
			for range 3 {
				got := p.does(ranged(wire.CmdWrite, 0, 4096, len(payload)), payload)
				if want := map[bool]wire.Errno{true: wire.EPERM, false: wire.Success}[readOnly]; got != want {
					t.Errorf("read-only %v: %v, want %v", readOnly, got, want)
				}
				p.reads(0, 512)
			}
			p.disc()
			p.closed()
		}
	})
}

// Devices whose size is no multiple of the block size lost their last bytes.
func TestDefectOddSizesServedShort(t *testing.T) {
	for _, size := range []int{1, 511, 513, 1 << 20, 1<<20 + 1, 1<<20 + 511} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(&sizedDevice{newDevice(int64(size)), 512, 4096, 1 << 20})
			p := s.connect()
			p.greet(fixedNoZeroes)
			if got := p.goTo("a", wire.InfoBlockSize).Size; got != uint64(size) {
				t.Errorf("size %d, want %d", got, size)
			}
			last := size / 512 * 512
			if last == size {
				last -= 512
			}
			p.reads(last, size-last)
		})
	}
}

// Flags and type of a request were read as one number: a READ with a flag was an unknown
// command, whose payload was not known either.
func TestDefectFlagsAndTypeReadAsOneField(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, d *writableDevice) {
		p := s.negotiated("a")
		r := ranged(wire.CmdRead, wire.CmdFlagFUA, 1000, 100)
		p.request(r, nil)
		if errno := p.answer(0, 1000, 100); errno != wire.Success {
			t.Errorf("READ with FUA: %v", errno)
		}
		p.writes(wire.CmdFlagFUA, 1000, patternOf(5, 100))
		p.wants(wire.EINVAL, ranged(wire.CmdWrite, 1<<15, 0, 28), readRequest(1, 0, 512))
		p.reads(0, 512)
		if got := d.content()[1000:1100]; !bytes.Equal(got, patternOf(5, 100)) {
			t.Error("WRITE with FUA did not store its payload")
		}
	})
}

// The server closed the connection after a write that failed or was not permitted.
func TestDefectHangsUpAfterAFailedWrite(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, d *writableDevice) {
		d.before = func(string) error { return syscall.EIO }
		for want, dev := range map[wire.Errno]Device{wire.EIO: capableDevice{d}, wire.EPERM: newDevice(1 << 20)} {
			s.serve(dev)
			p := s.negotiated("a")
			for range 10 {
				p.wants(want, ranged(wire.CmdWrite, 0, 0, 4096), make([]byte, 4096))
				p.wants(want, ranged(wire.CmdTrim, 0, 0, 4096), nil)
				p.wants(want, ranged(wire.CmdWriteZeroes, 0, 0, 4096), nil)
				p.reads(0, 4096)
			}
			p.disc()
			if err := p.closed(); err != nil {
				t.Errorf("ended with %v, want peace", err)
			}
		}
	})
}

// The commands of mkfs (it trims all, then zeroes and writes parts, and flushes in between)
// made the connection hang.
func TestDefectCommandsOfMkfsHang(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, d *writableDevice) {
		const n = 60
		p := s.negotiated("a")
		var want [1 << 20]byte
		var sent []byte
		sent = append(sent, ranged(wire.CmdFlush, 0, 0, 0).Append(nil)...)
		for i := range n {
			at := i * 4096 * 3
			block := patternOf(int64(i), 4096)
			sent = ranged(wire.CmdTrim, 0, at+8192, 4096).Append(sent)
			sent = ranged(wire.CmdWriteZeroes, wire.CmdFlagNoHole, at+4096, 4096).Append(sent)
			sent = append(ranged(wire.CmdWrite, wire.CommandFlags(i%2), at, 4096).Append(sent), block...)
			sent = ranged(wire.CmdFlush, 0, 0, 0).Append(sent)
			copy(want[at:], block)
		}
		p.wants(wire.Success, ranged(wire.CmdTrim, 0, 0, 1<<20), nil)
		var writer sync.WaitGroup
		writer.Go(func() { p.nc.Write(sent) })
		for range 1 + 4*n {
			if r := p.anyReply(); r.Errno != wire.Success {
				t.Errorf("reply %v, want success", r)
			}
		}
		writer.Wait()
		if !bytes.Equal(d.content(), want[:]) {
			t.Error("the device does not hold what was written")
		}
		p.disc()
		if err := p.closed(); err != nil {
			t.Errorf("ended with %v, want peace", err)
		}
	})
}

// DISC was answered, with EINVAL, to a client that did not read any more.
func TestDefectDiscAnswered(t *testing.T) {
	for _, flags := range []wire.CommandFlags{0, wire.CmdFlagFUA, 1 << 15} {
		defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
			p := s.negotiated("a")
			p.request(wire.Request{Command: wire.CmdDisc, Flags: flags, Cookie: 1, Offset: 1 << 40, Length: 9}, nil)
			if err := p.closed(); err != nil {
				t.Errorf("flags %v: ended with %v, want peace", flags, err)
			}
		})
	}
}

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

// A request without alignment ended the connection.
func TestDefectUnalignedRequestEndsTheConnection(t *testing.T) {
	for _, asked := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.serve(&sizedDevice{newDevice(1 << 20), 512, 4096, 1 << 20})
			p := s.connect()
			p.greet(fixedNoZeroes)
			if asked {
				p.goTo("a", wire.InfoBlockSize)
				p.wants(wire.EINVAL, ranged(wire.CmdRead, 0, 1, 512), nil)
				p.wants(wire.EINVAL, ranged(wire.CmdRead, 0, 512, 513), nil)
			} else {
				p.goTo("a")
				p.reads(1, 512)
				p.reads(513, 1)
			}
			p.reads(512, 512)
		})
	}
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
