package client_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// After the refusal of an unknown name the Client can be used further.
func TestLiveNames(t *testing.T) {
	path, _ := sparseFile(t)
	ctx, c := dialLive(t, qemuNBD(t, "--read-only", "--export-name=disk", "--description=a test", path), nil)
	list, err := c.List(ctx)
	if err != nil || len(list) != 1 || list[0] != (client.Export{Name: "disk", Description: "a test"}) {
		t.Errorf("list %q, error %v", list, err)
	}
	var refused *client.Error
	if _, err := c.Go(ctx, "other"); !errors.As(err, &refused) || refused.Reply != wire.RepErrUnknown {
		t.Errorf("got error %v, want NBD_REP_ERR_UNKNOWN", err)
	}
	conn, err := c.Go(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Write(ctx, make([]byte, 512), 0, false); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("write to a read-only export: got error %v", err)
	}
}

func TestLiveErrors(t *testing.T) {
	for how, cfg := range map[string]*client.Config{"structured": nil, "simple": {NoStructured: true}} {
		t.Run(how, func(t *testing.T) {
			ctx, conn := goLive(t, nbdkit(t, "--filter=error", "memory", "1M", "error-pread=ENOMEM", "error-pread-rate=1"), "", cfg)
			for range 3 {
				if err := conn.Read(ctx, make([]byte, 4096), 0); !errors.Is(err, wire.ENOMEM) {
					t.Errorf("got error %v, want NBD_ENOMEM", err)
				}
				if err := conn.Write(ctx, make([]byte, 4096), 0, false); err != nil {
					t.Errorf("Write: %v", err)
				}
			}
		})
	}
}

// After a read whose context was done, the connection can be used further.
func TestLiveEndedContext(t *testing.T) {
	ctx, conn := goLive(t, nbdkit(t, "--filter=delay", "memory", "1M", "rdelay=3"), "", nil)
	soon, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := conn.Read(soon, make([]byte, 4096), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v, want that of the context", err)
	}
	p := bytes.Repeat([]byte{1}, 4096)
	if err := conn.Read(ctx, p, 0); err != nil || !bytes.Equal(p, make([]byte, 4096)) {
		t.Errorf("the next read: error %v or wrong data", err)
	}
}

// nbdkit can offer less than it implements: the client works with that, or fails.
func TestLiveOldServers(t *testing.T) {
	t.Run("oldstyle", func(t *testing.T) {
		socket := nbdkit(t, "--oldstyle", "memory", "1M")
		if _, err := client.Dial(t.Context(), "unix", socket, nil); err == nil || !strings.Contains(err.Error(), "newstyle") {
			t.Errorf("got error %v, want a refusal", err)
		}
	})
	t.Run("no structured replies", func(t *testing.T) {
		ctx, conn := goLive(t, nbdkit(t, "--no-sr", "memory", "1M"), "", withAllocation)
		if err := conn.Read(ctx, make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		if _, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, 4096); !errors.Is(err, client.ErrUnsupported) {
			t.Errorf("got error %v, want ErrUnsupported", err)
		}
	})
	for how, args := range map[string][]string{"mask": {"--mask-handshake=0"}, "no zeroes": {"--mask-handshake=2"}} {
		t.Run("not fixed newstyle, "+how, func(t *testing.T) {
			ctx, conn := goLive(t, nbdkit(t, append(args, "memory", "1M")...), "", nil)
			if err := conn.Read(ctx, make([]byte, 4096), 0); err != nil || conn.Size() != 1<<20 {
				t.Errorf("error %v, size %d", err, conn.Size())
			}
		})
	}
}
