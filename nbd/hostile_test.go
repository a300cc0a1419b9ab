package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// feed sends bytes and reads all replies, then hangs up and waits until the server has closed
// the connection.
func (p *peer) feed(b []byte) {
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(io.Discard, p.nc) })
	p.nc.Write(b)
	synctest.Wait()
	p.nc.Close()
	wg.Wait()
	p.end()
}

// noise returns the bytes of a hostile client: random bytes, and messages of the protocol with
// random fields.
func noise(r *rand.Rand) []byte {
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	var b []byte
	if r.IntN(8) > 0 { // greet, so that the rest is looked at
		b = wire.AppendClientFlags(b, wire.ClientFlags(r.IntN(4)))
	}
	for range r.IntN(40) {
		switch r.IntN(6) {
		case 0:
			b = append(b, random(r.IntN(100))...)
		case 1:
			b = wire.AppendOption(b, wire.Option(r.IntN(13)), random(r.IntN(40)))
		case 2: // a wrong length
			b = wire.AppendOption(b, wire.Option(r.IntN(13)), nil)
			binary.BigEndian.PutUint32(b[len(b)-4:], r.Uint32N(1<<r.IntN(32)))
		case 3:
			req := wire.InfoRequest{Name: string(random(r.IntN(10))), Infos: make([]wire.Info, r.IntN(5))}
			data := req.Append(nil)
			data[r.IntN(len(data))] ^= byte(1 << r.IntN(8))
			b = wire.AppendOption(b, wire.OptInfo, data)
		default:
			b = appendNoise(b, r)
		}
	}
	return b
}

// appendNoise appends one request with random fields.
func appendNoise(b []byte, r *rand.Rand) []byte {
	req := wire.Request{
		Flags:   wire.CommandFlags(r.Uint32() & (1<<r.IntN(4) - 1)),
		Command: wire.Command(r.IntN(10)),
		Cookie:  r.Uint64(),
		Offset:  r.Uint64() >> r.IntN(64),
		Length:  uint64(r.Uint32() >> r.IntN(32)),
	}
	if req.Command == wire.CmdDisc || req.Command == wire.CmdWrite {
		req.Command = wire.CmdRead // mostly go on
	}
	return req.Append(b)
}

// TestRandomBytes: random bytes of a client do no harm to the server and to later clients.
func TestRandomBytes(t *testing.T) {
	const connections = 300
	phases := map[string]func(p *peer){
		"handshake": func(p *peer) {
			p.receive(wire.GreetingLen)
		},
		"transmission": func(p *peer) {
			p.greet(fixedNoZeroes)
			p.goTo("a")
		},
	}
	for phase, reach := range phases {
		t.Run(phase, func(t *testing.T) {
			for seed := range uint64(connections) {
				synctest.Test(t, func(t *testing.T) {
					s := newTLSServer(t, TLSMode(seed%2)) // NoTLS, SelectiveTLS
					s.MaxInflightBytes = 1 << 20
					r := rand.New(rand.NewPCG(seed, 0))
					p := s.connect()
					reach(p)
					b := noise(r)
					if phase == "transmission" {
						b = nil
						for range r.IntN(60) {
							b = appendNoise(b, r)
						}
						b = append(b, noise(r)...)
					}
					p.feed(b)
					s.negotiated("b").reads(0, 4096)
				})
			}
		})
	}
}

// Nothing is allocated for an announced length before its bytes have arrived, and a length
// above all limits ends the connection at once.
func TestAnnouncedLengthsAreNotAllocated(t *testing.T) {
	optionOf := func(opt wire.Option, length uint32) []byte {
		b := wire.AppendOption(nil, opt, nil)
		binary.BigEndian.PutUint32(b[len(b)-4:], length)
		return b
	}
	allocated := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.TotalAlloc
	}
	before := allocated()
	for _, opt := range []wire.Option{wire.OptExportName, wire.OptAbort, wire.OptList, wire.OptStartTLS, wire.OptInfo, wire.OptGo, 4711} {
		for _, length := range []uint32{maxSkippedData + 1, 1 << 31, 1<<32 - 1} {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).connect()
				p.greet(fixedNoZeroes)
				p.send(optionOf(opt, length))
				wantHard(t, p.closed(), "option data is too long")
			})
		}
	}
	synctest.Test(t, func(t *testing.T) {
		p := newTestServer(t).negotiated("a")
		for i := range 10 {
			p.send(wire.Request{Command: wire.CmdRead, Cookie: uint64(i), Length: 1<<32 - 1}.Append(nil))
			if errno := p.answer(uint64(i), 0, 0); errno != wire.EINVAL {
				t.Errorf("read of 4 GiB: %v", errno)
			}
		}
		p.send(wire.Request{Command: wire.CmdWrite, Length: 1<<32 - 1}.Append(nil))
		p.send(make([]byte, 100))
		p.nc.Close()
		wantHard(t, p.end(), "payload")
	})
	if got := allocated() - before; got > 64<<20 {
		t.Errorf("%d MiB were allocated for announcements", got>>20)
	}
}

