package xapitest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/vdi/allocation"
	"xapi-nbd/vdi/vhd"
	"xapi-nbd/vdi/vhd/vhdtest"
)

const mib = 1 << 20

// write writes n random bytes.
func write(t *testing.T, h *Host, vdiUUID string, random *rand.ChaCha8, n int, off int64) {
	t.Helper()
	p := make([]byte, n)
	_, _ = random.Read(p)
	if err := h.WriteVDI(vdiUUID, p, off); err != nil {
		t.Fatal(err)
	}
}

func snapshot(t *testing.T, h *Host, vdiUUID string) (uuid string) {
	t.Helper()
	uuid, err := h.SnapshotVDI(vdiUUID)
	if err != nil {
		t.Fatal(err)
	}
	return uuid
}

func content(t *testing.T, h *Host, vdiUUID string) []byte {
	t.Helper()
	b, err := os.ReadFile(h.ImagePath(vdiUUID))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// checkChain compares the images of a VDI with its content: the blocks that package vhd
// finds are those of the chain, all others are zero, and the data of the images is the
// content.
func checkChain(t *testing.T, h *Host, vdiUUID string) {
	t.Helper()
	want := content(t, h, vdiUUID)
	set := vhd.NewBlockSet(int64(len(want)))
	images := h.images(vdiUUID)
	for i, path := range h.Chain(vdiUUID) {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		img, err := vhd.Parse(f)
		if err == nil {
			err = img.AddBlocks(t.Context(), f, set)
		}
		f.Close()
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if img.IsHidden() != (i > 0) || i == 0 && img.Size() != int64(len(want)) || img.HasParent() != (i < len(images)-1) {
			t.Fatalf("image %d of VDI %s: hidden %t, %d bytes, has a parent %t", i, vdiUUID, img.IsHidden(), img.Size(), img.HasParent())
		}
	}
	for block := range int64(len(want) / vhdtest.BlockSize) {
		data := want[block*vhdtest.BlockSize : (block+1)*vhdtest.BlockSize]
		got, err := vhdtest.ReadChain(images, block)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data) {
			t.Fatalf("VDI %s: block %d of the images is not that of the disk", vdiUUID, block)
		}
		has := slices.ContainsFunc(images, func(img *vhdtest.Image) bool { has, err := img.HasBlock(block); return has && err == nil })
		if in, _ := set.Run(block*vhdtest.BlockSize, 1); in != has {
			t.Fatalf("VDI %s: block %d: in the set %t, in an image %t", vdiUUID, block, in, has)
		} else if !in && len(bytes.Trim(data, "\x00")) > 0 {
			t.Fatalf("VDI %s: block %d has data and is a hole", vdiUUID, block)
		}
	}
}

// images returns the images of a VDI, the uppermost first.
func (h *Host) images(vdiUUID string) []*vhdtest.Image {
	h.mu.Lock()
	defer h.mu.Unlock()
	var images []*vhdtest.Image
	for v := h.vdiByUUID(vdiUUID); v != nil && v.image != nil; v = v.parent {
		images = append(images, v.image.w)
	}
	return images
}

// TestChains is a random walk of writes, snapshots, resizes, destroys and collections: each
// VDI's images have the content of its disk, and snapshots do not change.
func TestChains(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			h, r := start(t, Config{}), rand.New(rand.NewPCG(seed, 1))
			random := rand.NewChaCha8([32]byte{byte(seed)})
			size := int64(6 * mib)
			disk := addVDI(t, h, VDISpec{VHD: true, Size: size})
			frozen := map[string][]byte{}
			for step := range 16 {
				switch r.IntN(7) {
				case 0, 1, 2:
					n := 512 * (1 + r.IntN(vhdtest.BlockSize/512))
					write(t, h, disk, random, n, 512*r.Int64N((size-int64(n))/512+1))
				case 3, 4:
					s := snapshot(t, h, disk)
					frozen[s] = content(t, h, s)
				case 5:
					for s := range frozen {
						if err := h.DestroyVDI(s); err != nil {
							t.Fatal(err)
						}
						delete(frozen, s)
						break
					}
				case 6:
					size += 2 * mib
					if err := h.ResizeVDI(disk, size); err != nil {
						t.Fatal(err)
					}
				}
				if r.IntN(3) == 0 {
					if err := h.CollectGarbage(); err != nil {
						t.Fatal(err)
					}
				}
				checkChain(t, h, disk)
				if step%4 != 3 {
					continue
				}
				for s, want := range frozen {
					checkChain(t, h, s)
					if !bytes.Equal(content(t, h, s), want) {
						t.Fatalf("the content of snapshot %s has changed", s)
					}
				}
			}
		})
	}
}

