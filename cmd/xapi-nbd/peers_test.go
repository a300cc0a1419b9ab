package main

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// TestMapsThroughTheService: in the maps of other tools all of a block device is allocated
// data, as it has no information about holes.
func TestMapsThroughTheService(t *testing.T) {
	requires.LoopDevices(t)
	requires.Tool(t, "nbdinfo")
	requires.Tool(t, "qemu-img")
	w := newWorld(t, xapitest.Config{Loop: true})
	const size = 4 << 20
	vdi := w.addVDI(make([]byte, size), xapitest.VDISpec{})
	p := w.start()

	uri := w.uri(p, w.export(vdi), false)
	got := strings.Join(strings.Fields(tool(t, "nbdinfo", "--json", "--map", uri)), "")
	if want := fmt.Sprintf(`[{"offset":0,"length":%d,"type":0,"description":"data"}]`, size); got != want {
		t.Errorf("nbdinfo --map: got %s, want %s", got, want)
	}
	got = tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)
	if want := fmt.Sprintf(`"start": 0, "length": %d`, size); !strings.Contains(got, want) || strings.Contains(got, `"zero": true`) {
		t.Errorf("qemu-img map: got %s", got)
	}
	if got := tool(t, "nbdinfo", uri); !strings.Contains(got, "using structured packets") {
		t.Errorf("nbdinfo did not negotiate structured replies:\n%s", got)
	}
	w.waitClean(p)
}

// TestSIGHUPUnderLoad sends a hundred SIGHUPs under load, which ended older servers.
func TestSIGHUPUnderLoad(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	image := random(5, 1<<20)
	vdi := w.addVDI(image, xapitest.VDISpec{})
	p := w.start()
	conn, err := w.open(p, w.export(vdi), true)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			got := make([]byte, len(image))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
					t.Errorf("a read failed: %v", err)
					return
				}
			}
		})
	}
	for range 100 {
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	readers.Wait()
	conn.Close()
	w.waitClean(p)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}
