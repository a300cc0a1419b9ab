package nbdproxy_test

import (
	"bytes"
	"errors"
	"slices"
	"syscall"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdproxy"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// dialTo returns a function that connects a client to a server of one device.
func dialTo(t *testing.T, open func() (nbd.Device, error)) func() *client.Conn {
	t.Helper()
	return dialServer(t, new(nbd.Server), open)
}

// dialServer is dialTo with the settings of s. The connections also ask for contexts.
func dialServer(t *testing.T, s *nbd.Server, open func() (nbd.Device, error), contexts ...string) func() *client.Conn {
	t.Helper()
	contexts = append(contexts, wire.BaseAllocation)
	s.Exporter = &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){"disk": open}}
	dial := nbdtest.Serve(t, s)
	return func() *client.Conn {
		t.Helper()
		c, err := client.New(t.Context(), dial(), &client.Config{MetaContexts: contexts})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := c.Go(t.Context(), "disk")
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
}

// proxyOf has another server serve the export that dial connects to, and returns a
// connection to that server.
func proxyOf(t *testing.T, dial func() *client.Conn) *client.Conn {
	t.Helper()
	conn := dialTo(t, func() (nbd.Device, error) { return nbdproxy.New(dial()), nil })()
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestProxy has a server serve a connection to another server: it offers what the other
// one does, and what is flushed or written with FUA is on stable storage there.
func TestProxy(t *testing.T) {
	ram := nbdtest.NewRAM(make([]byte, 1<<20))
	dial := dialTo(t, func() (nbd.Device, error) { return ram.Again(), nil })
	direct := dial()
	defer direct.Close()
	conn := proxyOf(t, dial)
	if got, want := conn.Info().Flags, direct.Info().Flags; got != want {
		t.Errorf("flags: got %v, want those of the other server, %v", got, want)
	}
	ctx := t.Context()
	data := bytes.Repeat([]byte{0xa5}, 4096)
	steps := []struct {
		name string
		do   func() error
		off  int
		want byte // at off on stable storage afterwards
	}{
		{"WRITE", func() error { return conn.Write(ctx, data, 0, false) }, 0, 0},
		{"FLUSH", func() error { return conn.Flush(ctx) }, 0, 0xa5},
		{"WRITE with FUA", func() error { return conn.Write(ctx, data, 8192, true) }, 8192, 0xa5},
		{"WRITE_ZEROES", func() error { return conn.WriteZeroes(ctx, 0, 4096, client.ZeroOptions{}) }, 0, 0xa5},
		{"WRITE_ZEROES with FUA", func() error { return conn.WriteZeroes(ctx, 8192, 4096, client.ZeroOptions{FUA: true, Fast: true}) }, 8192, 0},
		{"WRITE again", func() error { return conn.Write(ctx, data, 16384, true) }, 16384, 0xa5},
		{"TRIM with FUA", func() error { return conn.Trim(ctx, 16384, 4096, true) }, 16384, 0},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if got := ram.Stable()[s.off]; got != s.want {
			t.Errorf("%s: stable storage has %#x at %d, want %#x", s.name, got, s.off, s.want)
		}
	}
	extents, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, 1<<20)
	if err != nil || len(extents) == 1 && extents[0].Status == 0 {
		t.Errorf("extents: got %v, %v, want the holes of the other server", extents, err)
	}
}

// withContexts is a device with two contexts of its own. One of them fails at offset 0.
type withContexts struct{ *nbdtest.RAM }

func (withContexts) Contexts() []string { return []string{"x-test:age", "x-test:dirty"} }

func (withContexts) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	switch {
	case name == "x-test:dirty":
	case off == 0:
		return nil, wire.ENOMEM
	default:
		return []wire.Extent{{Length: uint64(n), Status: 7}}, nil
	}
	return []wire.Extent{{Length: 4096, Status: 1}, {Length: uint64(n) - 4096, Status: uint64(off)}}, nil
}

