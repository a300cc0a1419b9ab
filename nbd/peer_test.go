package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"xapi-nbd/nbd/wire"
)

// peer is the client's end of a connection to a testServer, with methods that send arbitrary
// bytes. They end the test if the server violates the protocol.
type peer struct {
	t     testing.TB
	nc    net.Conn
	ended chan struct{} // closed when ServeConn has returned
	err   error         // of ServeConn
}

// connect starts a connection.
func (s *testServer) connect() *peer {
	return s.connectBy(func(nc net.Conn) net.Conn { return nc })
}

// connectFrom starts a connection that comes from a host; "" is no host.
func (s *testServer) connectFrom(host string) *peer {
	if host == "" {
		return s.connect()
	}
	return s.connectBy(func(nc net.Conn) net.Conn {
		return &connFrom{nc, &net.TCPAddr{IP: net.ParseIP(host), Port: 1}}
	})
}

type connFrom struct {
	net.Conn
	remote net.Addr
}

func (c *connFrom) RemoteAddr() net.Addr { return c.remote }

// connectBy starts a connection whose server's end is wrapped.
func (s *testServer) connectBy(wrap func(net.Conn) net.Conn) *peer {
	near, far := net.Pipe()
	p := &peer{t: s.t, nc: near, ended: make(chan struct{})}
	s.t.Cleanup(func() { near.Close() })
	go func() {
		defer close(p.ended)
		p.err = s.ServeConn(context.Background(), wrap(far))
	}()
	return p
}

// negotiated is a connection in the transmission phase.
func (s *testServer) negotiated(name string) *peer {
	s.t.Helper()
	p := s.connect()
	p.greet(wire.FlagCFixedNewstyle | wire.FlagCNoZeroes)
	p.goTo(name)
	return p
}

func (p *peer) send(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatalf("cannot send to the server: %v", err)
	}
}

func (p *peer) receive(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatalf("cannot receive %d bytes from the server: %v", n, err)
	}
	return b
}

func (p *peer) greet(flags wire.ClientFlags) {
	p.t.Helper()
	b := p.receive(wire.GreetingLen)
	if _, err := wire.ParseGreeting((*[wire.GreetingLen]byte)(b)); err != nil {
		p.t.Fatal(err)
	}
	p.send(wire.AppendClientFlags(nil, flags))
}

func (p *peer) option(opt wire.Option, data []byte) {
	p.t.Helper()
	p.send(wire.AppendOption(nil, opt, data))
}

// reply receives one option reply, which must answer opt.
func (p *peer) reply(opt wire.Option) (wire.OptionReply, []byte) {
	p.t.Helper()
	hdr, err := wire.ParseOptionReplyHeader((*[wire.OptionReplyHeaderLen]byte)(p.receive(wire.OptionReplyHeaderLen)))
	if err != nil {
		p.t.Fatal(err)
	}
	if hdr.Option != opt {
		p.t.Fatalf("reply to %v, want to %v", hdr.Option, opt)
	}
	return hdr.Type, p.receive(int(hdr.Length))
}

// want receives one option reply of that type and returns its data.
func (p *peer) want(opt wire.Option, typ wire.OptionReply) string {
	p.t.Helper()
	got, data := p.reply(opt)
	if got != typ {
		p.t.Fatalf("reply to %v: got %v (%q), want %v", opt, got, data, typ)
	}
	return string(data)
}

func infoRequest(name string, infos ...wire.Info) []byte {
	return wire.InfoRequest{Name: name, Infos: infos}.Append(nil)
}

// info sends INFO or GO and receives the information up to the ACK.
func (p *peer) info(opt wire.Option, name string, infos ...wire.Info) wire.ExportInfo {
	p.t.Helper()
	p.option(opt, infoRequest(name, infos...))
	var info wire.ExportInfo
	for {
		typ, data := p.reply(opt)
		switch typ {
		case wire.RepAck:
			return info
		case wire.RepInfo:
			if _, err := info.ParseInfo(data); err != nil {
				p.t.Fatal(err)
			}
		default:
			p.t.Fatalf("reply to %v: got %v (%q), want information", opt, typ, data)
		}
	}
}

func (p *peer) goTo(name string, infos ...wire.Info) wire.ExportInfo {
	p.t.Helper()
	return p.info(wire.OptGo, name, infos...)
}

// refused sends an option with data and returns the text of the refusal.
func (p *peer) refused(opt wire.Option, data []byte, typ wire.OptionReply) string {
	p.t.Helper()
	p.option(opt, data)
	return p.want(opt, typ)
}

func readRequest(cookie uint64, off, n int) []byte {
	return wire.Request{Command: wire.CmdRead, Cookie: cookie, Offset: uint64(off), Length: uint64(n)}.Append(nil)
}

func (p *peer) read(cookie uint64, off, n int) {
	p.t.Helper()
	p.send(readRequest(cookie, off, n))
}

// answer receives the reply to a request with this cookie; after a success the
// n bytes at off must follow.
func (p *peer) answer(cookie uint64, off, n int) wire.Errno {
	p.t.Helper()
	got := p.anyReply()
	if got.Cookie != cookie {
		p.t.Fatalf("reply with cookie %#x, want %#x", got.Cookie, cookie)
	}
	if got.Errno == wire.Success && !bytes.Equal(p.receive(n), patternOf(int64(off), n)) {
		p.t.Fatalf("wrong data for %d bytes at %d", n, off)
	}
	return got.Errno
}

// anyReply receives the header of a simple reply.
func (p *peer) anyReply() wire.SimpleReply {
	p.t.Helper()
	r, err := wire.ParseSimpleReply((*[wire.SimpleReplyLen]byte)(p.receive(wire.SimpleReplyLen)))
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// reads reads n bytes at off and expects them.
func (p *peer) reads(off, n int) {
	p.t.Helper()
	cookie := uint64(off)<<32 | uint64(n)
	p.read(cookie, off, n)
	if errno := p.answer(cookie, off, n); errno != wire.Success {
		p.t.Fatalf("reading %d bytes at %d: %v", n, off, errno)
	}
}

func (p *peer) disc() {
	p.t.Helper()
	p.send(wire.Request{Command: wire.CmdDisc}.Append(nil))
}

// closed expects that the server closes without a further byte, and returns
// how ServeConn ended.
func (p *peer) closed() error {
	p.t.Helper()
	if n, err := p.nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		p.t.Fatalf("got %d bytes and error %v, want the end of the connection", n, err)
	}
	return p.end()
}

// end waits for the end of ServeConn and returns how it ended.
func (p *peer) end() error {
	<-p.ended
	return p.err
}

// open says whether ServeConn is still running; after synctest.Wait.
func (p *peer) open() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}
