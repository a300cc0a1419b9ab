package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// wantHard expects that err is a hard disconnect with this in its text.
func wantHard(t testing.TB, err error, text string) {
	t.Helper()
	var hard *HardDisconnectError
	if !errors.As(err, &hard) || !strings.Contains(err.Error(), text) {
		t.Errorf("connection ended with %v, want a hard disconnect: %q", err, text)
	}
}

// sizedDevice is a fakeDevice with size constraints.
type sizedDevice struct {
	*fakeDevice
	minimum, preferred, maximum uint32
}

func (d *sizedDevice) BlockSizes() (uint32, uint32, uint32) {
	return d.minimum, d.preferred, d.maximum
}

// TestFailedRead: the reply to a failed read is an error without data, and the connection goes
// on.
func TestFailedRead(t *testing.T) {
	tests := []struct {
		name string
		n    int
		err  error
		want wire.Errno
	}{
		{"nothing read", 0, syscall.EIO, wire.EIO},
		{"half read", 2048, syscall.EIO, wire.EIO},
		{"short without an error", 4095, nil, wire.EIO},
		{"unexpected end", 100, io.EOF, wire.EIO},
		{"no memory", 0, &fs.PathError{Op: "read", Path: "x", Err: syscall.ENOMEM}, wire.ENOMEM},
		{"all read and the end", 4096, io.EOF, wire.Success},
		{"all read and an error", 4096, syscall.EIO, wire.Success},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				d := newDevice(1 << 20)
				d.onRead = func(p []byte, off int64) (int, error) {
					pattern(p, off)
					if off == 0 {
						return tt.n, tt.err
					}
					return len(p), nil
				}
				s.serve(d)
				p := s.negotiated("a")
				for range 3 {
					p.read(1, 0, 4096)
					if got := p.answer(1, 0, 4096); got != tt.want {
						t.Fatalf("got %v, want %v", got, tt.want)
					}
					p.reads(4096, 4096)
				}
				p.disc()
				if err := p.closed(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestErrnoOf(t *testing.T) {
	tests := []struct {
		err  error
		want wire.Errno
	}{
		{syscall.EPERM, wire.EPERM},
		{syscall.EACCES, wire.EPERM},
		{syscall.EIO, wire.EIO},
		{syscall.ENOMEM, wire.ENOMEM},
		{syscall.EINVAL, wire.EINVAL},
		{syscall.ENOSPC, wire.ENOSPC},
		{syscall.EOVERFLOW, wire.EOVERFLOW},
		{syscall.ENOTSUP, wire.ENOTSUP},
		{syscall.ESHUTDOWN, wire.ESHUTDOWN},
		{syscall.ENXIO, wire.EIO}, // no number of the protocol
		{syscall.EBADMSG, wire.EIO},
		{&fs.PathError{Op: "read", Path: "/dev/x", Err: syscall.ENOSPC}, wire.ENOSPC},
		{fmt.Errorf("layer: %w", fmt.Errorf("layer: %w", syscall.EPERM)), wire.EPERM},
		{fmt.Errorf("remote: %w", wire.ESHUTDOWN), wire.ESHUTDOWN},
		{&client.Error{Op: "NBD_CMD_READ", Errno: wire.EIO}, wire.EIO},
		{io.ErrUnexpectedEOF, wire.EIO},
		{errors.New("whatever"), wire.EIO},
	}
	for _, tt := range tests {
		if got := errnoOf(tt.err); got != tt.want {
			t.Errorf("errnoOf(%v) = %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestOnlyTheFirstFailuresAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newDevice(1 << 20)
		d.onRead = func([]byte, int64) (int, error) { return 0, syscall.EBADMSG }
		s.serve(d)
		p := s.negotiated("name-with-a-secret")
		for i := range 20 {
			p.read(uint64(i), 0, 512)
			p.answer(uint64(i), 0, 512)
		}
		p.disc()
		p.closed()
		p.end()
		log := s.log.String()
		if got := strings.Count(log, `msg="request failed"`); got != loggedFailures {
			t.Errorf("%d failures logged singly, want %d", got, loggedFailures)
		}
		if got := strings.Count(log, syscall.EBADMSG.Error()); got != loggedFailures {
			t.Errorf("the true error was logged %d times, want %d", got, loggedFailures)
		}
		if !strings.Contains(log, "requests=21") || !strings.Contains(log, "failed=20") {
			t.Errorf("the end of the transmission is not summed up: %s", log[strings.LastIndex(log, "time="):])
		}
		if strings.Contains(log, "secret") {
			t.Error("the export's name was logged")
		}
	})
}

// Sizes need not be a multiple of anything; the bytes after the last whole sector are part of
// the disk as well.
func TestLastBytesOfAnOddSize(t *testing.T) {
	const size = 1000*512 + 67
	for _, min := range []uint32{0, 512, 4096} {
		t.Run(fmt.Sprint("minimum ", min), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.exports.open = func(context.Context, Peer, string) (Device, error) {
					return &sizedDevice{newDevice(size), min, 0, 0}, nil
				}
				told := s.connect()
				told.greet(fixedNoZeroes)
				if got := told.goTo("a", wire.InfoBlockSize); got.Size != size || got.BlockSizes.Min != max(min, 1) {
					t.Errorf("got %+v, want all %d bytes", got, size)
				}
				unit := int(max(min, 1))
				tail := size / unit * unit
				told.reads(tail-unit, size-tail+unit)
				if tail < size {
					told.reads(tail, size-tail)
				}
				told.read(1, tail, unit+size%unit)
				if got := told.answer(1, 0, 0); got != wire.EINVAL {
					t.Errorf("read past the end: %v", got)
				}
				untold := s.negotiated("a")
				untold.reads(size-1, 1)
				untold.reads(size-67, 67)
				untold.reads(size, 0)
			})
		})
	}
}

func TestUnalignedRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(context.Context, Peer, string) (Device, error) {
			return &sizedDevice{newDevice(64 << 10), 4096, 4096, 0}, nil
		}
		told := s.connect()
		told.greet(fixedNoZeroes)
		told.goTo("a", wire.InfoBlockSize)
		for i, r := range [][2]int{{512, 4096}, {0, 512}, {4096, 4097}} {
			told.read(uint64(i), r[0], r[1])
			if got := told.answer(uint64(i), 0, 0); got != wire.EINVAL {
				t.Errorf("%v: %v", r, got)
			}
		}
		told.reads(4096, 8192)
		s.negotiated("a").reads(511, 3) // did not ask for block sizes, so any range is valid
	})
}

