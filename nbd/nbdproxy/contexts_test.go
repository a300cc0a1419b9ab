package nbdproxy_test

import (
	"errors"
	"slices"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdproxy"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

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
