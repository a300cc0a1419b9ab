package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/xapi/xapitest"
)

// TestXen is about disks that go through Xen's block backend and frontend.
func TestXen(t *testing.T) {
	if !exists("/proc/xen/capabilities") {
		t.Fatal("this is not a domain of Xen")
	}
	t.Run("peers", func(t *testing.T) {
		version := "/sys/hypervisor/version/"
		logPeer(t, "Xen", readFile(t, version+"major")+"."+readFile(t, version+"minor")+readFile(t, version+"extra"))
		logPeer(t, "Linux", must(t, "uname", "-r"))
		logClientPeers(t, "nbdcopy", "qemu-img")
		logPeer(t, "LVM", must(t, "dpkg-query", "-W", "-f", "${Version}", "lvm2"))
	})
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("sectors of %d", sector), func(t *testing.T) { testXenPull(t, sector) })
	}
	t.Run("two disks", testXenTwoDisks)
	t.Run("images on LVM", testXenLVM)
	t.Run("kill -9", testXenKill)
}

func newXenWorld(t *testing.T) *world {
	t.Helper()
	blocks, err := NewXenBlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = blocks.Close() })
	return newWorld(t, xapitest.StyleXVD, blocks.Make)
}

// wantNoXenDisks wants that nothing is left of Xen's disks, nor of the loop
// devices behind them.
func wantNoXenDisks(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"/sys/block/xvd*", "/dev/xvd*", "/sys/bus/xen/devices/vbd-*", "/sys/bus/xen-backend/devices/vbd-*", "/sys/block/loop*/loop/backing_file"} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) != 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	}
}

func testXenPull(t *testing.T, sector int) {
	w := newXenWorld(t)
	s := w.start()
	data := diskContent(1, sector)
	vdi := w.addVDI(data, sector)

	t.Run("device", func(t *testing.T) {
		conn := w.open(t, s, vdi)
		link, err := filepath.EvalSymlinks("/sys/block/xvda/device")
		if err != nil || !strings.HasPrefix(filepath.Base(link), "vbd-") {
			t.Errorf("xvda's device: got %q, %v, want one of Xen's frontend", link, err)
		}
		wantFile(t, "/sys/block/xvda/queue/logical_block_size", strconv.Itoa(sector))
		wantFile(t, "/sys/block/xvda/ro", "1")
		if got := conn.Info().BlockSizes.Min; got != uint32(sector) {
			t.Errorf("minimum block size: got %d, want %d", got, sector)
		}
		if got := conn.Size(); got != int64(len(data)) {
			t.Errorf("size: got %d, want %d", got, len(data))
		}
		if open := s.openDevices(); len(open) != 1 || open[0] != "/dev/xvda" {
			t.Errorf("open devices: got %q, want /dev/xvda", open)
		}
		odd := make([]byte, 70001) // reads need not be aligned
		if _, err := conn.ReadAt(odd, 4<<20+3); err != nil {
			t.Error(err)
		}
		wantSame(t, "odd read", odd, data[4<<20+3:][:len(odd)])
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		w.waitClean(t, s)
		wantNoXenDisks(t)
	})
	w.pullByAll(t, s, vdi, data, wantNoXenDisks)
	s.stop()
}

// Disks that are attached at the same time are distinguished, and a detach removes its own.
func testXenTwoDisks(t *testing.T) {
	w := newXenWorld(t)
	s := w.start()
	contents := [][]byte{diskContent(2, 512), diskContent(3, 512)}
	first, second := w.open(t, s, w.addVDI(contents[0], 512)), w.open(t, s, w.addVDI(contents[1], 512))
	got := make([]byte, 1<<20)
	if _, err := first.ReadAt(got, 0); err != nil {
		t.Error(err)
	}
	wantSame(t, "first disk", got, contents[0][:len(got)])
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if err := waitGone(t.Context(), "/sys/block/xvda"); err != nil {
		t.Error(err)
	}
	if _, err := second.ReadAt(got, 12<<20); err != nil {
		t.Error(err)
	}
	wantSame(t, "second disk", got, contents[1][12<<20:][:len(got)])
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	w.waitClean(t, s)
	wantNoXenDisks(t)
	s.stop()
}

// A service that was killed leaves a real device attached. The next one takes it
// away, and can attach it again.
func testXenKill(t *testing.T) {
	w := newXenWorld(t)
	s := w.start()
	data := diskContent(4, 512)
	vdi := w.addVDI(data, 512)
	conn := w.open(t, s, vdi)
	if _, err := conn.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s.kill()
	<-conn.Done()
	if vbds := w.host.VBDs(); len(vbds) != 1 || !vbds[0].CurrentlyAttached || !exists("/sys/block/xvda") {
		t.Fatalf("after the kill: got %+v, want one attached VBD and its device", vbds)
	}
	if journal, err := os.ReadFile(filepath.Join(w.dir, "state", "VBDs_to_clean_up")); err != nil || len(journal) == 0 {
		t.Errorf("journal after the kill: got %q, %v, want an entry", journal, err)
	}

	s = w.start()
	w.waitClean(t, s)
	wantNoXenDisks(t)
	wantSame(t, "pulled after the recovery", w.pull(t, s, vdi, "nbd-tool"), data)
	w.waitClean(t, s)
	wantNoXenDisks(t)
	s.stop()
}
