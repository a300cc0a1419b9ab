package nbd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"
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
