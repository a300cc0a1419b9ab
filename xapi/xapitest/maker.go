package xapitest

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// DeviceSpec describes the device that a DeviceMaker makes.
type DeviceSpec struct {
	Name       string // the text of VBD.device
	VDI        string // uuid
	Image      string // path of the file with the data
	SectorSize int    // 512 or 4096
	ReadOnly   bool
}

// DeviceMaker makes a device of another kind than the host's, such as a block device of Xen.
// node is its path. remove removes it and returns when it no longer exists; it may be called
// again after an error. The host makes and removes the link to the node in its device
// directory.
//
// remove is not called while a process has the device open, except under StyleNBD, where
// remove waits for the openers. The maker maintains the files in SysDir and NBDDir.
type DeviceMaker func(ctx context.Context, spec DeviceSpec) (node string, remove func(context.Context) error, err error)

// madeDevice is a device that a DeviceMaker has made.
type madeDevice struct {
	node   string
	rdev   uint64 // 0 if it is not a block device
	remove func(context.Context) error
}

// makeByMaker calls the configured maker. h.mu is not held.
func (h *Host) makeByMaker(d *device, v *vdiObject, readOnly bool) (*madeDevice, error) {
	node, remove, err := h.cfg.Maker(h.ctx, DeviceSpec{
		Name: d.name, VDI: v.uuid, Image: v.Image, SectorSize: v.SectorSize, ReadOnly: readOnly,
	})
	if err != nil {
		return nil, fmt.Errorf("making %s: %w", d.name, err)
	}
	made := &madeDevice{node: node, remove: remove}
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		_ = remove(h.ctx) // the first error is the one to report
		return nil, fmt.Errorf("making %s: stat %s: %w", d.name, node, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		made.rdev = uint64(st.Rdev)
	}
	return made, nil
}

// opener returns the id of a process that has the device open, or 0.
func (m *madeDevice) opener() (int, error) {
	if m.rdev == 0 {
		return openerOfFile(m.node)
	}
	return openerOfBlock(m.rdev, -1) // the host has none open itself
}
