package xapitest

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// requireLoop skips, or under STRICT=1 fails, where no loop device can be made.
func requireLoop(t *testing.T) {
	t.Helper()
	reason := ""
	if os.Geteuid() != 0 {
		reason = "loop devices need root"
	} else if _, err := os.Stat("/dev/loop-control"); err != nil {
		reason = err.Error()
	}
	switch {
	case reason == "":
	case os.Getenv("STRICT") == "1":
		t.Fatal(reason)
	default:
		t.Skip(reason)
	}
}

func TestLoop(t *testing.T) {
	requireLoop(t)
	for _, sector := range []int{512, 4096} {
		t.Run(strconv.Itoa(sector), func(t *testing.T) {
			h := start(t, Config{Loop: true})
			content := bytes.Repeat([]byte("0123456789abcdef"), 4096)
			image := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(image, content, 0o600); err != nil {
				t.Fatal(err)
			}
			uuid := addVDI(t, h, VDISpec{Image: image, SectorSize: sector})
			testUnplugWhileOpen(t, h, uuid)

			s := h.NewSession(RoleRoot)
			ref := h.VBDs()[0].Ref
			must(t, h, "VBD.plug", s, ref)
			link := filepath.Join(h.DeviceDir(), h.VBDs()[0].Device)
			checkLoop(t, link, content, sector)
			node, err := os.Readlink(link)
			if err != nil {
				t.Fatal(err)
			}
			must(t, h, "VBD.unplug", s, ref)
			if b, err := os.ReadFile("/sys/block/" + filepath.Base(node) + "/loop/backing_file"); err == nil && strings.HasPrefix(string(b), image) {
				t.Errorf("%s is still there after unplug, for %s", node, b)
			}
			must(t, h, "VBD.plug", s, ref) // Close takes this one down
		})
	}
}

func checkLoop(t *testing.T, link string, content []byte, sector int) {
	t.Helper()
	f, err := os.Open(link)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("got %d bytes, %v, want the image's %d", len(got), err, len(content))
	}
	if n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil || n != sector {
		t.Errorf("sector size: got %d, %v, want %d", n, err, sector)
	}
	if n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err != nil || n != 1 {
		t.Errorf("read-only: got %d, %v, want 1", n, err)
	}
}

func TestLoopRefusesTail(t *testing.T) {
	h := start(t, Config{Loop: true}) // refused before root matters
	s := h.NewSession(RoleRoot)
	for _, spec := range []VDISpec{{Size: 1000}, {Size: 512, SectorSize: 4096}} {
		ref := createVBD(t, h, s, addVDI(t, h, spec))
		_, failed, err := try(t, h, "VBD.plug", s, ref)
		if err != nil || len(failed) != 4 || failed[0] != "SR_BACKEND_FAILURE_46" || !strings.Contains(failed[2], "drop the tail") {
			t.Errorf("%+v: got %q, %v", spec, failed, err)
		}
	}
}

func TestLoopCloseWhileOpen(t *testing.T) {
	requireLoop(t)
	h := start(t, Config{Loop: true})
	h.closeTimeout = 50 * time.Millisecond
	s := h.NewSession(RoleRoot)
	ref := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
	must(t, h, "VBD.plug", s, ref)
	f, err := os.Open(filepath.Join(h.DeviceDir(), h.VBDs()[0].Device))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := h.Close(); err == nil || !strings.Contains(err.Error(), "device is in use") {
		t.Errorf("closing the host with an open device: got %v, want that it is in use", err)
	}
}