// Option data above the limit is skipped, and the next option is parsed correctly.
func TestLongOptionDataIsSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newTestServer(t).connect()
		p.greet(fixedNoZeroes)
		for _, n := range []int{maxOptionData + 1, 10001, maxSkippedData} {
			// Full of options, which must not be served.
			data := bytes.Repeat(wire.AppendOption(nil, wire.OptAbort, nil), n/wire.OptionHeaderLen+1)[:n]
			p.refused(wire.OptInfo, data, wire.RepErrTooBig)
			p.refused(4711, data, wire.RepErrTooBig)
			p.refused(wire.OptList, nil, wire.RepErrPolicy)
		}
		p.refused(4711, make([]byte, maxOptionData), wire.RepErrUnsup)
		p.goTo("a")
	})
}

func TestEndlessOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newTestServer(t).connect()
		p.greet(fixedNoZeroes)
		for range defaults.MaxOptions {
			p.refused(wire.OptList, nil, wire.RepErrPolicy)
		}
		wantHard(t, p.closed(), "too many options")
	})
}

func TestMalformedInfoRequests(t *testing.T) {
	good := infoRequest("abc", wire.InfoName, 77)
	tests := map[string][]byte{
		"empty":                   nil,
		"a byte too many":         append(bytes.Clone(good), 0),
		"a name longer than all":  infoRequestWithNameLength(1000),
		"a name as long as all":   infoRequestWithNameLength(uint32(len(good) - 4)),
		"a name of 4 GiB":         infoRequestWithNameLength(1<<32 - 1),
		"more requests than data": append(bytes.Clone(good[:7]), 0xff, 0xff, 0, 0),
	}
	for n := 1; n < len(good); n++ {
		tests[fmt.Sprintf("first %d bytes", n)] = good[:n]
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.refused(wire.OptInfo, data, wire.RepErrInvalid)
				p.refused(wire.OptGo, data, wire.RepErrInvalid)
				if got := s.exports.opened(); len(got) != 0 {
					t.Errorf("opened %q", got)
				}
				p.goTo("a", wire.InfoName, 77) // still in step; unknown requests are ignored
			})
		})
	}
}

func infoRequestWithNameLength(n uint32) []byte {
	b := infoRequest("abc", wire.InfoName, 77)
	binary.BigEndian.PutUint32(b, n)
	return b
}

func TestBrokenGreetings(t *testing.T) {
	tests := []struct {
		name string
		send []byte
		text string
	}{
		{"unknown flag", wire.AppendClientFlags(nil, 4), "unknown client flags"},
		{"unknown high flag", wire.AppendClientFlags(nil, 1<<31|fixedNoZeroes), "unknown client flags"},
		{"no option", append(wire.AppendClientFlags(nil, 3), make([]byte, wire.OptionHeaderLen)...), "not an option"},
		{"HTTP", []byte("\x00\x00\x00\x03GET / HTTP/1.1\r\n"), "not an option"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).connect()
				p.receive(wire.GreetingLen)
				p.send(tt.send)
				wantHard(t, p.closed(), tt.text)
			})
		})
	}
}

// FuzzServerConn sends bytes of a client to a server. The device checks that the server keeps
// the contract of Device; synctest finds goroutines that never end.
func FuzzServerConn(f *testing.F) {
	flags := wire.AppendClientFlags(nil, fixedNoZeroes)
	with := func(parts ...[]byte) []byte { return append(bytes.Clone(flags), bytes.Join(parts, nil)...) }
	gone := wire.AppendOption(nil, wire.OptGo, infoRequest("a", wire.InfoBlockSize))
	disc := wire.Request{Command: wire.CmdDisc}.Append(nil)
	f.Add(with(gone, readRequest(1, 0, 4096), readRequest(2, 1000, 96), disc))
	f.Add(with(wire.AppendOption(nil, wire.OptExportName, []byte("a")), readRequest(1, 512, 512)))
	f.Add(with(wire.AppendOption(nil, wire.OptInfo, infoRequest("a")), gone, disc))
	f.Add(with(wire.AppendOption(nil, wire.OptStartTLS, nil), gone))
	f.Add(with(gone, wire.Request{Command: wire.CmdWrite, Length: 4}.Append(nil), []byte{1, 2, 3, 4}, disc))
	f.Add(with(wire.AppendOption(nil, wire.OptList, nil), wire.AppendOption(nil, wire.OptAbort, nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			s := newTLSServer(t, SelectiveTLS)
			s.MaxInflightBytes = 1 << 20
			s.exports.open = func(context.Context, Peer, string) (Device, error) {
				return &sizedDevice{newDevice(100_003), 512, 4096, 64 << 10}, nil
			}
			s.connect().feed(b)
		})
	})
}
