package xapitest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"xapi-nbd/vdi/vhd/vhdtest"
)

// storage is the storage manager's state of a VDI. Host.mu guards it.
type storage struct {
	image      *vhdImage  // nil for a raw VDI and after data_destroy
	parent     *vdiObject // the base copy below image, or nil
	isBaseCopy bool       // only other images use it

	isSnapshot   bool
	snapshotOf   *vdiObject // nil also when that is gone
	snapshotTime time.Time
	smConfig     map[string]string // beside vhd-parent and host_<ref>, see smConfigOf

	log *cbtLog // nil without changed block tracking
}

// vhdImage is the file of a VHD image. It is opened for each access.
type vhdImage struct {
	path string
	id   [16]byte
	w    *vhdtest.Image
}

// ReadAt implements io.ReaderAt.
func (i *vhdImage) ReadAt(p []byte, off int64) (int, error) {
	f, err := os.Open(i.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(p, off)
}

// WriteAt implements io.WriterAt.
func (i *vhdImage) WriteAt(p []byte, off int64) (int, error) {
	f, err := os.OpenFile(i.path, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	n, err := f.WriteAt(p, off)
	return n, errors.Join(err, f.Close())
}

// spareEntries is how many blocks a disk can grow by: 2 GiB.
const spareEntries = 1024

// newImage makes the image of a VDI, without data. parent is nil or the base copy whose
// blocks the VDI has. h.mu is held.
func (h *Host) newImage(v, parent *vdiObject) error {
	img := &vhdImage{path: filepath.Join(h.mountDir(v), v.uuid+".vhd")}
	_, _ = rand.Read(img.id[:])                                     // never fails
	img.id[6], img.id[8] = img.id[6]&0x0f|0x40, img.id[8]&0x3f|0x80 // a random UUID of RFC 9562
	if err := os.MkdirAll(h.mountDir(v), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(img.path, nil, 0o644); err != nil {
		return err
	}
	o := vhdtest.Options{Size: v.size, UUID: img.id, ReservedEntries: int(v.size/vhdtest.BlockSize) + spareEntries}
	if parent != nil {
		o.Differencing, o.ParentUUID, o.ParentName = true, parent.image.id, filepath.Base(parent.image.path)
	}
	var err error
	img.w, err = vhdtest.Create(img, o)
	v.image, v.parent = img, parent
	return err
}

// mountDir is where the images of the VDI's SR are.
func (h *Host) mountDir(v *vdiObject) string { return filepath.Join(h.cfg.Dir, "sr-mount", v.sr.uuid) }

// LinkPath is the path of the link that SM keeps for a plugged VDI: it leads to the
// uppermost image.
func (h *Host) LinkPath(vdiUUID string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return ""
	}
	return h.linkPath(v)
}

func (h *Host) linkPath(v *vdiObject) string {
	return filepath.Join(h.DeviceDir(), "sm", "phy", v.sr.uuid, v.uuid)
}

// Chain returns the paths of the VHD images of a VDI, the uppermost first. It is empty
// for a raw VDI and after VDI.data_destroy.
func (h *Host) Chain(vdiUUID string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var paths []string
	for v := h.vdiByUUID(vdiUUID); v != nil && v.image != nil; v = v.parent {
		paths = append(paths, v.image.path)
	}
	return paths
}

// activate makes SM's link and then the device of a VBD. h.mu is held, and given up
// during the work.
func (h *Host) activate(b *vbdObject, v *vdiObject) (*device, error) {
	if err := h.link(v); err != nil {
		return nil, err
	}
	d, err := h.attachDevice(b, v)
	if err != nil {
		err = errors.Join(err, h.unlink(v))
	}
	return d, err
}

// link makes SM's link before the device of a VDI. h.mu is held.
func (h *Host) link(v *vdiObject) error {
	path, target := h.linkPath(v), v.Image
	if v.image != nil {
		target = v.image.path
	}
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = removeIfThere(path)
	}
	if err == nil {
		err = os.Symlink(target, path)
	}
	return err
}

// unlink removes SM's link when no VBD of the VDI is attached any more. h.mu is held.
func (h *Host) unlink(v *vdiObject) error {
	if h.attachedMode(v) != "" {
		return nil
	}
	return removeIfThere(h.linkPath(v))
}

// attachedMode is "RW" or "RO" as the VDI is attached, "" if it is not. h.mu is held.
func (h *Host) attachedMode(v *vdiObject) string {
	mode := ""
	for _, b := range h.vbdOrder {
		if b.vdi == v.ref && b.attached && mode != "RW" {
			mode = b.mode
		}
	}
	return mode
}

// smConfigOf is the sm_config of a VDI's record. h.mu is held.
func (h *Host) smConfigOf(v *vdiObject) map[string]string {
	config := map[string]string{}
	if v.parent != nil {
		config["vhd-parent"] = v.parent.uuid
	}
	if mode := h.attachedMode(v); mode != "" {
		config["host_"+h.host.ref] = mode
	}
	for key, value := range v.smConfig {
		config[key] = value
	}
	return config
}

// SetSMConfig sets a key of the VDI's sm_config, or removes it if value is empty. It
// overrides the keys that the host sets itself: "vhd-parent" and, while a VBD is attached,
// "host_<ref of the host>". An unknown uuid is ignored.
func (h *Host) SetSMConfig(vdiUUID, key, value string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	switch {
	case v == nil:
	case value == "":
		delete(v.smConfig, key)
	default:
		if v.smConfig == nil {
			v.smConfig = map[string]string{}
		}
		v.smConfig[key] = value
	}
}

// WriteVDI writes to a VDI as the guest of a VM does. p and off are multiples of 512
// bytes. Tracked blocks are marked as changed, blocks that the VHD image of the VDI does
// not have are added to it, and devices of the VDI show the new content.
func (h *Host) WriteVDI(vdiUUID string, p []byte, off int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return fmt.Errorf("xapitest: no VDI %s", vdiUUID)
	}
	return v.write(p, off)
}

