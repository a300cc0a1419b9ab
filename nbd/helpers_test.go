package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
)

// Nearly every test runs in a bubble of testing/synctest over net.Pipe: a
// deadlock is reported at once, timeouts cost nothing, and synctest.Wait
// returns when the server can do nothing more without the test.

// tile is the content of every fakeDevice, repeated. Its length is a prime number, so that
// all blocks of a small disk differ.
var tile = func() (t [65521]byte) {
	for i := range t {
		t[i] = byte(i ^ i>>8*31)
	}
	return t
}()

// pattern fills p with the bytes that every fakeDevice has at off.
func pattern(p []byte, off int64) {
	for n := 0; n < len(p); {
		n += copy(p[n:], tile[(off+int64(n))%int64(len(tile)):])
	}
}

func patternOf(off int64, n int) []byte {
	p := make([]byte, n)
	pattern(p, off)
	return p
}

// meter counts the reads of one or more devices that are running.
type meter struct {
	mu                        sync.Mutex
	reads, reading, maxReads  int
	bytes, maxBytes, finished int64
}

func (m *meter) begin(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	m.reading++
	m.maxReads = max(m.maxReads, m.reading)
	m.bytes += int64(n)
	m.maxBytes = max(m.maxBytes, m.bytes)
}

func (m *meter) end(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading--
	m.bytes -= int64(n)
	m.finished += int64(n)
}

func (m *meter) now() (reading int, bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reading, m.bytes
}

// fakeDevice holds the caller to the contract of Device: no read outside the
// export, none after Close, Close once and after the last read.
type fakeDevice struct {
	size   int64
	onRead func(p []byte, off int64) (int, error) // nil: the pattern
	meter  *meter

	mu       sync.Mutex
	reading  int
	closed   int
	breaches []string
}

func newDevice(size int64) *fakeDevice { return &fakeDevice{size: size, meter: new(meter)} }

func (d *fakeDevice) Size() int64 { return d.size }

// breach is called with mu held.
func (d *fakeDevice) breach(format string, args ...any) {
	d.breaches = append(d.breaches, fmt.Sprintf(format, args...))
}

func (d *fakeDevice) ReadAt(p []byte, off int64) (int, error) {
	d.count(+1, p, off)
	defer d.count(-1, p, off)
	d.meter.begin(len(p))
	defer d.meter.end(len(p))
	if d.onRead != nil {
		return d.onRead(p, off)
	}
	pattern(p, off)
	return len(p), nil
}

func (d *fakeDevice) count(delta int, p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reading += delta
	if d.closed > 0 {
		d.breach("read of %d bytes at %d while closed", len(p), off)
	}
	if off < 0 || off+int64(len(p)) > d.size {
		d.breach("read of %d bytes at %d of %d", len(p), off, d.size)
	}
}

func (d *fakeDevice) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed++
	if d.closed > 1 {
		d.breach("closed %d times", d.closed)
	}
	if d.reading > 0 {
		d.breach("closed with %d reads under way", d.reading)
	}
	return nil
}

// closes says how often the device was closed up to now.
func (d *fakeDevice) closes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// hold keeps reads back until they are released: one by one or all for good.
type hold struct {
	one  chan struct{}
	all  chan struct{}
	once sync.Once
}

// newHold is released at the end of the test at the latest, so that a failed
// test ends.
func newHold(t testing.TB) *hold {
	h := &hold{one: make(chan struct{}), all: make(chan struct{})}
	t.Cleanup(h.release)
	return h
}

func (h *hold) release() { h.once.Do(func() { close(h.all) }) }

// read is an onRead that waits for a release.
func (h *hold) read(p []byte, off int64) (int, error) {
	select {
	case <-h.one:
	case <-h.all:
	}
	pattern(p, off)
	return len(p), nil
}

// fakeExporter opens a device for every name, or calls open, and records the calls.
type fakeExporter struct {
	open func(ctx context.Context, peer Peer, name string) (Device, error) // nil: a device of 1 MiB

	mu      sync.Mutex
	names   []string
	peers   []Peer
	devices []*fakeDevice
}

func (e *fakeExporter) Open(ctx context.Context, peer Peer, name string) (Device, error) {
	e.mu.Lock()
	e.names = append(e.names, name)
	e.peers = append(e.peers, peer)
	e.mu.Unlock()
	var d Device = newDevice(1 << 20)
	if e.open != nil {
		var err error
		if d, err = e.open(ctx, peer, name); err != nil {
			return nil, err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch d := d.(type) {
	case *fakeDevice:
		e.devices = append(e.devices, d)
	case *sizedDevice:
		e.devices = append(e.devices, d.fakeDevice)
	case *endingDevice:
		e.devices = append(e.devices, d.fakeDevice)
	}
	return d, nil
}

// opened are the names that were asked for, in order.
func (e *fakeExporter) opened() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.names)
}

// device is the nth device that was opened.
func (e *fakeExporter) device(n int) *fakeDevice {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.devices[n]
}

func (e *fakeExporter) check(t testing.TB) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, d := range e.devices {
		if d.closes() != 1 {
			t.Errorf("device %d was closed %d times, want once", i, d.closes())
		}
		for _, b := range d.breaches {
			t.Errorf("device %d: %s", i, b)
		}
	}
}

// logBuffer has the log of a server.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// testServer is a Server over in-memory connections. Its fields may be set
// until the first connection. When the test ends it is shut down, and every
// device that it opened must have been closed once and after its last read.
type testServer struct {
	Server
	t       testing.TB
	exports *fakeExporter
	log     *logBuffer
}

func newTestServer(t testing.TB) *testServer {
	s := &testServer{t: t, exports: new(fakeExporter), log: new(logBuffer)}
	s.Exporter = s.exports
	s.Logger = slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("connections are left at the end of the test: %v", err)
		}
		s.exports.check(t)
	})
	return s
}

// serve makes every export this device; for tests with one connection.
func (s *testServer) serve(d Device) {
	s.exports.open = func(context.Context, Peer, string) (Device, error) { return d, nil }
}

// peer is the other end of a connection to a testServer, one that sends
// whatever the test wants. Its methods end the test when the server does not
// answer as the protocol says.
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