// A payload above the advertised maximum is refused before anything is allocated.
func TestMaxPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(context.Context, Peer, string) (Device, error) {
			return &sizedDevice{newDevice(1 << 40), 512, 4096, 1 << 20}, nil
		}
		p := s.negotiated("a")
		p.reads(0, 1<<20)
		for _, n := range []uint64{1<<20 + 1, 32<<20 + 1, 1<<32 - 1} {
			p.send(wire.Request{Command: wire.CmdRead, Cookie: 1, Length: n}.Append(nil))
			if got := p.answer(1, 0, 0); got != wire.EINVAL {
				t.Errorf("read of %d bytes: %v", n, got)
			}
		}
	})
}

// Requests that cannot be served are refused with the right error, and the connection goes
// on with the next request.
func TestRefusedRequests(t *testing.T) {
	tests := []struct {
		name    string
		req     wire.Request
		payload int
		want    wire.Errno
	}{
		{"WRITE", wire.Request{Command: wire.CmdWrite, Length: 4096}, 4096, wire.EPERM},
		{"WRITE past the end", wire.Request{Command: wire.CmdWrite, Offset: 1 << 40, Length: 512}, 512, wire.EPERM},
		{"WRITE of nothing", wire.Request{Command: wire.CmdWrite}, 0, wire.EPERM},
		{"TRIM", wire.Request{Command: wire.CmdTrim, Length: 1<<32 - 1}, 0, wire.EPERM},
		{"WRITE_ZEROES", wire.Request{Command: wire.CmdWriteZeroes, Length: 1<<32 - 1, Flags: wire.CmdFlagFastZero}, 0, wire.EPERM},
		{"FLUSH", wire.Request{Command: wire.CmdFlush}, 0, wire.EINVAL},
		{"CACHE", wire.Request{Command: wire.CmdCache, Length: 512}, 0, wire.EINVAL},
		{"BLOCK_STATUS", wire.Request{Command: wire.CmdBlockStatus, Length: 512}, 0, wire.EINVAL},
		{"unknown command", wire.Request{Command: 4711, Length: 1<<32 - 1}, 0, wire.EINVAL},
		{"READ with FUA", wire.Request{Flags: wire.CmdFlagFUA, Length: 512}, 0, wire.EINVAL},
		{"READ with DF", wire.Request{Flags: wire.CmdFlagDF, Length: 512}, 0, wire.EINVAL},
		{"READ with an unknown flag", wire.Request{Flags: 1 << 15, Length: 512}, 0, wire.EINVAL},
		{"READ behind the end", wire.Request{Offset: 1 << 20, Length: 1}, 0, wire.EINVAL},
		{"READ over the end", wire.Request{Offset: 1<<20 - 1, Length: 2}, 0, wire.EINVAL},
		{"READ that wraps round", wire.Request{Offset: 1<<64 - 512, Length: 1024}, 0, wire.EINVAL},
		{"READ of 2^63", wire.Request{Offset: 1 << 63, Length: 512}, 0, wire.EINVAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).negotiated("a")
				for i := range 3 {
					tt.req.Cookie = uint64(i)
					// The payload is full of requests, which must not be served.
					payload := strings.Repeat(string(readRequest(666, 0, 512)), tt.payload/wire.RequestLen+1)[:tt.payload]
					p.send(append(tt.req.Append(nil), payload...))
					if got := p.answer(uint64(i), 0, 0); got != tt.want {
						t.Fatalf("got %v, want %v", got, tt.want)
					}
					p.reads(1<<20-1, 1)
				}
			})
		})
	}
}