// SnapshotVDI and CollectGarbage make and remove images as SM does.
func TestSnapshotAndCollect(t *testing.T) {
	h, random := start(t, Config{}), rand.NewChaCha8([32]byte{})
	disk := addVDI(t, h, VDISpec{VHD: true, Size: 8 * mib})
	write(t, h, disk, random, 512, 0)
	s1 := snapshot(t, h, disk)
	write(t, h, disk, random, 512, 2*mib)
	s2 := snapshot(t, h, disk)
	if a, b, c := h.Chain(disk), h.Chain(s1), h.Chain(s2); len(a) != 3 || len(b) != 2 || len(c) != 3 || a[1] != c[1] || a[2] != b[1] {
		t.Fatalf("got chains %q, %q, %q", a, b, c)
	}
	root := h.NewSession(RoleRoot)
	record := func(uuid string) structure {
		return must(t, h, "VDI.get_record", root, mustString(t, h, "VDI.get_by_uuid", root, uuid)).(structure)
	}
	of := func(s structure, name string) any { v, _ := s.get(name); return v }
	config, _ := of(record(s2), "sm_config").(structure)
	base := strings.TrimSuffix(filepath.Base(h.Chain(s2)[1]), ".vhd")
	if of(config, "vhd-parent") != base || of(record(base), "managed") != false {
		t.Errorf("got sm_config %v, want the parent %s, which is not managed", config, base)
	}
	if r := record(s2); of(r, "is_a_snapshot") != true || of(r, "snapshot_of") != mustString(t, h, "VDI.get_by_uuid", root, disk) || of(r, "virtual_size") != "8388608" {
		t.Errorf("got the record %v of a snapshot", r)
	}
	if got := of(record(disk), "snapshots").(array); len(got) != 2 {
		t.Errorf("got %d snapshots, want 2", len(got))
	}

	// Without s1 the base copies below s2 become one; without s2 all images do.
	for i, want := range []int{2, 1} {
		ref := mustString(t, h, "VDI.get_by_uuid", root, []string{s1, s2}[i])
		must(t, h, "VDI.destroy", root, ref)
		if err := h.CollectGarbage(); err != nil {
			t.Fatal(err)
		}
		if got := h.Chain(disk); len(got) != want {
			t.Errorf("after %d snapshots were destroyed: got chain %q, want %d images", i+1, got, want)
		}
		checkChain(t, h, disk)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(h.Chain(disk)[0]), "*"))
	if err != nil || len(files) != 1 {
		t.Errorf("got files %q, %v, want one", files, err)
	}
}

// While a VBD is attached SM's link is there, and package allocation finds the blocks
// behind it; sm_config has the mode of the attachment.
func TestLink(t *testing.T) {
	h, random := start(t, Config{}), rand.NewChaCha8([32]byte{})
	disk := addVDI(t, h, VDISpec{VHD: true, Size: 64 * mib})
	write(t, h, disk, random, 512, 4*mib)
	s := snapshot(t, h, disk)
	root := h.NewSession(RoleRoot)
	ref := mustString(t, h, "VDI.get_by_uuid", root, s)
	source := allocation.Source{Link: h.LinkPath(s), Key: s, MapperDir: filepath.Join(h.DeviceDir(), "mapper"), Size: 64 * mib}

	if _, err := allocation.Read(t.Context(), source); allocation.Reason(err) != "no_link" {
		t.Errorf("before the plug: got %v, want no link", err)
	}
	first, second := createVBD(t, h, root, s), createVBD(t, h, root, s)
	must(t, h, "VBD.plug", root, first)
	must(t, h, "VBD.plug", root, second)
	must(t, h, "VBD.unplug", root, first)
	set, err := allocation.Read(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	if hole, n := set.Run(0, 64*mib); hole || n != 4*mib || set.Bytes() != 2*mib {
		t.Errorf("got %t for %d bytes, and %d bytes of data", hole, n, set.Bytes())
	}
	config := must(t, h, "VDI.get_sm_config", root, ref).(structure)
	if mode, _ := config.get("host_" + h.host.ref); mode != "RO" {
		t.Errorf("got sm_config %v, want the host with RO", config)
	}
	h.SetSMConfig(s, "host_OpaqueRef:other", "RW")
	config = must(t, h, "VDI.get_sm_config", root, ref).(structure)
	if mode, _ := config.get("host_OpaqueRef:other"); mode != "RW" {
		t.Errorf("got sm_config %v, want another host with RW", config)
	}
	must(t, h, "VBD.unplug", root, second)
	if _, err := os.Lstat(h.LinkPath(s)); !os.IsNotExist(err) {
		t.Errorf("after the unplug: got %v, want no link", err)
	}
	config = must(t, h, "VDI.get_sm_config", root, ref).(structure)
	if _, found := config.get("host_" + h.host.ref); found {
		t.Errorf("after the unplug: got sm_config %v", config)
	}
}

// The device of a VDI with images shows the content of its disk: a link to a file, and a
// loop device.
func TestDeviceOfChain(t *testing.T) {
	t.Run("file", func(t *testing.T) { testDeviceOfChain(t, Config{}) })
	t.Run("loop", func(t *testing.T) {
		requireLoop(t)
		testDeviceOfChain(t, Config{Loop: true})
	})
}

func testDeviceOfChain(t *testing.T, cfg Config) {
	h, random := start(t, cfg), rand.NewChaCha8([32]byte{})
	disk := addVDI(t, h, VDISpec{VHD: true, Size: 8 * mib})
	write(t, h, disk, random, 3*mib, mib)
	s := snapshot(t, h, disk)
	want := content(t, h, disk)
	write(t, h, disk, random, mib, 0)
	root := h.NewSession(RoleRoot)
	vbd := createVBD(t, h, root, s)
	must(t, h, "VBD.plug", root, vbd)
	got, err := os.ReadFile(filepath.Join(h.DeviceDir(), h.VBDs()[0].Device))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device shows %d bytes that are not the snapshot's, %v", len(got), err)
	}
	must(t, h, "VBD.unplug", root, vbd)
}

