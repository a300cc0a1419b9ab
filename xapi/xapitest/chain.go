package xapitest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/vdi/vhd/vhdtest"
)

// SnapshotVDI is VDI.snapshot by another client of xapi and returns the uuid of the
// snapshot. As SM does, it renames the VDI's image to that of a base copy and makes two
// new images on top of it, without data: one for the VDI and one for the snapshot.
func (h *Host) SnapshotVDI(vdiUUID string) (uuid string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return "", fmt.Errorf("xapitest: no VDI %s", vdiUUID)
	}
	s, err := h.snapshotVDI(v.ref)
	if err != nil {
		return "", describe(err)
	}
	return s.uuid, nil
}

// snapshotVDI is VDI.snapshot. h.mu is held, and unlocked while it waits.
func (h *Host) snapshotVDI(ref string) (*vdiObject, error) {
	v, unlock, err := h.lockStorage(ref)
	if err != nil {
		return nil, err
	}
	defer unlock()
	switch {
	case v.NoPBD:
		return nil, fail("SR_HAS_NO_PBDS", v.sr.ref)
	case v.Unmanaged:
		return nil, fail("VDI_NOT_MANAGED", v.ref)
	case v.image == nil:
		return nil, fail("SR_OPERATION_NOT_SUPPORTED", v.sr.ref)
	}
	s := &vdiObject{object: newObject(), VDISpec: v.VDISpec, sr: v.sr, size: v.size}
	s.isSnapshot, s.snapshotOf, s.snapshotTime = true, v, time.Now()
	s.VMName = "" // the guest has the disk, not the snapshot
	s.Image = filepath.Join(h.imageDir(), s.uuid+".raw")
	if err := copySparse(s.Image, v.Image); err != nil {
		return nil, storageFailure(err)
	}
	if err := h.splitImage(v, s); err != nil {
		return nil, storageFailure(err)
	}
	h.vdis[s.ref] = s
	if v.log != nil {
		v.snapshotLog(s)
	}
	return s, nil
}

// splitImage makes a base copy of the image of v, and images for v and its snapshot s on
// top of it. The steps are those of SM. h.mu is held.
func (h *Host) splitImage(v, s *vdiObject) error {
	base := &vdiObject{object: newObject(), sr: v.sr, size: v.size, VDISpec: VDISpec{
		Type: v.Type, NameLabel: "base copy", SectorSize: v.SectorSize, Unmanaged: true, VHD: true,
	}}
	base.image, base.parent, base.isBaseCopy = v.image, v.parent, true
	path := filepath.Join(h.mountDir(v), base.uuid+".vhd")
	if err := os.Rename(v.image.path, path); err != nil {
		return err
	}
	base.image.path = path
	h.vdis[base.ref] = base
	return errors.Join(h.newImage(v, base), h.newImage(s, base), base.image.w.SetHidden(true))
}

// DestroyVDI is VDI.destroy by another client of xapi. The blocks of the VDI's base copy
// stay until CollectGarbage.
func (h *Host) DestroyVDI(vdiUUID string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return fmt.Errorf("xapitest: no VDI %s", vdiUUID)
	}
	return describe(h.destroyVDI(v.ref))
}

// destroyVDI is VDI.destroy; h.mu is held, and unlocked while it waits. Unlike xapi it
// refuses a VDI with detached VBDs too.
func (h *Host) destroyVDI(ref string) error {
	v, unlock, err := h.lockStorage(ref)
	if err != nil {
		return err
	}
	defer unlock()
	switch {
	case v.Unmanaged:
		return fail("VDI_NOT_MANAGED", v.ref)
	case len(h.vbdsOf(v)) > 0:
		return fail("VDI_IN_USE", v.ref, "destroy")
	}
	v.dropLog(true)
	if err := v.deleteImage(); err != nil {
		return storageFailure(err)
	}
	for _, other := range h.vdis {
		if other.snapshotOf == v {
			other.snapshotOf = nil
		}
	}
	delete(h.vdis, v.ref)
	return nil
}

// lockStorage finds a VDI and marks it and its SR as being worked on. While another
// operation has one of the marks it waits. h.mu is held, and unlocked while it waits.
func (h *Host) lockStorage(ref string) (v *vdiObject, unlock func(), err error) {
	for {
		v = h.vdis[ref]
		if v == nil {
			return nil, nil, handleInvalid("VDI", ref)
		}
		if !v.busy && !v.sr.busy && v.operation == "" {
			v.busy, v.sr.busy = true, true
			return v, func() {
				v.busy, v.sr.busy = false, false
				h.notify()
			}, nil
		}
		if !h.waitChange(h.ctx) {
			return nil, nil, errDropped
		}
	}
}

