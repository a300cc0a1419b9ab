package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"xapi-nbd/xapi/xapitest"
)

// XenBlock attaches disks to domain 0 through Xen, as a host with
// force_loopback_vbd does: the kernel's block backend serves a loop device to the
// kernel's block frontend in the same domain. It writes
// the keys of the toolstack to xenstore.
type XenBlock struct{ store *xenstore }

// NewXenBlock connects to xenstored. The caller must Close it.
func NewXenBlock() (*XenBlock, error) {
	store, err := openXenstore()
	if err != nil {
		return nil, err
	}
	return &XenBlock{store}, nil
}

// Close ends the connection to xenstored.
func (x *XenBlock) Close() error { return x.store.close() }

// The states of a device's two ends that are needed, in xenstore's digits.
const (
	xenInitialising = "1"
	xenClosing      = "5"
	xenClosed       = "6"
)

// Make implements [xapitest.DeviceMaker].
func (x *XenBlock) Make(ctx context.Context, spec xapitest.DeviceSpec) (string, func(context.Context) error, error) {
	number, err := xenDeviceNumber(spec.Name)
	if err != nil {
		return "", nil, err
	}
	d := &xenDisk{
		store:    x.store,
		node:     "/dev/" + spec.Name,
		frontend: fmt.Sprintf("/local/domain/0/device/vbd/%d", number),
		backend:  fmt.Sprintf("/local/domain/0/backend/vbd/0/%d", number),
	}
	if d.loop, err = attachLoop(ctx, spec.Image, spec.ReadOnly, spec.SectorSize); err != nil {
		return "", nil, err
	}
	if err := d.attach(ctx, number, spec); err != nil {
		return "", nil, errors.Join(err, d.remove(context.WithoutCancel(ctx)))
	}
	return d.node, d.remove, nil
}

// xenDeviceNumber is Xen's number of a disk: xvd's major number and a minor for
// the disk, with 15 more for its partitions. Disks behind xvdp have other numbers.
func xenDeviceNumber(name string) (int, error) {
	letter, ok := strings.CutPrefix(name, "xvd")
	if !ok || len(letter) != 1 || letter[0] < 'a' || letter[0] > 'p' {
		return 0, fmt.Errorf("%q is none of xvda to xvdp", name)
	}
	return 202<<8 | int(letter[0]-'a')<<4, nil
}

// xenDisk is a disk of domain 0.
type xenDisk struct {
	store             *xenstore
	node, loop        string
	frontend, backend string // paths in xenstore
}

// attach writes the keys with which the kernel attaches the disk, and waits until it has.
func (d *xenDisk) attach(ctx context.Context, number int, spec xapitest.DeviceSpec) error {
	var st unix.Stat_t
	if err := unix.Stat(d.loop, &st); err != nil {
		return &os.PathError{Op: "stat", Path: d.loop, Err: err}
	}
	mode := "w"
	if spec.ReadOnly {
		mode = "r"
	}
	// Each end is read when its state appears, so the state is written last.
	err := d.store.writeAll(d.backend,
		entry{"frontend", d.frontend}, entry{"frontend-id", "0"}, entry{"online", "1"},
		entry{"removable", "0"}, entry{"bootable", "0"}, entry{"dev", spec.Name},
		entry{"type", "phy"}, entry{"mode", mode}, entry{"device-type", "disk"},
		entry{"params", d.loop}, entry{"state", xenInitialising})
	if err == nil {
		err = d.store.writeAll(d.frontend,
			entry{"backend", d.backend}, entry{"backend-id", "0"},
			entry{"virtual-device", strconv.Itoa(number)}, entry{"device-type", "disk"},
			entry{"state", xenInitialising})
	}
	if err == nil { // as a udev script does on a host
		err = d.store.writeAll(d.backend,
			entry{"physical-device", fmt.Sprintf("%x:%x", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))},
			entry{"hotplug-status", "connected"})
	}
	if err != nil {
		return err
	}
	return waitSize(ctx, d.node, spec.Image)
}

// waitSize waits until a device is as large as the image behind it. It is empty
// until it is connected.
func waitSize(ctx context.Context, node, image string) error {
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	size := int64(0)
	err = waitFor(ctx, node+" to appear", func() (bool, error) {
		f, err := os.Open(node)
		if err != nil {
			return false, nil
		}
		defer f.Close()
		size, err = f.Seek(0, io.SeekEnd)
		return size > 0, err
	})
	if err == nil && size != st.Size() {
		err = fmt.Errorf("%s has %d bytes, its image %d", node, size, st.Size())
	}
	return err
}

// remove detaches the disk and waits until it is gone. The frontend's entries
// must stay until the backend has closed: without them it waits for ever, and so does the
// next attach of a disk with this number.
func (d *xenDisk) remove(ctx context.Context) error {
	if _, err := d.store.read(d.backend + "/state"); err == nil {
		if err := d.store.writeAll(d.backend, entry{"online", "0"}, entry{"state", xenClosing}); err != nil {
			return err
		}
		err := waitFor(ctx, d.backend+" to close", func() (bool, error) {
			state, err := d.store.read(d.backend + "/state")
			return state == xenClosed, err
		})
		if err != nil {
			return err
		}
	} else if !errors.Is(err, errNoEntry) {
		return err
	}
	if err := errors.Join(d.store.remove(d.frontend), d.store.remove(d.backend)); err != nil {
		return err
	}
	if err := waitGone(ctx, filepath.Join("/sys/block", filepath.Base(d.node))); err != nil {
		return err
	}
	return detachLoop(ctx, d.loop)
}
