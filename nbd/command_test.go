package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/wire"
)

// request sends a request and its payload.
func (p *peer) request(r wire.Request, payload []byte) {
	p.t.Helper()
	p.send(append(r.Append(nil), payload...))
}

// does sends a request and expects a simple reply without data.
func (p *peer) does(r wire.Request, payload []byte) wire.Errno {
	p.t.Helper()
	r.Cookie = 0x77<<32 | uint64(r.Command)
	p.request(r, payload)
	got := p.anyReply()
	if got.Cookie != r.Cookie {
		p.t.Fatalf("%v: reply with cookie %#x, want %#x", r.Command, got.Cookie, r.Cookie)
	}
	return got.Errno
}

// wants is does, and requires the errno want.
func (p *peer) wants(want wire.Errno, r wire.Request, payload []byte) {
	p.t.Helper()
	if got := p.does(r, payload); got != want {
		p.t.Errorf("%v, flags %v, %d bytes at %d: got %v, want %v", r.Command, r.Flags, r.Length, r.Offset, got, want)
	}
}

func ranged(c wire.Command, f wire.CommandFlags, off, n int) wire.Request {
	return wire.Request{Command: c, Flags: f, Offset: uint64(off), Length: uint64(n)}
}

// writes sends a WRITE.
func (p *peer) writes(f wire.CommandFlags, off int, data []byte) {
	p.t.Helper()
	p.wants(wire.Success, ranged(wire.CmdWrite, f, off, len(data)), data)
}

// TestTransmissionFlags: exactly the commands that work are advertised.
func TestTransmissionFlags(t *testing.T) {
	const (
		always   = wire.FlagHasFlags
		readOnly = always | wire.FlagReadOnly | wire.FlagCanMultiConn
		writable = always | wire.FlagSendWriteZeroes
		durable  = wire.FlagSendFlush | wire.FlagSendFUA
	)
	w := newWritable(512)
	c := capableDevice{w}
	tests := []struct {
		name string
		d    Device
		want wire.TransmissionFlags
	}{
		{"read-only", newDevice(512), readOnly},
		{"read-only that can be cached", struct {
			Device
			Cacher
		}{w.fakeDevice, c}, readOnly | wire.FlagSendCache},
		{"read-only that could trim and zero", struct {
			Device
			Flusher
			Trimmer
			ZeroWriter
		}{w.fakeDevice, c, c, c}, readOnly},
		{"writable", w, writable},
		{"writable and flushed", struct {
			*writableDevice
			Flusher
		}{w, c}, writable | durable},
		{"written through", throughDevice{w, true}, writable | durable},
		{"not written through after all", throughDevice{w, false}, writable},
		{"writable and trimmed", struct {
			*writableDevice
			Trimmer
		}{w, c}, writable | wire.FlagSendTrim},
		{"writable and zeroed", struct {
			*writableDevice
			ZeroWriter
		}{w, c}, writable | wire.FlagSendFastZero},
		{"writable and coherent", struct {
			*writableDevice
			MultiConner
		}{w, c}, writable | wire.FlagCanMultiConn},
		{"everything, to be read only", ReadOnly(c), readOnly | wire.FlagSendCache},
		{"to be read only, not coherent", ReadOnly(w), readOnly &^ wire.FlagCanMultiConn},
		{"everything", c, writable | durable | wire.FlagSendTrim | wire.FlagSendFastZero | wire.FlagSendCache | wire.FlagCanMultiConn},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for mode, more := range map[replyMode]wire.TransmissionFlags{
				simpleReplies:     0,
				structuredReplies: wire.FlagSendDF,
				extendedHeaders:   wire.FlagSendDF | wire.FlagBlockStatusPayload,
			} {
				if got, want := capabilitiesOf(tt.d).transmissionFlags(mode), tt.want|more; got != want {
					t.Errorf("mode %d: got %v, want %v", mode, got, want)
				}
			}
		})
	}
}

