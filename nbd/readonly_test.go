package nbd_test

import (
	"context"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// TestReadOnly hides the ways to change a device, and nothing else of it.
func TestReadOnly(t *testing.T) {
	ram := nbdtest.NewRAM(make([]byte, 1<<20))
	ram.Text, ram.Min = "a text", 512
	for name, wrap := range map[string]func(nbd.Device) nbd.Device{"once": nbd.ReadOnly, "twice": func(d nbd.Device) nbd.Device { return nbd.ReadOnly(nbd.ReadOnly(d)) }} {
		t.Run(name, func(t *testing.T) {
			s := &nbd.Server{Exporter: &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
				"disk": func() (nbd.Device, error) { return wrap(ram.Again()), nil },
			}}}
			c, err := client.New(t.Context(), nbdtest.Serve(t, s)(), &client.Config{MetaContexts: []string{wire.BaseAllocation}})
			if err != nil {
				t.Fatal(err)
			}
			conn, err := c.Go(t.Context(), "disk")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			info := conn.Info()
			if info.Flags&wire.FlagReadOnly == 0 || info.Description != "a text" || info.BlockSizes.Min != 512 {
				t.Errorf("got flags %v, description %q, minimum block size %d", info.Flags, info.Description, info.BlockSizes.Min)
			}
			extents, err := conn.BlockStatus(context.Background(), wire.BaseAllocation, 0, 1<<20)
			if want := wire.StateHole | wire.StateZero; err != nil || len(extents) != 1 || extents[0].Status != want {
				t.Errorf("extents: got %v, %v, want one hole", extents, err)
			}
		})
	}
}
