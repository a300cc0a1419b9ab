package client_test

import (
	"bytes"
	"os"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

func TestLiveReading(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			socket := serve(t, path)
			for how, cfg := range map[string]*client.Config{"all": withAllocation, "simple": {NoStructured: true}, "nothing asked": nil} {
				t.Run(how, func(t *testing.T) {
					ctx, conn := goLive(t, socket, "", cfg)
					if conn.Size() != int64(len(content)) {
						t.Fatalf("size %d, want %d", conn.Size(), len(content))
					}
					var wg sync.WaitGroup
					for i := range 16 {
						wg.Go(func() {
							off := i * 150_001
							p := bytes.Repeat([]byte{1}, 200_000)
							if err := conn.Read(ctx, p, int64(off)); err != nil || !bytes.Equal(p, content[off:off+len(p)]) {
								t.Errorf("read at %d: error %v or wrong data", off, err)
							}
						})
					}
					wg.Wait()
					nbdtest.TestDevice(t, func() nbd.Device {
						_, conn := goLive(t, socket, "", cfg)
						return conn
					})
				})
			}
		})
	}
}

func TestLiveStatus(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			socket := serve(t, path)
			ctx, c := dialLive(t, socket, withAllocation)
			if !c.Structured() {
				t.Error("structured replies were not agreed on")
			}
			if got, err := c.ListMetaContexts(ctx, ""); err != nil || !strings.Contains(strings.Join(got, " "), wire.BaseAllocation) {
				t.Errorf("contexts %q, error %v", got, err)
			}
			info, err := c.Info(ctx, "")
			if err != nil || info.Size != uint64(len(content)) || info.Flags&wire.FlagHasFlags == 0 {
				t.Errorf("information %+v, error %v", info, err)
			}
			conn, err := c.Go(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			holes := int64(0)
			for off := int64(0); off < conn.Size(); {
				extents, err := conn.BlockStatus(ctx, wire.BaseAllocation, off, conn.Size()-off)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range extents {
					part := content[off : off+int64(e.Length)]
					if e.Status&wire.StateZero != 0 && !bytes.Equal(part, make([]byte, len(part))) {
						t.Errorf("%d bytes at %d are said to be zeroes", e.Length, off)
					}
					if e.Status&wire.StateHole != 0 {
						holes += int64(e.Length)
					}
					off += int64(e.Length)
				}
			}
			if holes != 0 && holes != 1<<20 { // a file system without holes has none
				t.Errorf("%d bytes of holes, want 1 MiB", holes)
			}
		})
	}
}

func TestLiveWriting(t *testing.T) {
	for name, serve := range liveServers {
		t.Run(name, func(t *testing.T) {
			path, content := sparseFile(t)
			ctx, conn := goLive(t, serve(t, path), "", nil)
			data := nbdtest.Bytes(300_000, 0, 9)
			copy(content[100_000:], data)
			clear(content[200_000:250_000])
			steps := []struct {
				name string
				err  error
			}{
				{"Write", conn.Write(ctx, data, 100_000, false)},
				{"WriteZeroes", conn.WriteZeroes(ctx, 200_000, 50_000, client.ZeroOptions{NoHole: true})},
				{"Trim", conn.Trim(ctx, 1<<20, 65536, false)}, // a hole already
				{"Flush", conn.Flush(ctx)},
			}
			if conn.Info().Flags&wire.FlagSendCache != 0 {
				if err := conn.Cache(ctx, 1, 100_000); err != nil {
					t.Errorf("Cache: %v", err)
				}
			}
			for _, s := range steps {
				if s.err != nil {
					t.Errorf("%s: %v", s.name, s.err)
				}
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("error %v or wrong content of the file", err)
			}
		})
	}
}
