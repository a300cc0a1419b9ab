package xapitest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	// inUseTimeout is the time for which unplug waits for an opener before it is refused:
	// udev opens a device for a moment, and so does a child between fork and exec.
	inUseTimeout = 250 * time.Millisecond
	// goneTimeout is the time for which unplug waits until the kernel has removed a loop
	// device whose last descriptor is closed. A read in progress delays that.
	goneTimeout = 10 * time.Second
	pollEvery   = 10 * time.Millisecond
)

// device is a name in the device directory and its target.
type device struct {
	name  string // the text of VBD.device
	link  string // path of the symlink
	image string
	loop  *loopDevice // nil in file mode
	nbd   *nbdNode    // nil but under StyleNBD
	made  *madeDevice // nil without Config.Maker
	users int         // attached VBDs: more than one only under StyleSM
	lost  bool        // Rebind gave it to another VDI
}

// attachDevice makes the device of a VBD that is being attached. h.mu is held, and unlocked
// during the work; the operation of the VDI excludes others.
func (h *Host) attachDevice(b *vbdObject, v *vdiObject) (*device, error) {
	name, err := h.deviceName(b, v)
	if err != nil {
		return nil, err
	}
	if d := h.devices[name]; d != nil {
		d.users++
		return d, nil
	}
	d := &device{name: name, link: filepath.Join(h.DeviceDir(), filepath.FromSlash(name)), image: v.Image, users: 1}
	if h.cfg.Style == StyleNBD && h.cfg.Maker == nil {
		d.nbd = h.nbdNode(name)
	}
	h.devices[name] = d // reserves the name
	h.mu.Unlock()
	err = h.makeDevice(d, v, b.mode == "RO")
	h.mu.Lock()
	if err == nil && h.closed { // Close may have run meanwhile
		err = errors.Join(net.ErrClosed, d.remove(context.Background()))
	}
	if err != nil {
		delete(h.devices, name)
		return nil, err
	}
	return d, nil
}

func (h *Host) deviceName(b *vbdObject, v *vdiObject) (string, error) {
	switch h.cfg.Style {
	case StyleSM:
		return "sm/backend/" + v.sr.uuid + "/" + v.uuid, nil
	case StyleNBD:
		return h.freeNBD()
	default:
		return xvdName(b.slot), nil
	}
}

func (h *Host) makeDevice(d *device, v *vdiObject, readOnly bool) error {
	fi, err := os.Stat(d.image)
	if err != nil {
		return err
	}
	target := d.image
	switch {
	case h.cfg.Maker != nil:
		if d.made, err = h.makeByMaker(d, v, readOnly); err != nil {
			return err
		}
		target = d.made.node
	case h.cfg.Loop:
		if fi.Size()%int64(v.SectorSize) != 0 {
			return fmt.Errorf("the image has %d bytes, not a multiple of %d: a loop device would drop the tail", fi.Size(), v.SectorSize)
		}
		if d.loop, err = newLoop(d.image, readOnly, v.SectorSize); err != nil {
			return err
		}
		target = d.loop.path
	}
	err = os.MkdirAll(filepath.Dir(d.link), 0o755)
	if err == nil {
		err = removeIfThere(d.link) // an earlier run may have left it
	}
	if err == nil {
		err = os.Symlink(target, d.link)
	}
	if err == nil && d.nbd != nil {
		err = d.nbd.bind(h.tapdiskSocket(v), v.uuid)
	}
	if err != nil {
		_ = d.disconnect() // the first error is the one to report
		switch {
		case d.loop != nil:
			d.loop.release()
		case d.made != nil:
			_ = d.made.remove(h.ctx)
		}
	}
	return err
}

// detachDevice removes a device, unless another attached VBD uses it. h.mu is held, and
// unlocked during the work.
func (h *Host) detachDevice(name string) error {
	d := h.devices[name]
	switch {
	case d == nil: // xapi has no record of a data path: success
		return nil
	case d.users > 1:
		d.users--
		return nil
	}
	shared := false // descriptors on a shared image cannot be told apart
	for _, other := range h.devices {
		shared = shared || d.loop == nil && d.made == nil && other != d && other.image == d.image
	}
	h.mu.Unlock()
	err := h.takeDown(d, shared)
	h.mu.Lock()
	if err == nil {
		delete(h.devices, name)
	}
	return err
}

// takeDown removes a device. It refuses an open one, except under StyleNBD: there it
// disconnects the device and then waits for its openers. h.mu is not held.
func (h *Host) takeDown(d *device, shared bool) error {
	patience := inUseTimeout
	if d.nbd != nil {
		if err := d.disconnect(); err != nil {
			return err
		}
		h.mu.Lock()
		h.notify()
		h.mu.Unlock()
		patience = h.cfg.NBDUnplugWait
	}
	disconnects := d.made != nil && h.cfg.Style == StyleNBD // even if it is open
	if !shared && !disconnects {
		var pid int
		err := poll(h.ctx, patience, func() (done bool, err error) {
			pid, err = d.opener()
			return pid == 0, err
		})
		switch {
		case err == nil:
		case !errors.Is(err, context.DeadlineExceeded):
			return err
		case d.nbd != nil:
			return helperError(fmt.Sprintf("%s is still connected (opened by pid %d)", d.name, pid))
		default:
			return fmt.Errorf("device is in use (opened by pid %d)", pid)
		}
	}
	return d.remove(h.ctx)
}

// opener returns the id of a process that has the device open, or 0.
func (d *device) opener() (int, error) {
	switch {
	case d.made != nil:
		return d.made.opener()
	case d.loop != nil:
		return openerOfBlock(d.loop.rdev, d.loop.fd)
	default:
		return openerOfFile(d.image)
	}
}

// disconnect removes the link and the files of the device; open descriptors stay. It may be
// called again.
func (d *device) disconnect() error {
	if d.nbd != nil {
		if err := d.nbd.unbind(); err != nil {
			return err
		}
	}
	return removeIfThere(d.link)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// remove disconnects the device and removes the loop device or the made one. It may be
// called again.
func (d *device) remove(ctx context.Context) error {
	if err := d.disconnect(); err != nil {
		return err
	}
	switch {
	case d.made != nil:
		return d.made.remove(ctx)
	case d.loop == nil:
		return nil
	}
	d.loop.release()
	err := poll(ctx, goneTimeout, func() (bool, error) { return d.loop.gone(), nil })
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("device is in use (%s does not go away)", d.loop.path)
	}
	return err
}

// poll calls done until it returns true or an error, or ctx ends. After limit it returns
// context.DeadlineExceeded. It polls because the kernel sends no event.
func poll(ctx context.Context, limit time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			// The last call may have been a while ago.
			if ok, err := done(); ok || err != nil {
				return err
			}
			return ctx.Err()
		}
	}
}
