package xapitest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// nbdDevices is the number of devices with which xapi's helper loads the kernel's module.
const nbdDevices = 24

// bindings counts the bindings of all hosts in this process: two hosts, one
// after the other, may have the same directory.
var bindings atomic.Int64

// helperError is the error text of the program with which xapi binds nbd devices.
type helperError string

func (e helperError) Error() string { return string(e) }

// nbdNode has the files of a bound nbdN outside the device directory.
type nbdNode struct {
	pid  string // path of the kernel's file
	info string // path of the file in which the helper notes the binding
	temp string // path for a new version of info
}

func (h *Host) nbdNode(name string) *nbdNode {
	return &nbdNode{
		pid:  filepath.Join(h.SysDir(), "block", name, "pid"),
		info: filepath.Join(h.NBDDir(), strings.TrimPrefix(name, "nbd")),
		temp: filepath.Join(h.cfg.Dir, name+".new"),
	}
}

func nbdName(n int) string { return "nbd" + strconv.Itoa(n) }

// prepareNBD makes the directories that are there even if nothing is bound, and
// removes the files of an earlier run.
func (h *Host) prepareNBD() error {
	if err := os.MkdirAll(h.NBDDir(), 0o755); err != nil {
		return err
	}
	for n := range nbdDevices {
		node := h.nbdNode(nbdName(n))
		if err := os.MkdirAll(filepath.Dir(node.pid), 0o755); err != nil {
			return err
		}
		if err := node.unbind(); err != nil {
			return err
		}
	}
	return nil
}

// bind writes the files of a new binding, and replaces an old one.
func (n *nbdNode) bind(path, exportName string) error {
	// In place, as the kernel's file: a descriptor of it shows the change.
	if err := os.WriteFile(n.pid, fmt.Appendf(nil, "%d\n", bindings.Add(1)), 0o644); err != nil {
		return err
	}
	info, err := json.Marshal(struct {
		Path       string `json:"path"`
		ExportName string `json:"exportname"`
	}{path, exportName})
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.temp, info, 0o644); err != nil {
		return err
	}
	return os.Rename(n.temp, n.info)
}

// unbind removes the files of the binding. It may be called again.
func (n *nbdNode) unbind() error {
	// The kernel's file cannot be read any more, by a descriptor of it either.
	if err := os.Truncate(n.pid, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(removeIfThere(n.info), removeIfThere(n.pid), removeIfThere(n.temp))
}

// tapdiskSocket returns the path of the NBD server of a VDI on a host. No process listens
// there.
func (h *Host) tapdiskSocket(v *vdiObject) string {
	return filepath.Join(h.cfg.Dir, "run", "blktap-control", "nbd", v.sr.uuid, v.uuid)
}

// freeNBD returns the name for a new device. h.mu is held.
func (h *Host) freeNBD() (string, error) {
	for range 2 {
		for n := range nbdDevices {
			if h.devices[nbdName(n)] == nil {
				return nbdName(n), nil
			}
		}
		h.reclaim()
	}
	return "", helperError("no free nbd device")
}

// reclaim removes the devices that Rebind gave to another VDI, except open ones. h.mu is
// held.
func (h *Host) reclaim() {
	for name, d := range h.devices {
		if !d.lost {
			continue
		}
		if pid, err := d.opener(); pid == 0 && err == nil && d.remove(h.ctx) == nil {
			delete(h.devices, name)
		}
	}
}

// Rebind simulates, under StyleNBD with Loop, that another client unplugs the VBD with uuid
// vbdUUID, which must be attached and RO, and plugs another VDI, which gets the same device.
// First the files under SysDir and NBDDir change, then the data of the device, for all its
// descriptors, to that of the file image, which must have the same size. If image is that of
// a VDI, the file in NBDDir names that VDI, else one that does not exist. Then the VBD is
// detached.
//
// The other VDI keeps the device until Close, or until it is not open and all other devices
// are in use.
func (h *Host) Rebind(vbdUUID, image string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.rebind(vbdUUID, image); err != nil {
		return fmt.Errorf("xapitest: rebinding the device of VBD %s: %w", vbdUUID, err)
	}
	return nil
}

// rebind is Rebind with h.mu held.
func (h *Host) rebind(vbdUUID, image string) error {
	b := h.vbdByUUID(vbdUUID)
	if b == nil {
		return errors.New("no such VBD")
	}
	b, end, err := h.begin(b.ref, "unplug")
	if err != nil {
		return err
	}
	defer end()
	d := h.devices[b.device]
	switch {
	case !b.attached || d == nil:
		return errors.New("it is not attached")
	case d.nbd == nil || d.loop == nil:
		return errors.New("it is neither called nbdN nor a loop device, or not both")
	}
	file, path, err := openImage(image, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(file)
	if err := d.loop.accepts(file); err != nil {
		return err
	}
	other := h.vdiOfImage(image)
	if err := d.nbd.bind(h.tapdiskSocket(other), other.uuid); err != nil {
		return err
	}
	if err := d.loop.change(file, path); err != nil {
		return err
	}
	d.lost, b.attached = true, false // the other's VBD has no record
	h.happened(b, "unplugged")
	return nil
}

// vdiOfImage returns the VDI with that image, or one that the host does not have.
func (h *Host) vdiOfImage(image string) *vdiObject {
	if path, err := filepath.Abs(image); err == nil {
		for _, v := range h.vdis {
			if v.Image == path {
				return v
			}
		}
	}
	return &vdiObject{object: newObject(), sr: &h.sr}
}
