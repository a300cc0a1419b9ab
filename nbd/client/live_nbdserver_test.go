package client_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// dialNBDServer runs nbd-server in the foreground, where it serves one
// connection and ends, and returns that connection.
func dialNBDServer(t *testing.T, cfg *client.Config, path string) (context.Context, *client.Client) {
	t.Helper()
	dir := socketDir(t)
	socket, conf := filepath.Join(dir, "socket"), filepath.Join(dir, "conf")
	text := fmt.Sprintf("[generic]\nunixsock = %s\nallowlist = true\n"+
		"[disk]\nexportname = %[2]s\nflush = true\nfua = true\ntrim = true\n"+
		"[still]\nexportname = %[2]s\nreadonly = true\n", socket, path)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ended := runServer(t, "nbd-server", "-C", conf, "-d")
	ctx, cancel := context.WithTimeout(t.Context(), livePatience)
	t.Cleanup(cancel)
	nc := awaitConn(t, ctx, socket, ended)
	t.Cleanup(func() { nc.Close() })
	c, err := client.New(ctx, nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort() })
	return ctx, c
}

// The reference server supports neither structured replies nor metadata contexts.
func TestLiveNBDServer(t *testing.T) {
	path, content := sparseFile(t)
	ctx, c := dialNBDServer(t, withAllocation, path)
	if c.Structured() {
		t.Error("structured replies were agreed on")
	}
	list, err := c.List(ctx)
	if names := fmt.Sprint(list); err != nil || len(list) != 2 || !strings.Contains(names, "disk") || !strings.Contains(names, "still") {
		t.Errorf("list %v, error %v", list, err)
	}
	conn, err := c.Go(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	readEverything(t, ctx, conn, content)
	if _, err := conn.BlockStatus(ctx, wire.BaseAllocation, 0, 4096); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("block status: got error %v, want ErrUnsupported", err)
	}
	writeAndRead(t, ctx, conn, path, content, true)
}

func TestLiveNBDServerReadOnly(t *testing.T) {
	path, content := sparseFile(t)
	ctx, c := dialNBDServer(t, nil, path)
	conn, err := c.Go(ctx, "still")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	readEverything(t, ctx, conn, content)
	if err := conn.Write(ctx, make([]byte, 512), 0, false); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("write to a read-only export: got error %v", err)
	}
}

// An unknown name is refused.
func TestLiveNBDServerNames(t *testing.T) {
	path, _ := sparseFile(t)
	ctx, c := dialNBDServer(t, nil, path)
	var refused *client.Error
	if _, err := c.Go(ctx, "other"); !errors.As(err, &refused) || refused.Reply != wire.RepErrUnknown {
		t.Errorf("got error %v, want NBD_REP_ERR_UNKNOWN", err)
	}
}