// CollectGarbage does all that SM's garbage collector can do: it deletes base copies
// that nothing uses, merges a base copy into its parent if that has no other child, and
// merges the image of a VDI into a base copy that nothing else uses. The content of
// VDIs stays.
func (h *Host) CollectGarbage() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		done, err := h.collectOne()
		if err != nil {
			return fmt.Errorf("xapitest: collecting garbage: %w", err)
		}
		if !done {
			return nil
		}
	}
}

// collectOne does one step of the garbage collector, if there is one to do.
func (h *Host) collectOne() (done bool, err error) {
	for _, v := range h.vdis {
		if v.image == nil {
			continue
		}
		children, onlyChild := h.childrenOf(v), v.parent != nil && len(h.childrenOf(v.parent)) == 1
		switch {
		case v.isBaseCopy && len(children) == 0:
			delete(h.vdis, v.ref)
			return true, v.deleteImage()
		case v.isBaseCopy && onlyChild:
			return true, h.coalesce(v, children)
		case onlyChild:
			return true, h.leafCoalesce(v)
		}
	}
	return false, nil
}

func (h *Host) childrenOf(v *vdiObject) []*vdiObject {
	var children []*vdiObject
	for _, other := range h.vdis {
		if other.parent == v {
			children = append(children, other)
		}
	}
	return children
}

// coalesce merges a base copy into its parent, gives its children that parent, and
// deletes it.
func (h *Host) coalesce(v *vdiObject, children []*vdiObject) error {
	p := v.parent
	if err := copyBlocks(p, v); err != nil {
		return err
	}
	for _, child := range children {
		if err := child.image.w.SetParent(p.image.id, filepath.Base(p.image.path), func() {}); err != nil {
			return err
		}
		child.parent = p
	}
	delete(h.vdis, v.ref)
	return v.deleteImage()
}

// leafCoalesce merges the image of a VDI into the base copy below, which becomes the
// image of the VDI.
func (h *Host) leafCoalesce(v *vdiObject) error {
	p := v.parent
	if err := copyBlocks(p, v); err != nil {
		return err
	}
	path, old := v.image.path, filepath.Join(h.mountDir(v), "OLD_"+v.uuid+".vhd")
	err := os.Rename(path, old)
	if err == nil {
		err = os.Rename(p.image.path, path)
	}
	if err != nil {
		return err
	}
	p.image.path = path
	v.image, v.parent = p.image, p.parent
	delete(h.vdis, p.ref)
	return errors.Join(v.image.w.SetHidden(false), os.Remove(old))
}

// copyBlocks copies the blocks of an image to that below, which it makes as large first.
func copyBlocks(to, from *vdiObject) error {
	if to.size < from.size {
		if err := to.growImage(from.size); err != nil {
			return err
		}
		to.size = from.size
	}
	for block := range from.size / vhdtest.BlockSize {
		if err := from.image.w.EachRun(block, to.image.w.WriteSectors); err != nil {
			return err
		}
	}
	return nil
}

// copySparse copies a file and leaves its holes out.
func copySparse(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	err = dst.Truncate(fi.Size())
	for off := int64(0); err == nil; {
		data, seekErr := src.Seek(off, unix.SEEK_DATA)
		if errors.Is(seekErr, unix.ENXIO) { // no data behind off
			break
		}
		hole, holeErr := src.Seek(data, unix.SEEK_HOLE)
		if err = errors.Join(seekErr, holeErr); err == nil {
			_, err = io.Copy(io.NewOffsetWriter(dst, data), io.NewSectionReader(src, data, hole-data))
		}
		off = hole
	}
	return errors.Join(err, dst.Close())
}

// snapshotOfRef is snapshot_of in the record of a VDI.
func (v *vdiObject) snapshotOfRef() string {
	if v.snapshotOf == nil {
		return nullRef
	}
	return v.snapshotOf.ref
}

// snapshotsOf is snapshots in the record of a VDI. h.mu is held.
func (h *Host) snapshotsOf(v *vdiObject) array {
	refs := array{}
	for _, other := range h.vdis {
		if other.snapshotOf == v {
			refs = append(refs, other.ref)
		}
	}
	return refs
}

// takenAt returns snapshot_time of the record of a VDI: the epoch if it is not a snapshot.
func (v *vdiObject) takenAt() time.Time {
	if !v.isSnapshot {
		return time.Unix(0, 0)
	}
	return v.snapshotTime
}