// A refused peer gets the text of a Refusal, and no text for other errors.
func TestRefusedExports(t *testing.T) {
	cause := errors.New("the secret cause")
	tests := []struct {
		name string
		err  error
		typ  wire.OptionReply
		text string
	}{
		{"invalid", Refuse(ErrInvalid, "bad name", cause), wire.RepErrInvalid, "bad name"},
		{"policy", Refuse(ErrPolicy, "no permission", cause), wire.RepErrPolicy, "no permission"},
		{"unknown", Refuse(ErrUnknownExport, "no such disk", nil), wire.RepErrUnknown, "no such disk"},
		{"shutdown", Refuse(ErrShutdown, "host goes down", nil), wire.RepErrShutdown, "host goes down"},
		{"TLS", Refuse(ErrTLSRequired, "not in the clear", nil), wire.RepErrTLSReqd, "not in the clear"},
		{"kind of its own", Refuse(io.EOF, "odd", nil), wire.RepErrUnknown, "odd"},
		{"wrapped", fmt.Errorf("open: %w", Refuse(ErrPolicy, "no", cause)), wire.RepErrPolicy, "no"},
		{"any other", cause, wire.RepErrUnknown, "the export cannot be opened; the server's log says why"},
		{"not fit for a terminal", Refuse(ErrPolicy, "a\x1b[2Jb\x00c\xffd\ne", nil), wire.RepErrPolicy, "a [2Jb c?d e"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
					if name == "good" {
						return newDevice(512), nil
					}
					return nil, tt.err
				}
				p := s.connect()
				p.greet(fixedNoZeroes)
				for _, opt := range []wire.Option{wire.OptInfo, wire.OptGo} {
					if got := p.refused(opt, infoRequest("bad"), tt.typ); got != tt.text {
						t.Errorf("%v: refused with %q, want %q", opt, got, tt.text)
					}
				}
				p.goTo("good")
				old := s.connect()
				old.greet(fixedNoZeroes)
				old.option(wire.OptExportName, []byte("bad"))
				wantHard(t, old.closed(), tt.typ.String())
				if errors.Is(tt.err, cause) && !strings.Contains(s.log.String(), cause.Error()) {
					t.Error("the cause is not in the log")
				}
			})
		})
	}
}