func TestChainRefusals(t *testing.T) {
	h := start(t, Config{})
	for _, spec := range []VDISpec{
		{VHD: true, Size: mib}, {VHD: true, Size: 2 * mib, VirtualSize: mib}, {VHD: true, Image: os.DevNull}, {Size: mib, SR: "none"},
	} {
		if _, err := h.AddVDI(spec); err == nil {
			t.Errorf("AddVDI(%+v) succeeded", spec)
		}
	}
	disk := addVDI(t, h, VDISpec{VHD: true, Size: 2 * mib})
	for _, off := range []int64{-512, 1, 2 * mib} {
		if err := h.WriteVDI(disk, make([]byte, 512), off); err == nil {
			t.Errorf("writing at %d succeeded", off)
		}
	}
	for _, size := range []int64{mib, 3 * mib, 1 << 40} {
		if err := h.ResizeVDI(disk, size); err == nil {
			t.Errorf("resizing to %d bytes succeeded", size)
		}
	}
	root := h.NewSession(RoleRoot)
	ref := mustString(t, h, "VDI.get_by_uuid", root, disk)
	vbd := createVBD(t, h, root, disk)
	mustFail(t, h, []string{"VDI_IN_USE", ref, "destroy"}, "VDI.destroy", root, ref)
	must(t, h, "VBD.destroy", root, vbd)
	raw := mustString(t, h, "VDI.get_by_uuid", root, addVDI(t, h, VDISpec{}))
	mustFail(t, h, []string{"SR_OPERATION_NOT_SUPPORTED", h.sr.ref}, "VDI.snapshot", root, raw)
	mustFail(t, h, []string{"HANDLE_INVALID", "VDI", "gone"}, "VDI.snapshot", root, "gone", map[string]any{})
}

// Package allocation reads the images of an attached snapshot while the disk goes on and
// the garbage collector merges the images below: a block with data is never a hole.
func TestReadWhileCollecting(t *testing.T) {
	h, random := start(t, Config{}), rand.NewChaCha8([32]byte{})
	const size = 32 * mib
	disk := addVDI(t, h, VDISpec{VHD: true, Size: size})
	var older []string
	for block := range int64(6) { // each block is in an image of its own
		write(t, h, disk, random, 512, 2*block*vhdtest.BlockSize)
		older = append(older, snapshot(t, h, disk))
	}
	s := older[len(older)-1]
	want := content(t, h, s)
	root := h.NewSession(RoleRoot)
	vbd := createVBD(t, h, root, s)
	must(t, h, "VBD.plug", root, vbd)

	ctx, stop := context.WithCancel(t.Context())
	collected := make(chan error, 1)
	go func() {
		defer stop()
		var err error
		for i, snapshot := range older[:len(older)-1] {
			err = errors.Join(err, h.DestroyVDI(snapshot), h.WriteVDI(disk, make([]byte, 512), int64(2*i+1)*vhdtest.BlockSize))
			_, snapshotErr := h.SnapshotVDI(disk)
			err = errors.Join(err, snapshotErr, h.CollectGarbage())
		}
		collected <- err
	}()
	source := allocation.Source{Link: h.LinkPath(s), Key: s, MapperDir: filepath.Join(h.DeviceDir(), "mapper"), Size: size}
	known := 0
	for done := false; !done; {
		done = ctx.Err() != nil // once more when nothing changes any more
		set, err := allocation.Read(t.Context(), source)
		if err != nil {
			continue
		}
		known++
		for off := int64(0); off < size; off += vhdtest.BlockSize {
			hasData := len(bytes.Trim(want[off:off+vhdtest.BlockSize], "\x00")) > 0
			if in, _ := set.Run(off, 1); in != hasData {
				t.Fatalf("map %d: block at %d: in the map %t, has data %t", known, off, in, hasData)
			}
		}
	}
	if err := <-collected; err != nil || known == 0 {
		t.Errorf("got %d maps, and %v from the garbage collector", known, err)
	}
	checkChain(t, h, s)
	must(t, h, "VBD.unplug", root, vbd)
}
