package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/xapi/xapitest"
)

// clientNode is the NBD device that these tests bind to our server.
const clientNode = "/dev/nbd5"

// exportSize is enough for ext4 and some files.
const exportSize = 64 << 20

// testKernelClient lets the kernel be the client of a writable export: a file
// system is made on it, written to from several sides, trimmed and checked, and
// then looked at without NBD.
func testKernelClient(t *testing.T, sector, connections int) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o644), os.Truncate(image, exportSize)); err != nil {
		t.Fatal(err)
	}
	// The sector size of the served device is the minimum block size of the export.
	served := image
	if sector != 512 {
		served = attachTestLoop(t, image, false, sector)
	}
	server := launch(t, "nbd-tool", "serve", "--writable", "--listen", "127.0.0.1:0", served)
	addr := listening.FindStringSubmatch(server.waitLine("listening on "))[1]
	kept := useKernelClient(t, dir, image, addr, "", sector, connections)
	server.stop()
	must(t, "e2fsck", "-f", "-n", served)
	wantFiles(t, dir, served, sector, kept)
}

// testKernelClientOfService is testKernelClient with a disk that the service has attached
// for writing.
func testKernelClientOfService(t *testing.T, connections int) {
	w := newWorld(t, xapitest.StyleSM, makeLoop)
	config := filepath.Join(w.dir, "service.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "allow_write = true\ndevice_dir = %q\n", w.host.DeviceDir()), 0o600); err != nil {
		t.Fatal(err)
	}
	// The service looks there whether the loop device can discard.
	if err := errors.Join(os.MkdirAll(w.host.SysDir(), 0o755), os.Symlink("/sys/dev", filepath.Join(w.host.SysDir(), "dev"))); err != nil {
		t.Fatal(err)
	}
	s := w.start("--config=" + config)
	vdi, err := w.host.AddVDI(xapitest.VDISpec{Size: exportSize})
	if err != nil {
		t.Fatal(err)
	}
	dir, image := t.TempDir(), w.host.ImagePath(vdi)
	kept := useKernelClient(t, dir, image, s.addr, w.host.ExportName(vdi, w.session())+"&mode=rw", 512, connections)
	w.waitClean(t, s)
	s.stop()
	must(t, "e2fsck", "-f", "-n", image)
	wantFiles(t, dir, image, 512, kept)
}

// makeLoop is an [xapitest.DeviceMaker] of loop devices.
func makeLoop(ctx context.Context, spec xapitest.DeviceSpec) (node string, remove func(context.Context) error, err error) {
	node, err = attachLoop(ctx, spec.Image, spec.ReadOnly, spec.SectorSize)
	return node, func(ctx context.Context) error { return detachLoop(ctx, node) }, err
}

// useKernelClient binds the device to the export with that name of a server, lets a file
// system work on it, and releases it. image is the file behind the export. It returns the
// files that are on the file system.
func useKernelClient(t *testing.T, dir, image, addr, name string, sector, connections int) (kept map[string][]byte) {
	t.Helper()
	host, port, _ := strings.Cut(addr, ":")
	args := []string{host, port, clientNode, "-block-size", strconv.Itoa(sector), "-connections", strconv.Itoa(connections)}
	if name != "" {
		args = append(args, "-name", name)
	}
	must(t, "nbd-client", args...)
	bound := true
	unbind := func() {
		if bound {
			bound = false
			must(t, "nbd-client", "-d", clientNode)
			if err := waitGone(t.Context(), "/sys/block/nbd5/pid"); err != nil {
				t.Error(err)
			}
		}
	}
	defer unbind()
	if err := waitSize(t.Context(), clientNode, image); err != nil {
		t.Fatal(err)
	}
	wantFile(t, "/sys/block/nbd5/queue/logical_block_size", strconv.Itoa(sector))
	wantFile(t, "/sys/block/nbd5/ro", "0")
	wantFile(t, "/sys/block/nbd5/queue/write_cache", "write back")
	if got := established(t, port); got != connections {
		t.Errorf("connections: got %d, want %d", got, connections)
	}

	kept = fillFileSystem(t, dir, image)
	must(t, "e2fsck", "-f", "-n", clientNode)
	unbind()
	return kept
}

// attachTestLoop puts a loop device under a file until the end of the test.
func attachTestLoop(t *testing.T, image string, readOnly bool, sector int) (node string) {
	t.Helper()
	node, err := attachLoop(t.Context(), image, readOnly, sector)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := detachLoop(context.Background(), node); err != nil {
			t.Error(err)
		}
	})
	return node
}

// established counts the connections to a port of this machine.
func established(t *testing.T, port string) (n int) {
	t.Helper()
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	local := fmt.Sprintf(":%04X", number)
	for line := range strings.Lines(readFile(t, "/proc/net/tcp") + "\n") {
		fields := strings.Fields(line) // number, local address, remote address, state
		if len(fields) > 3 && strings.HasSuffix(fields[1], local) && fields[3] == "01" {
			n++
		}
	}
	return n
}

// fillFileSystem makes ext4 on the device, writes files concurrently, deletes one, trims, and
// returns the content of the others.
func fillFileSystem(t *testing.T, dir, image string) (kept map[string][]byte) {
	t.Helper()
	must(t, "mkfs.ext4", "-q", "-F", clientNode)
	mounted := filepath.Join(dir, "mounted")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	must(t, "mount", clientNode, mounted)
	unmount := sync.OnceFunc(func() { must(t, "umount", mounted) })
	defer unmount()

	kept = map[string][]byte{}
	var writers sync.WaitGroup
	for i, name := range []string{"a", "b", "deleted"} {
		data := diskContent(20+uint64(i), 512)[:8<<20]
		if name != "deleted" {
			kept[name] = data
		}
		writers.Go(func() {
			if err := writeSynced(filepath.Join(mounted, name), data); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	before := allocated(t, image)
	if err := os.Remove(filepath.Join(mounted, "deleted")); err != nil {
		t.Fatal(err)
	}
	unix.Sync() // deleted blocks are free only after the deletion is written
	t.Log(must(t, "fstrim", "-v", mounted))
	if after := allocated(t, image); after > before-4<<20 {
		t.Errorf("allocated bytes of the image: %d before a file was deleted and trimmed, %d after; want at least 4 MiB less", before, after)
	}
	unmount()
	return kept
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// allocated is how many bytes a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// wantFiles mounts the served file without NBD and compares the files.
func wantFiles(t *testing.T, dir, served string, sector int, want map[string][]byte) {
	t.Helper()
	node := served
	if sector == 512 {
		node = attachTestLoop(t, served, true, sector)
	}
	mounted := filepath.Join(dir, "looked at")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	must(t, "mount", "-o", "ro,noload", node, mounted)
	defer must(t, "umount", mounted)
	for name, data := range want {
		got, err := os.ReadFile(filepath.Join(mounted, name))
		if err != nil {
			t.Error(err)
			continue
		}
		wantSame(t, name, got, data)
	}
	if exists(filepath.Join(mounted, "deleted")) {
		t.Error("the deleted file is there")
	}
}
