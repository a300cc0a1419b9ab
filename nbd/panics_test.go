package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// panicking is a device of which one method panics.
type panicking struct {
	*nbdtest.RAM
	method string
	file   *os.File
	closed *int
}

func (d panicking) may(method string) {
	if d.method == method {
		panic("in " + method)
	}
}

func (d panicking) ReadAt(p []byte, off int64) (int, error) {
	d.may("ReadAt")
	return d.RAM.ReadAt(p, off)
}

func (d panicking) WriteAt(p []byte, off int64) (int, error) {
	d.may("WriteAt")
	return d.RAM.WriteAt(p, off)
}

func (d panicking) Flush() error { d.may("Flush"); return d.RAM.Flush() }

func (d panicking) Trim(off, n int64) error { d.may("Trim"); return d.RAM.Trim(off, n) }

func (d panicking) WriteZeroes(off, n int64, noHole, fast bool) error {
	d.may("WriteZeroes")
	return d.RAM.WriteZeroes(off, n, noHole, fast)
}

func (d panicking) Cache(off, n int64) error { d.may("Cache"); return d.RAM.Cache(off, n) }

func (d panicking) Extents(off, n int64) ([]wire.Extent, error) {
	d.may("Extents")
	return d.RAM.Extents(off, n)
}

func (d panicking) File() *os.File { d.may("File"); return d.file }

func (d panicking) Verify(off, n int64) error { d.may("Verify"); return nil }

func (d panicking) Size() int64 { d.may("Size"); return d.RAM.Size() }

func (d panicking) BlockSizes() (uint32, uint32, uint32) { d.may("BlockSizes"); return 1, 4096, 0 }

func (d panicking) Description() string { d.may("Description"); return "" }

func (d panicking) CanonicalName() string { d.may("CanonicalName"); return "x" }

func (d panicking) MultiConn() bool { d.may("MultiConn"); return true }

func (d panicking) Capabilities() wire.TransmissionFlags {
	d.may("Capabilities")
	return ^wire.FlagReadOnly
}

func (d panicking) Paces() bool { d.may("Paces"); return true }

func (d panicking) Pace(context.Context, int64) { d.may("Pace") }

func (d panicking) Lifetime() context.Context { d.may("Lifetime"); return nil }

func (d panicking) CloseWithError(error) error {
	*d.closed++
	d.may("CloseWithError")
	return nil
}

func (d panicking) Close() error {
	*d.closed++
	d.may("Close")
	return nil
}

// panicRows has the effect on a client of a panic in each method: the export is refused, a
// request fails, or, if it is too late for both, nothing.
var panicRows = []struct {
	method string
	do     func(context.Context, *client.Conn) error // nil: the export is refused
	ends   bool                                      // the connection cannot go on
}{
	{method: "Size"}, {method: "BlockSizes"}, {method: "Description"}, {method: "CanonicalName"},
	{method: "MultiConn"}, {method: "Capabilities"}, {method: "File"},
	{"Lifetime", func(_ context.Context, c *client.Conn) error { <-c.Done(); return c.Err() }, true},
	{"ReadAt", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 512), 0) }, false},
	{"Verify", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 512), 0) }, false},
	{"Verify", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 512<<10), 0) }, false},
	{"Pace", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 512), 0) }, false},
	{"Paces", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 512<<10), 0) }, false},
	{"WriteAt", func(ctx context.Context, c *client.Conn) error { return c.Write(ctx, make([]byte, 512), 0, false) }, false},
	{"Flush", func(ctx context.Context, c *client.Conn) error { return c.Flush(ctx) }, false},
	{"Flush", func(ctx context.Context, c *client.Conn) error { return c.Write(ctx, make([]byte, 512), 0, true) }, false},
	{"Trim", func(ctx context.Context, c *client.Conn) error { return c.Trim(ctx, 0, 512, false) }, false},
	{"WriteZeroes", func(ctx context.Context, c *client.Conn) error {
		return c.WriteZeroes(ctx, 0, 512, client.ZeroOptions{})
	}, false},
	{"Cache", func(ctx context.Context, c *client.Conn) error { return c.Cache(ctx, 0, 512) }, false},
	{"Extents", func(ctx context.Context, c *client.Conn) error {
		_, err := c.BlockStatus(ctx, wire.BaseAllocation, 0, 512)
		return err
	}, false},
	{"Extents", func(ctx context.Context, c *client.Conn) error { return c.Read(ctx, make([]byte, 128<<10), 0) }, false},
	{"CloseWithError", func(context.Context, *client.Conn) error { return wire.EIO }, true},
	{"Close", func(context.Context, *client.Conn) error { return wire.EIO }, true},
}

