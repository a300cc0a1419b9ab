package main

import (
	"bytes"
	"fmt"
	"testing"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestDeviceTooSmallIsRefused: the refusal for a device that is smaller than its VDI has both
// sizes.
func TestDeviceTooSmallIsRefused(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	const device, virtual = 2 << 20, 4 << 20
	vdi := w.addVDI(random(1, device), xapitest.VDISpec{VirtualSize: virtual})
	p := w.start()
	client, err := w.dial(p, false)
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("the device is smaller than the VDI: it has %d bytes, the VDI has %d", device, virtual)
	w.wantRefused(t, client, w.export(vdi), wire.RepErrUnknown, text)
	w.waitClean(p)
	w.host.SetVirtualSize(vdi, device)
	conn, err := client.Go(t.Context(), w.export(vdi))
	if err != nil {
		t.Fatalf("with the right size: %v", err)
	}
	conn.Close()
	w.waitClean(p)
}

// TestDeviceShrinksWhileRead: reads behind the end of a device that has shrunk fail; they do
// not return fewer bytes, or zeroes. All paths of the data are tried.
func TestDeviceShrinksWhileRead(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %t", secure), func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			data := random(1, 2<<20)
			vdi := w.addVDI(data, xapitest.VDISpec{})
			p := w.start()
			conn, err := w.open(p, w.export(vdi), secure)
			if err != nil {
				t.Fatal(err)
			}
			const end = 1 << 20
			if err := w.host.ResizeDevice(vdi, end); err != nil {
				t.Fatal(err)
			}
			for _, size := range []int{512, 64 << 10, 512 << 10} { // the last is spliced in the clear
				got := make([]byte, size)
				for _, off := range []int64{end - int64(size)/2, end, 2<<20 - int64(size)} {
					if _, err := conn.ReadAt(got, off); err == nil {
						t.Errorf("%d bytes at %d, of which not all exist any more, were read", size, off)
					}
				}
				if _, err := conn.ReadAt(got, end-int64(size)); err != nil || !bytes.Equal(got, data[end-size:end]) {
					t.Errorf("the last %d bytes that exist: %v, or other bytes", size, err)
				}
			}
			conn.Close()
			w.waitClean(p)
		})
	}
}