// The calls of the device for each command. With FUA the flush comes after the change and
// before the reply.
func TestCallsOfDevices(t *testing.T) {
	const fua = wire.CmdFlagFUA
	tests := []struct {
		name string
		req  wire.Request
		want string
	}{
		{"WRITE", ranged(wire.CmdWrite, 0, 100, 5), "write 100+5"},
		{"WRITE with FUA", ranged(wire.CmdWrite, fua, 100, 5), "write 100+5, flush"},
		{"FLUSH", ranged(wire.CmdFlush, 0, 0, 0), "flush"},
		{"FLUSH with FUA", ranged(wire.CmdFlush, fua, 0, 0), "flush"},
		{"TRIM", ranged(wire.CmdTrim, 0, 512, 1024), "trim 512+1024"},
		{"TRIM with FUA", ranged(wire.CmdTrim, fua, 512, 1024), "trim 512+1024, flush"},
		{"TRIM of nothing", ranged(wire.CmdTrim, 0, 512, 0), ""},
		{"CACHE", ranged(wire.CmdCache, 0, 1, 3), "cache 1+3"},
		{"WRITE_ZEROES", ranged(wire.CmdWriteZeroes, 0, 7, 9), "zero 7+9 false false"},
		{"WRITE_ZEROES, NO_HOLE", ranged(wire.CmdWriteZeroes, wire.CmdFlagNoHole, 7, 9), "zero 7+9 true false"},
		{"WRITE_ZEROES, FAST_ZERO", ranged(wire.CmdWriteZeroes, wire.CmdFlagFastZero, 7, 9), "zero 7+9 false true"},
		{"WRITE_ZEROES, all flags", ranged(wire.CmdWriteZeroes, fua|wire.CmdFlagNoHole|wire.CmdFlagFastZero, 7, 9), "zero 7+9 true true, flush"},
		{"WRITE_ZEROES of all", ranged(wire.CmdWriteZeroes, 0, 0, 4096), "zero 0+4096 false false"},
		{"WRITE_ZEROES of nothing", ranged(wire.CmdWriteZeroes, 0, 4096, 0), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newWritable(4096)
				s.serve(capableDevice{d})
				p := s.negotiated("a")
				var payload []byte
				if tt.req.Command == wire.CmdWrite {
					payload = make([]byte, tt.req.Length)
				}
				p.wants(wire.Success, tt.req, payload)
				if got := strings.Join(d.took(), ", "); got != tt.want {
					t.Errorf("the device was asked for %q, want %q", got, tt.want)
				}
				p.disc()
				p.closed()
				if d.closes() != 1 || len(d.breaches) > 0 {
					t.Errorf("device closed %d times, and %q", d.closes(), d.breaches)
				}
			})
		})
	}
}

// TestNoFlushWithoutFlusher: for a device without Flush, FLUSH and FUA are refused.
func TestNoFlushWithoutFlusher(t *testing.T) {
	for _, through := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(4096)
			s.serve(throughDevice{d, through})
			p := s.negotiated("a")
			want := wire.EINVAL
			if through {
				want = wire.Success
			}
			p.wants(want, ranged(wire.CmdFlush, 0, 0, 0), nil)
			p.wants(want, ranged(wire.CmdWrite, wire.CmdFlagFUA, 0, 512), patternOf(0, 512))
			p.wants(want, ranged(wire.CmdWriteZeroes, wire.CmdFlagFUA, 1024, 512), nil)
			p.wants(wire.Success, ranged(wire.CmdWrite, 0, 2048, 512), patternOf(0, 512))
			if got, want := len(d.took()), map[bool]int{false: 1, true: 3}[through]; got != want {
				t.Errorf("written through %t: the device was written %d times, want %d", through, got, want)
			}
		})
	}
}

