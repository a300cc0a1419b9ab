package guest

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

func newNBDWorld(t *testing.T, ioctl bool) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") // t.TempDir is too long for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return newWorld(t, xapitest.StyleNBD, (&KernelNBD{Dir: dir, Ioctl: ioctl}).Make)
}

// wantNoNBD fails the test if an NBD device is bound, by the kernel or by xapi's helper.
func wantNoNBD(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"/sys/block/nbd*/pid", filepath.Join(nbdRecords, "*")} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) != 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	}
}

func testDevicePull(t *testing.T, sector int) {
	w := newNBDWorld(t, false)
	s := w.start()
	data := diskContent(5, sector)
	vdi := w.addVDI(data, sector)

	t.Run("device", func(t *testing.T) {
		conn := w.open(t, s, vdi)
		if got := w.host.VBDs()[0].Device; got != "nbd0" {
			t.Errorf("VBD's device: got %q, want nbd0", got)
		}
		wantFile(t, "/sys/block/nbd0/queue/logical_block_size", strconv.Itoa(sector))
		if got := conn.Info().BlockSizes.Min; got != uint32(sector) {
			t.Errorf("minimum block size: got %d, want %d", got, sector)
		}
		if got := conn.Size(); got != int64(len(data)) {
			t.Errorf("size: got %d, want %d", got, len(data))
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		w.waitClean(t, s)
		wantNoNBD(t)
	})
	w.pullByAll(t, s, vdi, data, wantNoNBD)
	s.stop()
}

// boundDisk binds /dev/nbdN to a VHD, without a host.
func boundDisk(t *testing.T, k *KernelNBD, name string, seed uint64) (remove func(context.Context) error) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, diskContent(seed, 512), 0o644); err != nil {
		t.Fatal(err)
	}
	_, remove, err := k.Make(t.Context(), xapitest.DeviceSpec{Name: name, VDI: "disk" + strconv.FormatUint(seed, 10), Image: image, SectorSize: 512, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return remove
}

// testDeviceMarks checks the assumptions of package blockdev about the kernel: pid exists
// while the device is bound, and an open descriptor of it shows another text, or nothing,
// for every other binding.
func testDeviceMarks(t *testing.T) {
	const pidPath = "/sys/block/nbd7/pid"
	k := &KernelNBD{Dir: t.TempDir()}
	if exists(pidPath) {
		t.Errorf("%s is there before the device is bound", pidPath)
	}
	removeFirst := boundDisk(t, k, "nbd7", 6)
	pid, err := os.Open(pidPath)
	if err != nil {
		t.Fatal(err)
	}
	defer pid.Close()
	first := shown(pid)
	if n, err := strconv.Atoi(first[:max(len(first)-1, 0)]); err != nil || n <= 0 {
		t.Errorf("pid of a bound device: got %q, want a number and a newline", first)
	}
	t.Logf("bound: %q, read again: %q", first, shown(pid))
	var record struct{ Path string }
	data, err := os.ReadFile(filepath.Join(nbdRecords, "7"))
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err != nil || filepath.Dir(record.Path) != k.Dir {
		t.Errorf("record: got %q, %v, want the socket's path", data, err)
	}

	if err := removeFirst(t.Context()); err != nil {
		t.Fatal(err)
	}
	unbound := shown(pid)
	t.Logf("disconnected: %q, %s exists: %t", unbound, pidPath, exists(pidPath))
	if unbound == first {
		t.Errorf("the old descriptor after the end of the binding: got %q still", unbound)
	}
	boundDisk(t, k, "nbd7", 7)
	second := shown(pid)
	t.Logf("bound to another disk: %q by the old descriptor, %q by name", second, readFile(t, pidPath))
	if second == first {
		t.Errorf("the old descriptor during another binding: got %q still", second)
	}
}

// shown returns the content of the kernel's file, or the error.
func shown(f *os.File) string {
	var text [32]byte
	n, err := f.ReadAt(text[:], 0)
	if n == 0 && err != nil {
		return err.Error()
	}
	return string(text[:n])
}

// Another client unplugs the VBD while it is read: the reader gets an error, the service
// closes the device, and the unplug succeeds.
func testDeviceUnplugged(t *testing.T, ioctl bool) {
	w := newNBDWorld(t, ioctl)
	s := w.start()
	vdis := []string{w.addVDI(diskContent(8, 512), 512), w.addVDI(diskContent(9, 512), 512)}
	conn := w.open(t, s, vdis[0])
	wantOnly(t, conn, diskContent(8, 512))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.host.UnplugVBD(ctx, w.host.VBDs()[0].UUID); err != nil {
		t.Error(err)
	}
	waitEnd(t, conn)
	w.waitClean(t, s)
	wantNoNBD(t)
	// The next disk has the same device.
	wantSame(t, "pulled", w.pull(t, s, vdis[1], "nbd-tool"), diskContent(9, 512))
	w.waitClean(t, s)
	wantNoNBD(t)
	s.stop()
}

// The device is disconnected without xapi and bound to another disk, if the kernel allows
// that: no byte of that disk may reach the client. xapi's record does not change, so only
// the kernel's file shows it.
func testDeviceTaken(t *testing.T, ioctl bool) {
	w := newNBDWorld(t, ioctl)
	s := w.start()
	mine, other := diskContent(10, 512), diskContent(11, 512)
	conn := w.open(t, s, w.addVDI(mine, 512))
	wantOnly(t, conn, mine)
	pid, err := os.Open("/sys/block/nbd0/pid")
	if err != nil {
		t.Fatal(err)
	}
	defer pid.Close()
	t.Logf("pid of the device that the service has open: %q", shown(pid))

	taker := w.otherDisk("/dev/nbd0", other)
	must(t, "nbd-client", "-d", "/dev/nbd0")
	t.Logf("the same after its disconnection: %q", shown(pid))
	for _, how := range [][]string{nil, {"-nonetlink"}} {
		args := append([]string{"-unix", taker.socket, taker.node, "-name", taker.export}, how...)
		_, err := run(t.Context(), "nbd-client", args...)
		t.Logf("binding it to another disk while the service has it open, %q: %v; pid: %q", how, err, shown(pid))
		wantOnly(t, conn, mine)
		if err == nil {
			must(t, "nbd-client", "-d", taker.node)
			break
		}
	}
	select {
	case <-conn.Done():
		t.Log("the service has ended the connection")
	default:
		t.Log("the connection goes on, with errors")
	}
	_ = conn.Close() // it may have ended with an error
	w.waitClean(t, s)
	wantNoNBD(t)
	s.stop()
}

// otherDisk serves a VHD with that content until the end of the test, and binds
// nothing to it.
func (w *world) otherDisk(node string, data []byte) *nbdDisk {
	w.t.Helper()
	image := filepath.Join(w.dir, "other")
	vhd := image + ".vhd"
	err := os.WriteFile(image, data, 0o644)
	if err == nil {
		err = makeVHD(w.t.Context(), image, vhd)
	}
	d := &nbdDisk{node: node, socket: filepath.Join(w.dir, "o"), export: "other"}
	if err == nil {
		err = d.serve(w.t.Context(), vhd)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(d.stopServer)
	return d
}

// wantOnly reads all of a disk, in large and small pieces, and wants its own data
// or errors.
func wantOnly(t *testing.T, conn *client.Conn, data []byte) {
	t.Helper()
	failed := 0
	for _, length := range []int{64 << 10, 1 << 20} {
		for off := 0; off < len(data); off += length {
			got := make([]byte, min(length, len(data)-off))
			if _, err := conn.ReadAt(got, int64(off)); err != nil {
				failed++
				continue
			}
			want := data[off:][:len(got)]
			if string(got) != string(want) {
				t.Fatalf("read of %d bytes at %d: %s", length, off, firstDifference(got, want))
			}
		}
	}
	t.Logf("reads that failed: %d", failed)
}

// waitEnd waits for the service to end the connection.
func waitEnd(t *testing.T, conn *client.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	select {
	case <-conn.Done():
	case <-ctx.Done():
		t.Error("the connection goes on though the device is gone")
	}
	_ = conn.Close() // it has ended with an error
}

// A service that was killed leaves a bound device. The next one takes it away.
func testDeviceKill(t *testing.T) {
	w := newNBDWorld(t, false)
	s := w.start()
	data := diskContent(12, 512)
	vdi := w.addVDI(data, 512)
	conn := w.open(t, s, vdi)
	if _, err := conn.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s.kill()
	waitEnd(t, conn)
	if vbds := w.host.VBDs(); len(vbds) != 1 || !vbds[0].CurrentlyAttached || !exists("/sys/block/nbd0/pid") {
		t.Fatalf("after the kill: got %+v, want one attached VBD and its device", vbds)
	}
	s = w.start()
	w.waitClean(t, s)
	wantNoNBD(t)
	wantSame(t, "pulled after the recovery", w.pull(t, s, vdi, "nbd-tool"), data)
	w.waitClean(t, s)
	wantNoNBD(t)
	s.stop()
}
