package xapitest_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// A simulated host in a test of one's own: log in over its socket, and plug a disk.
func Example() {
	dir, err := os.MkdirTemp("", "host") // the path of a socket is short, that of t.TempDir is not
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	host, err := xapitest.Start(xapitest.Config{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	defer host.Close()
	disk, err := host.AddVDI(xapitest.VDISpec{Size: 4 << 20, NameLabel: "a disk"})
	if err != nil {
		log.Fatal(err)
	}

	client := xapi.New(xapi.Config{Socket: host.Socket()})
	defer client.Close()
	ctx := context.Background()
	s := client.Bind(xapi.SessionRef(host.NewSession(xapitest.RoleVMAdmin)))
	vdi, err := s.VDIByUUID(ctx, disk)
	if err != nil {
		log.Fatal(err)
	}
	dom0, err := s.VMByUUID(ctx, host.ControlDomainUUID())
	if err != nil {
		log.Fatal(err)
	}
	vbd, err := s.CreateVBD(ctx, xapi.VBDSpec{VM: dom0, VDI: vdi})
	if err != nil {
		log.Fatal(err)
	}
	if err := s.PlugVBD(ctx, vbd); err != nil {
		log.Fatal(err)
	}
	for _, v := range host.VBDs() {
		fmt.Println(v.Device, v.CurrentlyAttached)
	}
	// Output: xvda true
}