// write is WriteVDI; Host.mu is held.
func (v *vdiObject) write(p []byte, off int64) error {
	switch {
	case off < 0 || off+int64(len(p)) > v.size || (off|int64(len(p)))%512 != 0:
		return fmt.Errorf("xapitest: writing %d bytes at %d to VDI %s: not within it, or not whole sectors", len(p), off, v.uuid)
	case v.VHD && v.image == nil:
		return fmt.Errorf("xapitest: VDI %s has no data", v.uuid)
	}
	if v.log != nil {
		v.log.mark(off, int64(len(p)))
	}
	if v.image != nil {
		if err := v.image.w.WriteSectors(p, off); err != nil {
			return fmt.Errorf("xapitest: writing to VDI %s: %w", v.uuid, err)
		}
	}
	f, err := os.OpenFile(v.Image, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("xapitest: writing to VDI %s: %w", v.uuid, err)
	}
	_, err = f.WriteAt(p, off)
	return errors.Join(err, f.Close())
}

// growImage gives the VHD image of a VDI another size. h.mu is held.
func (v *vdiObject) growImage(size int64) error {
	switch {
	case size < v.size, size%vhdtest.BlockSize != 0:
		return errors.New("a VHD grows by blocks of 2 MiB")
	case size/vhdtest.BlockSize > v.image.w.Entries():
		return errors.New("the table of the VHD has no room")
	}
	if v.log != nil {
		v.log.grow(size)
	}
	return v.image.w.SetSize(size)
}

// deleteImage deletes the image of a VDI. h.mu is held.
func (v *vdiObject) deleteImage() error {
	if v.image == nil {
		return nil
	}
	err := os.Remove(v.image.path)
	if errors.Is(err, fs.ErrNotExist) { // a test has done it
		err = nil
	}
	v.image, v.parent = nil, nil
	return err
}
