package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

func TestClientIsUsableAfterARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		exports := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
			"good": func() (nbd.Device, error) { return newMem(4096), nil },
			"bad":  func() (nbd.Device, error) { return nil, nbd.Refuse(nbd.ErrPolicy, "not for you", nil) },
		}}
		t.Cleanup(func() { checkUse(t, exports) })
		nc, _ := nbdtest.Pipe(t, &nbd.Server{Exporter: exports})
		c, err := New(t.Context(), nc, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			_, err = c.Go(t.Context(), "bad")
			var refusal *Error
			if !errors.As(err, &refusal) || *refusal != (Error{Op: "NBD_OPT_GO", Reply: wire.RepErrPolicy, Text: "not for you"}) {
				t.Fatalf("got %#v, want the refusal with its text", err)
			}
			for _, want := range []string{"NBD_OPT_GO", "NBD_REP_ERR_POLICY", "not for you"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		}
		conn, err := c.Go(t.Context(), "good")
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 512)
		if _, err := conn.ReadAt(p, 512); err != nil || !bytes.Equal(p, patternOf(512, 512)) {
			t.Errorf("error %v or wrong data", err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Section "Client flags": the client sets only flags that the server offers and that it
// knows.
func TestClientFlags(t *testing.T) {
	for offered, want := range map[wire.HandshakeFlags]wire.ClientFlags{
		wire.FlagFixedNewstyle: wire.FlagCFixedNewstyle,
		0xffff:                 wire.FlagCFixedNewstyle | wire.FlagCNoZeroes,
	} {
		synctest.Test(t, func(t *testing.T) {
			var got wire.ClientFlags
			nc := against(t, func(s *script) {
				s.send(wire.AppendGreeting(nil, offered))
				got = wire.ParseClientFlags((*[4]byte)(s.receive(4)))
			})
			if _, err := New(t.Context(), nc, &Config{NoStructured: true}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if got != want {
				t.Errorf("offered %v: client sent %v, want %v", offered, got, want)
			}
		})
	}
}

func TestClientTakesInformationInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sizes := wire.ExportInfo{Description: "d", BlockSizes: wire.BlockSizes{Min: 1, Preferred: 4096, MaxPayload: 1 << 20}}
		conn := connTo(t, against(t, func(s *script) {
			s.greet()
			s.option()
			s.send(goReply(wire.RepInfo, sizes.AppendInfo(nil, wire.InfoBlockSize)),
				goReply(wire.RepInfo, []byte{0x47, 0x11, 1, 2, 3}), // unknown: ignored
				goReply(wire.RepInfo, exportInfoData(wire.FlagHasFlags)),
				goReply(wire.RepInfo, sizes.AppendInfo(nil, wire.InfoDescription)),
				goReply(wire.RepAck, nil))
			s.discard()
		}), "a")
		want := wire.ExportInfo{Size: 1 << 20, Flags: wire.FlagHasFlags, Description: "d", BlockSizes: sizes.BlockSizes}
		if got := conn.Info(); got != want || conn.Size() != 1<<20 {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// The context of Go limits the negotiation only.
func TestConnOutlivesTheContextOfGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c, err := New(ctx, connectTo(t, newMem(1<<20)), nil)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := c.Go(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		cancel()
		synctest.Wait()
		if _, err := conn.ReadAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	})
}

func TestClientTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &nbd.Server{Exporter: nbdtest.Single("a", newMem(1<<20)), TLSConfig: serverTLS(t)}
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil }
		nc, _ := nbdtest.Pipe(t, s)
		c, err := New(t.Context(), nc, &Config{TLSConfig: clientTLS(t)})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := c.Go(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 100<<10)
		if _, err := conn.ReadAt(p, 77); err != nil || !bytes.Equal(p, patternOf(77, len(p))) {
			t.Errorf("error %v or wrong data", err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
}

// queueingConn does not wait for its peer to read: in a TLS handshake that fails, both ends
// may write at the same time.
type queueingConn struct {
	net.Conn
	out chan<- []byte
}

func (c *queueingConn) Write(p []byte) (int, error) {
	c.out <- bytes.Clone(p)
	return len(p), nil
}

// A client with TLSConfig does not continue without TLS, and uses no data that arrived in
// the clear.
func TestClientInsistsOnTLS(t *testing.T) {
	reply := func(typ wire.OptionReply, behind []byte) func(s *script) {
		return func(s *script) {
			s.greet()
			s.option()
			go s.send(wire.AppendOptionReply(nil, wire.OptStartTLS, typ, nil), behind)
			s.discard()
		}
	}
	injected := append(goReply(wire.RepInfo, exportInfoData(wire.FlagHasFlags)), goReply(wire.RepAck, nil)...)
	distrustful := clientTLS(t)
	distrustful.ServerName = "somebody.else"
	tests := []struct {
		name string
		run  func(s *script)
		cfg  *tls.Config
		want string
	}{
		{"unsupported", reply(wire.RepErrUnsup, nil), clientTLS(t), "NBD_REP_ERR_UNSUP"},
		{"refused", reply(wire.RepErrPolicy, nil), clientTLS(t), "NBD_REP_ERR_POLICY"},
		{"information", reply(wire.RepInfo, nil), clientTLS(t), "unexpected reply"},
		{"plaintext behind the ACK", reply(wire.RepAck, injected), clientTLS(t), "TLS handshake"},
		{"wrong name", func(s *script) {
			s.greet()
			s.option()
			s.send(wire.AppendOptionReply(nil, wire.OptStartTLS, wire.RepAck, nil))
			out := make(chan []byte, 16)
			defer close(out)
			go func() {
				for b := range out {
					s.nc.Write(b)
				}
			}()
			tls.Server(&queueingConn{s.nc, out}, serverTLS(t)).Handshake()
		}, distrustful, "TLS handshake"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, err := New(t.Context(), against(t, tt.run), &Config{TLSConfig: tt.cfg})
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v, want one that says %q", err, tt.want)
				}
			})
		})
	}
}

