package xapitest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// copyMaker makes copies of images its devices, and takes them away again.
type copyMaker struct {
	dir   string
	stuck atomic.Bool // removals fail
	specs chan DeviceSpec
}

func newCopyMaker(t *testing.T) *copyMaker {
	return &copyMaker{dir: t.TempDir(), specs: make(chan DeviceSpec, 1)}
}

func (m *copyMaker) make(_ context.Context, spec DeviceSpec) (string, func(context.Context) error, error) {
	m.specs <- spec
	node := filepath.Join(m.dir, spec.Name)
	data, err := os.ReadFile(spec.Image)
	if err == nil {
		err = os.WriteFile(node, data, 0o644)
	}
	return node, func(context.Context) error {
		if m.stuck.Load() {
			return errors.New("stuck")
		}
		return removeIfThere(node)
	}, err
}

func TestMaker(t *testing.T) {
	m := newCopyMaker(t)
	h := start(t, Config{Maker: m.make})
	s := h.NewSession(RoleVMAdmin)
	image, content := imageOf(t, 'm')
	vdi := addVDI(t, h, VDISpec{Image: image, SectorSize: 4096})
	ref := createVBD(t, h, s, vdi)
	must(t, h, "VBD.plug", s, ref)

	node := filepath.Join(m.dir, "xvda")
	if target, err := os.Readlink(filepath.Join(h.DeviceDir(), "xvda")); err != nil || target != node {
		t.Errorf("link: got %q, %v, want %q", target, err, node)
	}
	want := DeviceSpec{Name: "xvda", VDI: vdi, Image: image, SectorSize: 4096, ReadOnly: true}
	if got := <-m.specs; got != want {
		t.Errorf("made: got %+v, want %+v", got, want)
	}
	if got, err := os.ReadFile(node); err != nil || !bytes.Equal(got, content) {
		t.Errorf("device: got %d bytes, %v, want the image's %d", len(got), err, len(content))
	}

	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	mustFail(t, h, inUse(os.Getpid()), "VBD.unplug", s, ref)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	m.stuck.Store(true)
	if _, failed, _ := try(t, h, "VBD.unplug", s, ref); len(failed) < 3 || !strings.Contains(failed[2], "stuck") {
		t.Errorf("unplug with a maker that fails: got %q, want the maker's error", failed)
	}
	m.stuck.Store(false)
	must(t, h, "VBD.unplug", s, ref)
	if _, err := os.Lstat(node); !os.IsNotExist(err) {
		t.Errorf("device after unplug: got %v, want that it does not exist", err)
	}
}

// Under StyleNBD the maker disconnects the device below those who have it open.
func TestMakerDisconnects(t *testing.T) {
	m := newCopyMaker(t)
	h := start(t, Config{Maker: m.make, Style: StyleNBD})
	s := h.NewSession(RoleVMAdmin)
	ref := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
	must(t, h, "VBD.plug", s, ref)
	f, err := os.Open(filepath.Join(m.dir, "nbd0"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	must(t, h, "VBD.unplug", s, ref)
	if _, err := os.Lstat(h.SysDir()); !os.IsNotExist(err) {
		t.Errorf("the host's own /sys: got %v, want none", err)
	}
}

func TestMakerFails(t *testing.T) {
	h := start(t, Config{Maker: func(_ context.Context, spec DeviceSpec) (string, func(context.Context) error, error) {
		if spec.Name == "xvda" {
			return "", nil, errors.New("no backend")
		}
		return filepath.Join(spec.Image, "nowhere"), func(context.Context) error { return nil }, nil
	}})
	s := h.NewSession(RoleVMAdmin)
	for _, want := range []string{"no backend", "nowhere"} {
		ref := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
		_, failed, err := try(t, h, "VBD.plug", s, ref)
		if err != nil || len(failed) < 3 || !strings.Contains(failed[2], want) {
			t.Errorf("plug: got %q, %v, want %q in it", failed, err, want)
		}
	}
	for _, vbd := range h.VBDs() {
		if vbd.CurrentlyAttached {
			t.Errorf("VBD %+v is attached, want it detached", vbd)
		}
	}
}