// TestRefusedNames: invalid names are refused without calling the exporter.
func TestRefusedNames(t *testing.T) {
	tests := []struct{ name, export string }{
		{"too long", strings.Repeat("x", wire.MaxString+1)},
		{"not UTF-8", "a\xffb"},
		{"NUL", "a\x00b"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.refused(wire.OptInfo, infoRequest(tt.export), wire.RepErrInvalid)
				p.refused(wire.OptGo, infoRequest(tt.export), wire.RepErrInvalid)
				p.option(wire.OptExportName, []byte(tt.export))
				p.closed()
				if got := s.exports.opened(); len(got) != 0 {
					t.Errorf("opened %q", got)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.goTo(strings.Repeat("x", wire.MaxString))
	})
}

func TestHardDisconnectErrorIsErrClosed(t *testing.T) {
	for _, cause := range []error{nil, io.EOF} {
		err := hardDisconnect("why", cause)
		if !errors.Is(err, net.ErrClosed) || (cause != nil && !errors.Is(err, cause)) {
			t.Errorf("%v does not match net.ErrClosed and its cause", err)
		}
	}
}

// TestBlockSizes: the client gets size constraints that the protocol permits, also if the
// device returns others, section "Size constraints".
func TestBlockSizes(t *testing.T) {
	const k, m = 1 << 10, 1 << 20
	tests := []struct{ give, want wire.BlockSizes }{
		{wire.BlockSizes{}, wire.BlockSizes{Min: 1, Preferred: 4 * k, MaxPayload: 32 * m}},
		{wire.BlockSizes{Min: 512, Preferred: 512, MaxPayload: m}, wire.BlockSizes{Min: 512, Preferred: 512, MaxPayload: m}},
		{wire.BlockSizes{Min: 3}, wire.BlockSizes{Min: 4, Preferred: 4 * k, MaxPayload: 32 * m}},
		{wire.BlockSizes{Min: 8 * k, Preferred: 512}, wire.BlockSizes{Min: 8 * k, Preferred: 8 * k, MaxPayload: 32 * m}},
		{wire.BlockSizes{Min: m}, wire.BlockSizes{Min: 64 * k, Preferred: 64 * k, MaxPayload: 32 * m}},
		{wire.BlockSizes{Preferred: 1}, wire.BlockSizes{Min: 1, Preferred: 512, MaxPayload: 32 * m}},
		{wire.BlockSizes{MaxPayload: 1}, wire.BlockSizes{Min: 1, Preferred: 4 * k, MaxPayload: 4 * k}},
		{wire.BlockSizes{Min: 4 * k, MaxPayload: m + 1}, wire.BlockSizes{Min: 4 * k, Preferred: 4 * k, MaxPayload: m}},
		{wire.BlockSizes{MaxPayload: 1<<32 - 1}, wire.BlockSizes{Min: 1, Preferred: 4 * k, MaxPayload: 32 * m}},
		// Some disks report a senseless optimal size; the maximum is 32 MiB.
		{wire.BlockSizes{Preferred: 1<<32 - 512}, wire.BlockSizes{Min: 1, Preferred: 32 * m, MaxPayload: 32 * m}},
	}
	for _, tt := range tests {
		if got := blockSizesOf(&sizedDevice{newDevice(m), tt.give.Min, tt.give.Preferred, tt.give.MaxPayload}); got != tt.want {
			t.Errorf("%+v: got %+v, want %+v", tt.give, got, tt.want)
		}
	}
}