// After a failed command the connection can be used further.
func TestConnGoesOnAfterAFailedRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := nbdtest.NewFaulty(newMem(1 << 20))
		d.Fail(0, 512, syscall.ENOMEM)
		conn := connTo(t, connectTo(t, d), "a")
		for range 2 {
			n, err := conn.ReadAt(make([]byte, 512), 0)
			var failure *Error
			if n != 0 || !errors.Is(err, wire.ENOMEM) || errors.Is(err, wire.EIO) || !errors.As(err, &failure) || failure.Op != "NBD_CMD_READ" {
				t.Errorf("got %d bytes and error %v, want NBD_ENOMEM", n, err)
			}
			if _, err := conn.ReadAt(make([]byte, 512), 512); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestConnManyCallsAtOnce(t *testing.T) {
	const calls, size = 50, 4096
	synctest.Test(t, func(t *testing.T) {
		conn := connTo(t, against(t, func(s *script) {
			s.transmission()
			var reqs []wire.Request
			for range calls {
				reqs = append(reqs, s.request())
			}
			for i := range reqs { // last first
				r := reqs[len(reqs)-1-i]
				s.send(simpleReply(wire.Success, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...))
			}
			s.discard()
		}), "a")
		var wg sync.WaitGroup
		for i := range calls {
			wg.Go(func() {
				p := make([]byte, size-i)
				off := int64(i * size)
				if n, err := conn.ReadAt(p, off); n != len(p) || err != nil || !bytes.Equal(p, patternOf(off, len(p))) {
					t.Errorf("call %d: %d bytes, error %v, or wrong data", i, n, err)
				}
			})
		}
		wg.Wait()
	})
}

// measuredReads is a device that remembers the length of the largest read.
type measuredReads struct {
	*nbdtest.Mem
	largest atomic.Int64
}

func (d *measuredReads) ReadAt(p []byte, off int64) (int, error) {
	d.largest.Store(max(d.largest.Load(), int64(len(p)))) // the client sends one request at a time
	return d.Mem.ReadAt(p, off)
}

func TestConnSplitsLargeReads(t *testing.T) {
	tests := []struct {
		name  string
		limit uint32 // advertised; 0: not
		want  int64  // the largest request
	}{
		{"advertised", 1 << 20, 1 << 20},
		{"default", 0, wire.DefaultMaxPayload},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &measuredReads{Mem: newMem(80 << 20)}
				d.Min, d.Preferred, d.MaxPayload = 512, 4096, tt.limit
				conn := connTo(t, connectTo(t, d), "a")
				p := make([]byte, 2*tt.want+1024)
				if n, err := conn.ReadAt(p, 512); n != len(p) || err != nil {
					t.Fatalf("%d bytes, error %v", n, err)
				}
				if !bytes.Equal(p, patternOf(512, len(p))) {
					t.Error("wrong data")
				}
				if d.largest.Load() != tt.want || d.Reads() != 3 {
					t.Errorf("%d requests of up to %d bytes, want 3 of up to %d", d.Reads(), d.largest.Load(), tt.want)
				}
			})
		})
	}
}