// TestPanics has every method of a device panic: a request or a connection fails, the log
// says where, the device is closed once, and the next client is served.
func TestPanics(t *testing.T) {
	for _, row := range panicRows {
		t.Run(row.method, func(t *testing.T) {
			file, err := os.Create(t.TempDir() + "/image")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if err := file.Truncate(1 << 20); err != nil {
				t.Fatal(err)
			}
			var opened, closed int
			exporter := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
				"bad": func() (nbd.Device, error) {
					opened++
					d := panicking{RAM: nbdtest.NewRAM(nbdtest.Bytes(1<<20, 0, 1)), method: row.method, closed: &closed}
					if row.method == "Verify" || row.method == "File" {
						d.file = file
					}
					if row.method == "Close" { // which a server does not call if there is a CloseWithError
						return struct{ nbd.Device }{d}, nil
					}
					return d, nil
				},
				"good": func() (nbd.Device, error) { return nbdtest.NewMem(1<<20, 1), nil },
			}}
			log := servePanics(t, exporter, func(t *testing.T, dial func() *client.Client) {
				conn, err := dial().Go(t.Context(), "bad")
				if row.do == nil {
					if err == nil || strings.Contains(err.Error(), row.method) {
						t.Errorf("got %v, want a refusal without details", err)
					}
				} else if err != nil {
					t.Fatal(err)
				} else {
					if err := row.do(t.Context(), conn); err == nil || !row.ends && !errors.Is(err, wire.EIO) {
						t.Errorf("got %v, want NBD_EIO", err)
					}
					if err := conn.Cache(t.Context(), 0, 0); !row.ends && err != nil {
						t.Errorf("the connection does not go on: %v", err)
					}
					conn.Close()
				}
				good, err := dial().Go(t.Context(), "good")
				if err != nil {
					t.Fatalf("the next client: %v", err)
				}
				good.Close()
			})
			if !strings.Contains(log, "panic: in "+row.method) || !strings.Contains(log, "panics_test.go") {
				t.Errorf("the log does not say where the panic was:\n%s", log)
			}
			if closed != opened || opened == 0 {
				t.Errorf("the device was opened %d times and closed %d times", opened, closed)
			}
		})
	}
}

// servePanics runs a server for one test, and returns its log.
func servePanics(t *testing.T, exporter nbd.Exporter, test func(t *testing.T, dial func() *client.Client)) string {
	t.Helper()
	var log bytes.Buffer
	handler := slog.NewTextHandler(&log, nil) // writes one line at a time
	t.Run("serving", func(t *testing.T) {
		dial := nbdtest.Serve(t, &nbd.Server{Exporter: exporter, Logger: slog.New(handler)})
		test(t, func() *client.Client {
			c, err := client.New(t.Context(), dial(), &client.Config{MetaContexts: []string{wire.BaseAllocation}})
			if err != nil {
				t.Fatal(err)
			}
			return c
		})
	})
	return log.String()
}

// exporterFunc is an Exporter whose Open is a function.
type exporterFunc func() (nbd.Device, error)

func (f exporterFunc) Open(context.Context, nbd.Peer, string) (nbd.Device, error) { return f() }

// List implements nbd.Lister.
func (f exporterFunc) List(context.Context, nbd.Peer) ([]nbd.Export, error) { panic("in List") }

// negative is a device with an impossible size.
type negative struct{ *nbdtest.Mem }

func (negative) Size() int64 { return -1 }

// TestFaultyExporters are refusals, and do not end the process.
func TestFaultyExporters(t *testing.T) {
	tests := map[string]struct {
		exporter nbd.Exporter
		log      string
	}{
		"nil":            {nil, "the server has no Exporter"},
		"nothing":        {exporterFunc(func() (nbd.Device, error) { return nil, nil }), "neither a device nor an error"},
		"panic":          {exporterFunc(func() (nbd.Device, error) { panic("in Open") }), "panic: in Open"},
		"panic of error": {exporterFunc(func() (nbd.Device, error) { panic(nbd.Refuse(nbd.ErrPolicy, "in Open", nil)) }), "panic: in Open"},
		"nil device":     {exporterFunc(func() (nbd.Device, error) { return (*nbdtest.RAM)(nil), nil }), "panic: runtime error"},
		"negative size":  {exporterFunc(func() (nbd.Device, error) { return negative{nbdtest.NewMem(512, 1)}, nil }), "size of -1 bytes"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			log := servePanics(t, tt.exporter, func(t *testing.T, dial func() *client.Client) {
				for range 2 {
					if _, err := dial().Go(t.Context(), "disk"); err == nil || !strings.Contains(err.Error(), "cannot be opened") {
						t.Errorf("got %v, want a refusal", err)
					}
				}
				if _, ok := tt.exporter.(nbd.Lister); ok {
					if _, err := dial().List(t.Context()); err == nil || strings.Contains(err.Error(), "in List") {
						t.Errorf("List: got %v, want a refusal", err)
					}
				}
			})
			if !strings.Contains(log, tt.log) {
				t.Errorf("the log lacks %q:\n%s", tt.log, log)
			}
		})
	}
}
