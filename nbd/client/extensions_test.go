package client_test

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
)

// runExtensions is runClient for a client that asks for every extension: it reads 16 bytes,
// whose last 4 are zeroes, and the status of the whole export if the server granted a
// metadata context.
func runExtensions(t *testing.T, nc net.Conn) (stage string, err error) {
	c, err := client.New(t.Context(), nc, withAllocation)
	if err != nil {
		nc.Close()
		return "greeting", err
	}
	conn, err := c.Go(t.Context(), "disk")
	if err != nil {
		return "go", err
	}
	defer conn.Close()
	p := []byte(strings.Repeat("x", 16))
	if err := conn.Read(t.Context(), p, 16); err != nil {
		<-conn.Done() // the client leaves by itself
		return "read", err
	}
	if got, want := string(p), "row 00000000\x00\x00\x00\x00"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(conn.MetaContexts()) == 0 {
		return "", nil
	}
	extents, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, 0, conn.Size())
	if err != nil {
		return "status", err
	}
	want := []wire.Extent{{Length: 4096}, {Length: 61440, Status: wire.StateHole | wire.StateZero}}
	if diff := cmp.Diff(want, extents); diff != "" {
		t.Errorf("extents (-want +got):\n%s", diff)
	}
	return "", nil
}
