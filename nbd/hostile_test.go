package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// feed sends bytes and takes whatever comes back, then hangs up and waits for
// the server to be done with it.
func (p *peer) feed(b []byte) {
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(io.Discard, p.nc) })
	p.nc.Write(b)
	synctest.Wait()
	p.nc.Close()
	wg.Wait()
	p.end()
}

// noise makes a client that is mostly wrong: random bytes, and messages of the
// protocol with random fields.
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
		case 2: // a length that is a lie
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

// No bytes of a stranger may harm the server or those who come after.
func TestRandomBytes(t *testing.T) {
	const connections = 300
	phases := map[string]func(p *peer){
		"haggling": func(p *peer) {
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

// A length is a claim: nothing is allocated for it, and what is absurd ends
// the session at once, not when its bytes have come.
func TestAnnouncedLengthsAreNotBelieved(t *testing.T) {
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

// Data above what is looked at is skipped, and the next option is parsed
// properly.
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

// What breaks the format ends the negotiation with an error that says so.
func TestClientEndsBrokenNegotiation(t *testing.T) {
	afterGo := func(b ...[]byte) func(s *script) {
		return func(s *script) {
			s.greet()
			s.option()
			s.send(b...)
			s.hangs()
		}
	}
	info := goReply(wire.RepInfo, exportInfoData(wire.FlagHasFlags))
	absurd := wire.ExportInfo{Size: 1 << 63, Flags: wire.FlagHasFlags}
	withLength := func(n uint32) []byte {
		b := goReply(wire.RepInfo, nil)
		b[16], b[17], b[18], b[19] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
		return b
	}
	tests := []struct {
		name string
		run  func(s *script)
		want string
	}{
		{"foreign greeting", func(s *script) { s.send([]byte("SSH-2.0-OpenSSH_9.9p1\r\n")); s.hangs() }, "not a newstyle NBD server"},
		{"oldstyle", func(s *script) { s.send([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00")); s.hangs() }, "not a newstyle NBD server"},
		{"short greeting", func(s *script) { s.send([]byte("NBDMAGICIHAVE")) }, "no greeting"},
		{"wrong magic", afterGo(make([]byte, wire.OptionReplyHeaderLen)), "bad magic"},
		{"another option", afterGo(wire.AppendOptionReply(nil, wire.OptInfo, wire.RepAck, nil)), "another option"},
		{"long reply", afterGo(withLength(maxReplyData + 1)), "too long"},
		{"absurd reply", afterGo(withLength(1<<32 - 1)), "too long"},
		{"ACK with data", afterGo(info, goReply(wire.RepAck, []byte{0})), "NBD_REP_ACK with data"},
		{"endless replies", afterGo(bytes.Repeat(info, 10_000)), "endless"},
		{"ACK without information", afterGo(goReply(wire.RepAck, nil)), "without NBD_INFO_EXPORT"},
		{"reply to LIST", afterGo(goReply(wire.RepServer, make([]byte, 4))), "unexpected reply"},
		{"empty information", afterGo(goReply(wire.RepInfo, nil)), "malformed"},
		{"short information", afterGo(goReply(wire.RepInfo, exportInfoData(1)[:11])), "malformed"},
		{"long information", afterGo(goReply(wire.RepInfo, append(exportInfoData(1), 0))), "malformed"},
		{"without HAS_FLAGS", afterGo(goReply(wire.RepInfo, exportInfoData(wire.FlagReadOnly)), goReply(wire.RepAck, nil)), "NBD_FLAG_HAS_FLAGS"},
		{"absurd size", afterGo(goReply(wire.RepInfo, absurd.AppendInfo(nil, wire.InfoExport)), goReply(wire.RepAck, nil)), "absurd size"},
		{"unknown error", afterGo(goReply(1<<31|4711, []byte("odd"))), "odd"},
		{"end instead of an answer", func(s *script) { s.greet(); s.option() }, "no answer"},
		{"end inside an answer", func(s *script) { s.greet(); s.option(); s.send(info[:len(info)-1]) }, "cut short"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nc := against(t, tt.run)
				c, err := NewClient(t.Context(), nc, &ClientConfig{NoStructured: true})
				if err == nil {
					_, err = c.Go(t.Context(), "a")
				}
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v, want one that says %q", err, tt.want)
				}
			})
		})
	}
}

// A reply that cannot be believed ends the connection for all calls; a lost
// connection is an error and never short data.
func TestConnEndsAfterABrokenReply(t *testing.T) {
	tests := []struct {
		name  string
		reply func(first, second uint64) []byte
		want  string
	}{
		{"unknown cookie", func(a, _ uint64) []byte { return simpleReply(wire.Success, a+1000) }, "not made"},
		{"the same answer twice", func(a, _ uint64) []byte {
			return append(simpleReply(wire.EIO, a), simpleReply(wire.EIO, a)...)
		}, "not made"},
		{"wrong magic", func(uint64, uint64) []byte { return make([]byte, wire.SimpleReplyLen) }, "bad magic"},
		{"structured reply", func(a, _ uint64) []byte {
			b := simpleReply(wire.Success, a)
			copy(b, []byte{0x66, 0x8e, 0x33, 0xef})
			return b
		}, "bad magic"},
		{"end", func(uint64, uint64) []byte { return nil }, "connection lost"},
		{"end inside a header", func(a, _ uint64) []byte { return simpleReply(wire.Success, a)[:15] }, "connection lost"},
		{"end before the data", func(a, _ uint64) []byte { return simpleReply(wire.Success, a) }, "inside a reply"},
		{"end inside the data", func(a, _ uint64) []byte { return simpleReply(wire.Success, a, make([]byte, 511)...) }, "inside a reply"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := connTo(t, against(t, func(s *script) {
					s.transmission()
					a, b := s.request(), s.request()
					s.send(tt.reply(a.Cookie, b.Cookie))
				}), "a")
				var wg sync.WaitGroup
				var found bool
				var mu sync.Mutex
				for range 2 {
					wg.Go(func() {
						n, err := conn.ReadAt(make([]byte, 512), 0)
						if err == nil || n != 0 || errors.Is(err, io.EOF) {
							t.Errorf("got %d bytes and error %v", n, err)
							return
						}
						mu.Lock()
						defer mu.Unlock()
						found = found || strings.Contains(err.Error(), tt.want)
					})
				}
				wg.Wait()
				if !found {
					t.Errorf("no call failed with an error that says %q", tt.want)
				}
				if _, err := conn.ReadAt(make([]byte, 512), 0); err == nil {
					t.Error("the connection can still be used")
				}
				if err := conn.Close(); err != nil {
					t.Errorf("Close after the end: %v", err)
				}
			})
		})
	}
}

// FuzzServerConn sends bytes of a client to a server. The device holds the
// server to its contract; synctest finds what never ends.
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