// A refused request never reaches the device, not even in part.
func TestRefusedWritesChangeNothing(t *testing.T) {
	const size = 4096
	tests := []struct {
		req  wire.Request
		want wire.Errno
	}{
		{ranged(wire.CmdWrite, 0, size-1, 2), wire.ENOSPC},
		{ranged(wire.CmdWrite, 0, size, 1), wire.ENOSPC},
		{ranged(wire.CmdWrite, 0, -8, 16), wire.ENOSPC},
		{ranged(wire.CmdWrite, wire.CmdFlagDF, 0, 16), wire.EINVAL},
		{ranged(wire.CmdWrite, wire.CmdFlagPayloadLen, 0, 16), wire.EINVAL},
		{ranged(wire.CmdWrite, 1<<15, 0, 16), wire.EINVAL},
		{ranged(wire.CmdWriteZeroes, 0, size-1, 2), wire.ENOSPC},
		{ranged(wire.CmdWriteZeroes, 0, -1, 1), wire.ENOSPC},
		{ranged(wire.CmdWriteZeroes, wire.CmdFlagDF, 0, 1), wire.EINVAL},
		{ranged(wire.CmdTrim, 0, size-1, 2), wire.EINVAL},
		{ranged(wire.CmdTrim, wire.CmdFlagNoHole, 0, 1), wire.EINVAL},
		{ranged(wire.CmdCache, 0, size, 1), wire.EINVAL},
		{ranged(wire.CmdCache, wire.CmdFlagReqOne, 0, 1), wire.EINVAL},
		{ranged(wire.CmdFlush, wire.CmdFlagNoHole, 0, 0), wire.EINVAL},
		{ranged(wire.CmdResize, 0, 0, 16), wire.EINVAL},
	}
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(size)
		s.serve(capableDevice{d})
		p := s.negotiated("a")
		for _, tt := range tests {
			var payload []byte
			if tt.req.Command == wire.CmdWrite {
				payload = bytes.Repeat([]byte{0xee}, int(tt.req.Length))
			}
			p.wants(tt.want, tt.req, payload)
		}
		if got := d.took(); len(got) != 0 {
			t.Errorf("the device was asked for %q, want nothing", got)
		}
	})
}

// The largest payload that works is the one that was advertised; a larger one
// is consumed whole.
func TestWriteMaxPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(1 << 20)
		s.serve(struct {
			*writableDevice
			BlockSizer
		}{d, &sizedDevice{nil, 1, 4096, 64 << 10}})
		p := s.negotiated("a")
		p.writes(0, 0, patternOf(0, 64<<10))
		p.wants(wire.EINVAL, ranged(wire.CmdWrite, 0, 0, 64<<10+1), make([]byte, 64<<10+1))
		p.wants(wire.EINVAL, ranged(wire.CmdWrite, 0, 0, 1<<20), make([]byte, 1<<20))
		p.wants(wire.Success, ranged(wire.CmdWriteZeroes, 0, 64<<10, 512<<10), nil) // has no payload
		p.reads(0, 64<<10)
	})
}

// TestWriteZeroesByWriting: a device without WriteZeroes is zeroed by writing zeroes to the
// range, of any length, and to no other byte.
func TestWriteZeroesByWriting(t *testing.T) {
	const size = 4 << 20
	for _, r := range []struct{ off, n int }{{0, 1}, {1, 4095}, {511, 1 << 20}, {3, 1<<20 + 1}, {1000, 3<<20 + 777}, {0, size}} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(size)
			pattern(d.data, 0)
			want := patternOf(0, size)
			clear(want[r.off : r.off+r.n])
			s.serve(d)
			p := s.negotiated("a")
			p.wants(wire.Success, ranged(wire.CmdWriteZeroes, wire.CmdFlagNoHole, r.off, r.n), nil)
			if !bytes.Equal(d.content(), want) {
				t.Errorf("%d bytes at %d: the device holds something else than zeroes there and its data elsewhere", r.n, r.off)
			}
		})
	}
}

// Errors of the device become errors of the protocol; the connection goes on.
func TestFailedWrites(t *testing.T) {
	all := []wire.Command{wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdFlush, wire.CmdCache}
	for err, want := range map[error]wire.Errno{
		errors.New("broken"): wire.EIO, syscall.EIO: wire.EIO, syscall.ENOSPC: wire.ENOSPC, syscall.EDQUOT: wire.EIO,
		syscall.EROFS: wire.EIO, syscall.EPERM: wire.EPERM, fmt.Errorf("wrapped: %w", syscall.ENOMEM): wire.ENOMEM,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(4096)
			d.before = func(string) error { return err }
			s.serve(capableDevice{d})
			p := s.negotiated("a")
			for _, c := range all {
				var payload []byte
				if c == wire.CmdWrite {
					payload = make([]byte, 16)
				}
				p.wants(want, ranged(c, 0, 0, 16), payload)
			}
			if got := p.does(ranged(wire.CmdRead, 0, 0, 0), nil); got != wire.Success {
				t.Errorf("after all failures a read gets %v", got)
			}
		})
	}
}