// TestConnKeepsToTheBlockSizes: the client requests whole blocks for any range of the caller,
// and ignores invalid block sizes.
func TestConnKeepsToTheBlockSizes(t *testing.T) {
	const size = 5*4096 + 67
	ranges := [][2]int{{0, size}, {1, 1}, {4095, 2}, {511, 9000}, {4096, 4096}, {8192, 4097}, {size - 68, 68}, {size - 1, 1}}
	check := func(t *testing.T, conn *Conn, seed byte) {
		for _, r := range ranges {
			p := bytes.Repeat([]byte{seed}, r[1])
			if n, err := conn.ReadAt(p, int64(r[0])); n != r[1] || err != nil || !bytes.Equal(p, patternOf(int64(r[0]), r[1])) {
				t.Errorf("%d bytes at %d: %d, error %v, or wrong data", r[1], r[0], n, err)
			}
		}
	}
	for _, maximum := range []uint32{4096, 8192, 0} {
		synctest.Test(t, func(t *testing.T) {
			d := newMem(size)
			d.Min, d.Preferred, d.MaxPayload = 4096, 4096, maximum
			check(t, connTo(t, connectTo(t, d), "a"), 1)
		})
	}
	for _, sizes := range []wire.BlockSizes{
		{Min: 3, Preferred: 3, MaxPayload: 3},
		{Min: 4096, Preferred: 1, MaxPayload: 1},
		{Min: 1, Preferred: 1 << 31, MaxPayload: 1<<32 - 1},
		{Min: 1 << 31, Preferred: 1 << 31, MaxPayload: 1 << 31},
	} {
		synctest.Test(t, func(t *testing.T) {
			info := wire.ExportInfo{Size: size, Flags: wire.FlagHasFlags, BlockSizes: sizes}
			check(t, connTo(t, against(t, func(s *script) {
				s.greet()
				s.option()
				s.send(goReply(wire.RepInfo, info.AppendInfo(nil, wire.InfoBlockSize)),
					goReply(wire.RepInfo, info.AppendInfo(nil, wire.InfoExport)), goReply(wire.RepAck, nil))
				for r := s.request(); r.Command == wire.CmdRead; r = s.request() {
					s.send(simpleReply(wire.Success, r.Cookie, patternOf(int64(r.Offset), int(r.Length))...))
				}
			}), "a"), 2)
		})
	}
}

func TestConnIsAReaderAt(t *testing.T) {
	const size = 3*512 + 67
	synctest.Test(t, func(t *testing.T) {
		conn := connTo(t, connectTo(t, newMem(size)), "a")
		if err := iotest.TestReader(io.NewSectionReader(conn, 0, size), patternOf(0, size)); err != nil {
			t.Error(err)
		}
		tests := []struct {
			off  int64
			n    int
			want int
			err  error
		}{
			{0, size, size, nil},
			{0, size + 1, size, io.EOF},
			{size - 1, 1, 1, nil},
			{size - 1, 2, 1, io.EOF},
			{size, 1, 0, io.EOF},
			{size, 0, 0, nil},
			{size + 1000, 1, 0, io.EOF},
			{1<<63 - 1, 10, 0, io.EOF},
		}
		for _, tt := range tests {
			p := make([]byte, tt.n)
			if n, err := conn.ReadAt(p, tt.off); n != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d, %v", tt.n, tt.off, n, err, tt.want, tt.err)
			} else if !bytes.Equal(p[:n], patternOf(tt.off, n)) {
				t.Errorf("ReadAt(%d bytes, %d): wrong data", tt.n, tt.off)
			}
		}
		if n, err := conn.ReadAt(make([]byte, 1), -1); n != 0 || err == nil || errors.Is(err, io.EOF) {
			t.Errorf("ReadAt(-1) = %d, %v", n, err)
		}
	})
}
