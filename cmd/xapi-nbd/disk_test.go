package main

import (
	"path/filepath"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
	"xapi-nbd/vdi"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// TestAttachedVDIConforms runs the conformance suite of devices on an attached VDI.
func TestAttachedVDIConforms(t *testing.T) {
	tests := []struct {
		name   string
		loop   bool
		sector int
		style  xapitest.DeviceStyle
	}{
		{"file", false, 0, xapitest.StyleXVD},
		{"loop device, 512", true, 512, xapitest.StyleNBD},
		{"loop device, 4096", true, 4096, xapitest.StyleSM},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.loop {
				requires.LoopDevices(t)
			}
			w := newWorld(t, xapitest.Config{Loop: tt.loop, Style: tt.style})
			uuid := w.addVDI(random(9, 1<<20), xapitest.VDISpec{SectorSize: tt.sector})
			client := xapi.New(xapi.Config{Socket: w.host.Socket()})
			defer client.Close()
			manager, err := vdi.Open(vdi.Config{
				Client: client, StateDir: filepath.Join(w.dir, "state"), DeviceDir: w.host.DeviceDir(),
				Inventory: w.host.Inventory(), Roots: blockdev.Roots{Sys: w.host.SysDir(), NBD: w.host.NBDDir()},
			})
			if err != nil {
				t.Fatal(err)
			}
			session := client.Bind(xapi.SessionRef(w.session(xapitest.RoleVMAdmin)))
			nbdtest.TestDevice(t, func() nbd.Device {
				d, err := manager.Attach(t.Context(), session, uuid)
				if err != nil {
					t.Fatal(err)
				}
				return d
			})
			if err := manager.Close(t.Context()); err != nil {
				t.Error(err)
			}
			w.waitClean(nil)
		})
	}
}