// TestFailedFUA: a request with FUA fails if the flush fails, even though it was written.
func TestFailedFUA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(4096)
		d.before = func(what string) error {
			if what == "flush" {
				return syscall.EIO
			}
			return nil
		}
		s.serve(capableDevice{d})
		p := s.negotiated("a")
		p.wants(wire.EIO, ranged(wire.CmdWrite, wire.CmdFlagFUA, 0, 4), make([]byte, 4))
		p.wants(wire.EIO, ranged(wire.CmdTrim, wire.CmdFlagFUA, 0, 4), nil)
		p.wants(wire.EIO, ranged(wire.CmdWriteZeroes, wire.CmdFlagFUA, 0, 4), nil)
		p.writes(0, 0, make([]byte, 4))
	})
}

// Many writes at once: each one keeps its own payload until it is done.
func TestWritesInFlightKeepTheirPayloads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const writes, length = 40, 5000
		s := newTestServer(t)
		d := newWritable(writes * length)
		gate := make(chan struct{})
		d.before = func(string) error { <-gate; return nil }
		s.serve(d)
		p := s.negotiated("a")
		for i := range writes {
			p.request(wire.Request{Command: wire.CmdWrite, Cookie: uint64(i), Offset: uint64(i * length), Length: length},
				patternOf(int64(i*length), length))
		}
		synctest.Wait()
		close(gate)
		var cookies []uint64
		for range writes {
			r := p.anyReply()
			if r.Errno != wire.Success {
				t.Errorf("write %d: %v", r.Cookie, r.Errno)
			}
			cookies = append(cookies, r.Cookie)
		}
		slices.Sort(cookies)
		if len(slices.Compact(cookies)) != writes {
			t.Errorf("replies to %d writes, want %d", len(slices.Compact(cookies)), writes)
		}
		p.reads(0, writes*length)
	})
}

// A payload that never comes whole is not written, and does not hold the
// connection for ever.
func TestWriteWithoutItsPayload(t *testing.T) {
	ends := map[string]func(p *peer){
		"connection lost inside a payload": func(p *peer) { p.nc.Close() },
		"payload":                          func(*peer) { advance(time.Hour) },
	}
	for text, end := range ends {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(4096)
			s.serve(d)
			p := s.negotiated("a")
			p.request(ranged(wire.CmdWrite, 0, 0, 4096), make([]byte, 4095))
			synctest.Wait()
			end(p)
			wantHard(t, p.end(), text)
			if got := d.took(); len(got) != 0 || d.closes() != 1 {
				t.Errorf("the device was asked for %q and closed %d times, want nothing and once", got, d.closes())
			}
		})
	}
}

// Requests in flight at the end of a connection are finished before the device is closed.
func TestDeviceIsClosedAfterTheLastWrite(t *testing.T) {
	for _, c := range []wire.Command{wire.CmdWrite, wire.CmdFlush, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdCache} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			d := newWritable(4096)
			gate := make(chan struct{})
			d.before = func(string) error { <-gate; return nil }
			s.serve(capableDevice{d})
			p := s.negotiated("a")
			var payload []byte
			if c == wire.CmdWrite {
				payload = make([]byte, 512)
			}
			p.request(ranged(c, 0, 0, 512), payload)
			synctest.Wait()
			p.nc.Close()
			synctest.Wait()
			if d.closes() != 0 {
				t.Errorf("%v: the device was closed while it was busy", c)
			}
			close(gate)
			p.end()
			if got := len(d.took()); got != 1 || d.closes() != 1 || len(d.breaches) > 0 {
				t.Errorf("%v: done %d times, closed %d times, and %q", c, got, d.closes(), d.breaches)
			}
		})
	}
}
