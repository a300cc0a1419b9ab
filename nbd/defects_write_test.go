package nbd

import (
	"bytes"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/nbd/wire"
)

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
			t.Error("the device does not contain the written data")
		}
		p.disc()
		if err := p.closed(); err != nil {
			t.Errorf("ended with %v, want peace", err)
		}
	})
}
