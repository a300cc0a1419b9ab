package main

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// TestPullFromLoopDevices runs common clients with the running service, on block devices with
// a real file system.
func TestPullFromLoopDevices(t *testing.T) {
	requires.LoopDevices(t)
	for _, tool := range []string{"qemu-img", "nbdcopy", "nbdinfo", "mke2fs", "e2fsck"} {
		requires.Tool(t, tool)
	}
	for i, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("%d-byte sectors", sector), func(t *testing.T) {
			style := []xapitest.DeviceStyle{xapitest.StyleSM, xapitest.StyleNBD}[i]
			w := newWorld(t, xapitest.Config{Loop: true, Style: style})
			image := makeExt4(t)
			vdi := w.addVDI(image, xapitest.VDISpec{SectorSize: sector})
			p := w.start()
			for _, secure := range []bool{false, true} {
				t.Run(map[bool]string{false: "clear", true: "TLS"}[secure], func(t *testing.T) {
					w.pullWithTools(t, p, vdi, secure, sector, image)
				})
			}
			if code := p.stop(patience); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
		})
	}
}

// TestPullPastThePageCache does the same with direct I/O, for sectors of both sizes: those of
// 4096 bytes exceed the alignment of reply buffers.
func TestPullPastThePageCache(t *testing.T) {
	requires.LoopDevices(t)
	requires.Tool(t, "nbdcopy")
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("%d-byte sectors", sector), func(t *testing.T) {
			w := newWorld(t, xapitest.Config{Loop: true})
			image := random(1, 8<<20+4096)
			vdi := w.addVDI(image, xapitest.VDISpec{SectorSize: sector})
			p := w.start("--config=" + w.file("direct.toml", "direct_io = true"))
			for _, size := range []string{"65536", "2097152"} {
				out := filepath.Join(t.TempDir(), "copy")
				tool(t, "nbdcopy", "--request-size="+size, w.uri(p, w.export(vdi), false), out)
				wantFile(t, out, image)
				w.waitClean(p)
			}
			if log := p.output(); strings.Contains(log, "past the page cache") {
				t.Errorf("the device was read through the page cache:\n%s", log)
			}
		})
	}
}

// TestPullFromFiles: without root the simulated host plugs files, as in the demo and most
// other tests. Sizes that are no multiple of a sector are served to the last byte.
func TestPullFromFiles(t *testing.T) {
	for _, size := range []int{1 << 20, 1<<20 + 512, 1<<20 + 1, 3} {
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, TLS %v", size, secure), func(t *testing.T) {
				w := newWorld(t, xapitest.Config{})
				image := random(uint64(size), size)
				vdi := w.addVDI(image, xapitest.VDISpec{})
				p := w.start()
				conn, err := w.open(p, w.export(vdi), secure)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, conn.Size())
				if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
					t.Errorf("got %d bytes (%v), want the %d of the image", len(got), err, len(image))
				}
				wantMin := uint32(512)
				if size%512 != 0 {
					wantMin = 1
				}
				if got := conn.Info().BlockSizes.Min; got != wantMin {
					t.Errorf("minimum block size: got %d, want %d", got, wantMin)
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
				w.waitClean(p)
			})
		}
	}
}

// TestOddSizeIsNotPluggedAsLoop: a loop device would drop the tail of such a file, so the
// simulated host refuses to plug it, and the client gets the reason.
func TestOddSizeIsNotPluggedAsLoop(t *testing.T) {
	requires.LoopDevices(t)
	w := newWorld(t, xapitest.Config{Loop: true})
	vdi := w.addVDI(random(1, 1<<20+1), xapitest.VDISpec{})
	p := w.start()
	if _, err := w.open(p, w.export(vdi), false); err == nil || !strings.Contains(err.Error(), "SR_BACKEND_FAILURE") {
		t.Errorf("got %v, want xapi's refusal", err)
	}
	w.waitClean(p)
}

// TestExportNameAnswerIsOneSegment: Xen Orchestra's client reads 134 bytes with one call.
func TestExportNameAnswerIsOneSegment(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn, answer := w.exportName(p, w.export(vdi))
	want := append([]byte{0, 0, 0, 0, 0, 0x10, 0, 0, 1, 3}, make([]byte, 124)...)
	if !bytes.Equal(answer, want) {
		t.Errorf("got %d bytes %x, want 134 bytes %x", len(answer), answer, want)
	}
	conn.Close()
	w.waitClean(p)
}
