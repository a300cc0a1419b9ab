package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// Each test here is named after a defect of this server's predecessor or of another NBD
// implementation. If the defect comes back other tests fail too; the name shows the cause.

// defect runs a test in a bubble against a server with one writable device.
func defect(t *testing.T, f func(t *testing.T, s *testServer, d *writableDevice)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		d := newWritable(1 << 20)
		pattern(d.data, 0)
		s.serve(capableDevice{d})
		f(t, s, d)
	})
}

// LIST was read as if a second length followed the first: the server waited
// for bytes that no client sends.
func TestDefectListParsedWithOneLengthTooMany(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.refused(wire.OptList, nil, wire.RepErrPolicy) // at once, or the bubble deadlocks
		p.goTo("a")
		p.reads(0, 512)
	})
}

// The length of a reply to LIST was not that of its data. The next option shows whether the
// client finds the next reply.
func TestDefectListAnsweredWithAWrongLength(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		p := s.connect()
		p.greet(fixedNoZeroes)
		for range 3 {
			p.refused(wire.OptList, nil, wire.RepErrPolicy)
		}
		p.refused(wire.OptList, []byte{0, 0, 0, 0}, wire.RepErrInvalid)
		p.refused(wire.OptAbort, nil, wire.RepAck)
		if err := p.closed(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// Clients opened only one connection, because MULTI_CONN was not advertised.
func TestDefectMultiConnNotAdvertised(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, d *writableDevice) {
		for _, dev := range []Device{newDevice(512), capableDevice{d}} {
			s.serve(dev)
			p := s.connect()
			p.greet(fixedNoZeroes)
			if got := p.goTo("a").Flags; got&wire.FlagCanMultiConn == 0 {
				t.Errorf("%T: flags %v, want CAN_MULTI_CONN among them", dev, got)
			}
			p.disc()
			p.closed()
		}
	})
}

// Memory grew with each connection, and the server ended after some five hundred of them.
func TestDefectMemoryGrowsWithConnections(t *testing.T) {
	const connections = 500
	s := newTestServer(t)
	s.Logger = nil // the test's own log grows
	// A device that records nothing.
	s.exports.open = func(context.Context, Peer, string) (Device, error) { return cheapDevice(1 << 20), nil }
	use := func(i int) {
		p := &peer{t: t, ended: make(chan struct{})}
		near, far := net.Pipe()
		p.nc = near
		defer near.Close()
		go func() { defer close(p.ended); p.err = s.ServeConn(context.Background(), far) }()
		p.greet(fixedNoZeroes)
		if i%2 == 0 {
			p.option(wire.OptStructuredReply, nil)
			p.want(wire.OptStructuredReply, wire.RepAck)
		}
		p.goTo("a")
		p.request(ranged(wire.CmdRead, 0, 0, 64<<10), nil)
		if i%2 == 0 {
			p.receive(wire.ChunkLen + wire.ChunkOffsetLen + 64<<10)
		} else {
			p.receive(wire.SimpleReplyLen + 64<<10)
		}
		if i%3 != 0 { // others just hang up
			p.disc()
		}
		near.Close()
		<-p.ended
	}
	measure := func() (goroutines int, heap uint64) {
		runtime.GC()
		runtime.GC() // pools let go at the second one
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), m.HeapAlloc
	}
	for i := range 50 {
		use(i)
	}
	goroutines, heap := measure()
	for i := range connections {
		use(i)
	}
	goroutinesAfter, heapAfter := measure()
	if goroutinesAfter > goroutines+50 {
		t.Errorf("%d goroutines after %d connections, %d before", goroutinesAfter, connections, goroutines)
	}
	if heapAfter > heap+4<<20 {
		t.Errorf("%d KiB in use after %d connections, %d KiB before", heapAfter>>10, connections, heap>>10)
	}
	use(0)
}

// The zeroes after the reply to EXPORT_NAME were sent although the client
// had declined them, and any flag at all was accepted.
func TestDefectClientFlagsIgnored(t *testing.T) {
	for flags, want := range map[wire.ClientFlags]int{fixedNoZeroes: 10, wire.FlagCNoZeroes: 10, wire.FlagCFixedNewstyle: 134, 0: 134} {
		defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
			p := s.connect()
			p.greet(flags)
			p.option(wire.OptExportName, []byte("a"))
			p.receive(want)
			p.reads(512, 512) // in step
		})
	}
	for bit := 2; bit < 32; bit++ {
		defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
			p := s.connect()
			p.greet(fixedNoZeroes | 1<<bit)
			wantHard(t, p.closed(), "unknown client flags")
		})
	}
}

// Clients did not get the block sizes of the device.
func TestDefectNoBlockSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.serve(&sizedDevice{newDevice(1 << 20), 4096, 65536, 8 << 20})
		p := s.connect()
		p.greet(fixedNoZeroes)
		want := wire.BlockSizes{Min: 4096, Preferred: 65536, MaxPayload: 8 << 20}
		if got := p.info(wire.OptInfo, "a", wire.InfoBlockSize).BlockSizes; got != want {
			t.Errorf("INFO tells %+v, want %+v", got, want)
		}
		if got := p.goTo("a", wire.InfoBlockSize).BlockSizes; got != want {
			t.Errorf("GO tells %+v, want %+v", got, want)
		}
	})
}