// TestProxyPassesContexts reads the metadata contexts of a server through two more servers.
// A context for which the connection between them did not ask is missing.
func TestProxyPassesContexts(t *testing.T) {
	ram := nbdtest.NewRAM(make([]byte, 64<<10))
	asked := []string{"x-test:age", "x-test:dirty", "x-test:other"}
	dial := dialServer(t, new(nbd.Server), func() (nbd.Device, error) { return withContexts{ram.Again()}, nil }, asked...)
	for range 2 {
		behind := dial
		dial = dialServer(t, new(nbd.Server), func() (nbd.Device, error) { return nbd.ReadOnly(nbdproxy.New(behind())), nil }, asked...)
	}
	conn := dial()
	defer conn.Close()
	if got, want := conn.MetaContexts(), []string{wire.BaseAllocation, "x-test:age", "x-test:dirty"}; !slices.Equal(got, want) {
		t.Fatalf("contexts: got %q, want %q", got, want)
	}
	got, err := conn.BlockStatus(t.Context(), "x-test:dirty", 512, 8192)
	if want := []wire.Extent{{Length: 4096, Status: 1}, {Length: 4096, Status: 512}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("extents: got %v, %v, want %v", got, err, want)
	}
	if got, err := conn.BlockStatus(t.Context(), "x-test:age", 512, 8192); err != nil || !slices.Equal(got, []wire.Extent{{Length: 8192, Status: 7}}) {
		t.Errorf("extents: got %v, %v, want one with status 7", got, err)
	}
	if _, err := conn.BlockStatus(t.Context(), "x-test:age", 0, 512); !errors.Is(err, wire.ENOMEM) {
		t.Errorf("got error %v, want NBD_ENOMEM of the first server", err)
	}
	if extents, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, 512, 4096); err != nil || extents[0].Status == 0 {
		t.Errorf("base:allocation: got %v, %v, want a hole", extents, err)
	}
	unasked := dialTo(t, func() (nbd.Device, error) {
		return nbdproxy.New(dialTo(t, func() (nbd.Device, error) { return withContexts{ram.Again()}, nil })()), nil
	})()
	defer unasked.Close()
	if got := unasked.MetaContexts(); !slices.Equal(got, []string{wire.BaseAllocation}) {
		t.Errorf("contexts: got %q, want base:allocation alone", got)
	}
}

// TestProxyWritesInPieces has the first server lack the memory for a whole request.
func TestProxyWritesInPieces(t *testing.T) {
	const size = 1 << 20
	ram := nbdtest.NewRAM(make([]byte, size))
	dialDisk := dialTo(t, func() (nbd.Device, error) { return ram.Again(), nil })
	open := func() (nbd.Device, error) { return nbdproxy.New(dialDisk()), nil }
	conn := dialServer(t, &nbd.Server{Limits: nbd.Limits{MaxInflightBytes: 1}}, open)()
	defer conn.Close()
	data := nbdtest.Bytes(size, 0, 1)
	if err := conn.Write(t.Context(), data, 0, true); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ram.Stable(), data) {
		t.Error("a WRITE with FUA has been answered and is not on stable storage")
	}
}

// TestProxyPassesErrors: the error of the other server is the error that clients see.
func TestProxyPassesErrors(t *testing.T) {
	dial := dialTo(t, func() (nbd.Device, error) {
		d := nbdtest.NewFaulty(nbdtest.NewMem(4096, 1))
		d.Fail(0, 512, syscall.ENOMEM)
		return d, nil
	})
	if err := proxyOf(t, dial).Read(t.Context(), make([]byte, 512), 0); !errors.Is(err, wire.ENOMEM) {
		t.Errorf("got error %v, want NBD_ENOMEM", err)
	}
}

func TestProxyConforms(t *testing.T) {
	ram := nbdtest.NewRAM(nbdtest.Bytes(300_000, 0, 1))
	dial := dialTo(t, func() (nbd.Device, error) { return ram.Again(), nil })
	through := dialTo(t, func() (nbd.Device, error) { return nbdproxy.New(dial()), nil })
	nbdtest.TestDevice(t, func() nbd.Device { return nbdproxy.New(through()) })
}

// TestProxyPromisesNoMore has other servers that offer less.
func TestProxyPromisesNoMore(t *testing.T) {
	type writer struct { // no capability but this
		nbd.Device
		writeOnly
	}
	ram := nbdtest.NewRAM(make([]byte, 64<<10))
	tests := map[string]func() (nbd.Device, error){
		"read-only": func() (nbd.Device, error) { return nbd.ReadOnly(ram.Again()), nil },
		"no flush":  func() (nbd.Device, error) { d := ram.Again(); return writer{nbd.ReadOnly(d), writeOnly{d}}, nil },
	}
	for name, open := range tests {
		t.Run(name, func(t *testing.T) {
			dial := dialTo(t, open)
			direct := dial()
			defer direct.Close()
			conn := proxyOf(t, dial)
			const promises = wire.FlagReadOnly | wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendTrim | wire.FlagSendFastZero | wire.FlagCanMultiConn
			if got, want := conn.Info().Flags&promises, direct.Info().Flags&promises; got != want {
				t.Errorf("flags: got %v, want %v", got, want)
			}
		})
	}
}

type writeOnly struct{ ram *nbdtest.RAM }

func (w writeOnly) WriteAt(p []byte, off int64) (int, error) { return w.ram.WriteAt(p, off) }
