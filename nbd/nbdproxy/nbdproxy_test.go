package nbdproxy_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

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

// TestProxy has a server serve a connection to another server: it offers the same commands,
// and data that is flushed or written with FUA is on stable storage there.
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

// TestProxyEndsWithItsConnection: the connections of clients end with the one to the other server,
// also those that send nothing.
func TestProxyEndsWithItsConnection(t *testing.T) {
	ram := nbdtest.NewRAM(make([]byte, 4096))
	other := new(nbd.Server)
	conn := proxyOf(t, dialServer(t, other, func() (nbd.Device, error) { return ram.Again(), nil }))
	if err := conn.Read(t.Context(), make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	now, cancel := context.WithCancel(t.Context())
	cancel()
	_ = other.Shutdown(now) // ends all connections at once
	select {
	case <-conn.Done():
	case <-time.After(time.Minute):
		t.Error("the client's connection goes on")
	}
}