// Clients that only list hang up without ABORT, some before they have read the
// reply. The server failed then.
func TestDefectClientHangsUpAfterList(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		for range 20 {
			p := s.connect()
			p.greet(fixedNoZeroes)
			p.refused(wire.OptList, nil, wire.RepErrPolicy)
			p.nc.Close()
			if err := p.end(); err == nil || !neterr.IsGone(err) {
				t.Errorf("ended with %v, want that the peer has gone", err)
			}
			p = s.connect()
			p.greet(fixedNoZeroes)
			p.option(wire.OptList, nil)
			p.nc.Close()
			p.end()
		}
		s.negotiated("a").reads(0, 512)
	})
}

// The client's receiving goroutine went on for ever after a disconnect.
func TestDefectClientDispatcherSurvivesDisconnect(t *testing.T) {
	ends := map[string]func(c *client.Conn, p *peer){
		"Close":          func(c *client.Conn, _ *peer) { c.Close() },
		"lost":           func(_ *client.Conn, p *peer) { p.nc.Close() },
		"lost and Close": func(c *client.Conn, p *peer) { p.nc.Close(); synctest.Wait(); c.Close() },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
				p := s.connect()
				c := connTo(t, p.nc, "a")
				if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
					t.Fatal(err)
				}
				end(c, p)
				p.end()
				<-c.Done() // or the bubble deadlocks
				synctest.Wait()
				// A goroutine that is left over keeps the bubble from ending.
			})
		})
	}
}

// ABORT was not answered: the server closed the connection.
func TestDefectAbortNotAcknowledged(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptAbort, nil)
		p.want(wire.OptAbort, wire.RepAck)
		if err := p.closed(); err != nil {
			t.Errorf("ended with %v, want peace", err)
		}
	})
}

// The client closed the connection without DISC, and servers logged a lost connection.
func TestDefectClientLeavesWithoutDisc(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		p := s.connect()
		c := connTo(t, p.nc, "a")
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := p.end(); err != nil {
			t.Errorf("server ended with %v, want NBD_CMD_DISC", err)
		}
	})
}

// Client flags were read with the wrong byte order: every client seemed to set
// unknown ones.
func TestDefectClientFlagsReadLittleEndian(t *testing.T) {
	defect(t, func(t *testing.T, s *testServer, _ *writableDevice) {
		p := s.connect()
		p.receive(wire.GreetingLen)
		p.send([]byte{0, 0, 0, 3})
		p.goTo("a")
		p = s.connect()
		p.receive(wire.GreetingLen)
		p.send(binary.LittleEndian.AppendUint32(nil, 3))
		wantHard(t, p.closed(), "unknown client flags")
	})
}

// GO was answered with the export that an INFO with another name had opened.
func TestDefectInfoAnswersALaterGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(_ context.Context, _ Peer, name string) (Device, error) {
			return newDevice(int64(len(name)) * 4096), nil
		}
		for _, opt := range []wire.Option{wire.OptGo, wire.OptExportName} {
			p := s.connect()
			p.greet(fixedNoZeroes)
			p.info(wire.OptInfo, "a")
			p.info(wire.OptInfo, "bb")
			var size uint64
			if opt == wire.OptGo {
				size = p.goTo("ccc").Size
			} else {
				p.option(opt, []byte("ccc"))
				size = binary.BigEndian.Uint64(p.receive(wire.ExportNameReplyLen))
			}
			if size != 3*4096 {
				t.Errorf("%v: size %d, want that of the export it names", opt, size)
			}
		}
	})
}

// Options that were negotiated before STARTTLS remained in force after it.
func TestDefectStateSurvivesSTARTTLS(t *testing.T) {
	for _, opt := range []wire.Option{wire.OptStructuredReply, wire.OptExtendedHeaders} {
		synctest.Test(t, func(t *testing.T) {
			p := newTLSServer(t, SelectiveTLS).connect()
			p.greet(fixedNoZeroes)
			p.refused(opt, nil, wire.RepAck)
			p.selects("a")
			p.startTLS(nil)
			// Contexts need structured replies, which are off again.
			p.refused(wire.OptSetMetaContext, wire.MetaContextRequest{Export: "a"}.Append(nil), wire.RepErrInvalid)
			p.refused(opt, nil, wire.RepAck)
			p.goTo("a")
			var b []byte
			if opt == wire.OptExtendedHeaders {
				p.send(ranged(wire.CmdBlockStatus, 0, 0, 512).AppendExtended(nil))
				b = p.receive(wire.ExtendedChunkLen + 6)[wire.ExtendedChunkLen:]
			} else {
				p.send(ranged(wire.CmdBlockStatus, 0, 0, 512).Append(nil))
				b = p.receive(wire.ChunkLen + 6)[wire.ChunkLen:]
			}
			if f, err := wire.ParseChunkFailure(wire.ChunkError, b); err != nil || f.Errno != wire.EINVAL {
				t.Errorf("%v: BLOCK_STATUS with a context of the clear: %v, %v; want EINVAL", opt, f, err)
			}
		})
	}
}

// Bytes sent in the clear after STARTTLS were used as if they had been received with TLS.
func TestDefectPlaintextAfterSTARTTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTLSServer(t, SelectiveTLS)
		p := s.connect()
		p.greet(fixedNoZeroes)
		injected := wire.AppendOption(wire.AppendOption(nil, wire.OptStartTLS, nil), wire.OptGo, infoRequest("injected"))
		var sent sync.WaitGroup
		sent.Go(func() { p.nc.Write(injected) })
		p.want(wire.OptStartTLS, wire.RepAck)
		if tls.Client(p.nc, clientTLS()).HandshakeContext(context.Background()) == nil {
			t.Error("TLS began behind plaintext that came after STARTTLS")
		}
		p.nc.Close()
		p.end()
		sent.Wait()
		if got := s.exports.opened(); len(got) != 0 {
			t.Errorf("plaintext opened %q", got)
		}
	})
}
