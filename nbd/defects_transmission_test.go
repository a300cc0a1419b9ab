package nbd

import (
	"bytes"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// The defects of the transmission phase; see defects_test.go.

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
