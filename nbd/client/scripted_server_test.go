package client

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"testing"

	"xapi-nbd/nbd/wire"
)

// script is a server that sends the bytes of a test.
type script struct{ nc net.Conn }

// against runs a script in a goroutine and returns the client's end of its connection. The
// script's end is closed when run returns, or when the client has closed its end.
func against(t testing.TB, run func(s *script)) net.Conn {
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close() })
	go func() {
		defer far.Close()
		run(&script{far})
	}()
	return near
}

func (s *script) send(b ...[]byte) {
	if _, err := s.nc.Write(bytes.Join(b, nil)); err != nil {
		runtime.Goexit()
	}
}

func (s *script) receive(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(s.nc, b); err != nil {
		runtime.Goexit()
	}
	return b
}

// option receives one option with its data.
func (s *script) option() wire.Option {
	hdr, err := wire.ParseOptionHeader((*[wire.OptionHeaderLen]byte)(s.receive(wire.OptionHeaderLen)))
	if err != nil {
		runtime.Goexit()
	}
	s.receive(int(hdr.Length))
	return hdr.Option
}

func (s *script) request() wire.Request {
	r, err := wire.ParseRequest((*[wire.RequestLen]byte)(s.receive(wire.RequestLen)))
	if err != nil {
		runtime.Goexit()
	}
	return r
}

func (s *script) greet() wire.ClientFlags {
	s.send(wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes))
	return wire.ParseClientFlags((*[4]byte)(s.receive(4)))
}

// transmission negotiates an export of 1 MiB.
func (s *script) transmission() {
	s.greet()
	s.option()
	s.send(goReply(wire.RepInfo, exportInfoData(wire.FlagHasFlags)), goReply(wire.RepAck, nil))
}

// discard reads until the client closes the connection.
func (s *script) discard() { io.Copy(io.Discard, s.nc) }

func goReply(typ wire.OptionReply, data []byte) []byte {
	return wire.AppendOptionReply(nil, wire.OptGo, typ, data)
}

func exportInfoData(flags wire.TransmissionFlags) []byte {
	info := wire.ExportInfo{Size: 1 << 20, Flags: flags}
	return info.AppendInfo(nil, wire.InfoExport)
}

func simpleReply(errno wire.Errno, cookie uint64, data ...byte) []byte {
	var b [wire.SimpleReplyLen]byte
	wire.PutSimpleReply(&b, errno, cookie)
	return append(b[:], data...)
}

// connTo negotiates simple replies with a script or a server.
func connTo(t testing.TB, nc net.Conn, name string) *Conn {
	t.Helper()
	return connWith(t, nc, name, &Config{NoStructured: true})
}

func connWith(t testing.TB, nc net.Conn, name string, cfg *Config) *Conn {
	t.Helper()
	c, err := New(t.Context(), nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
