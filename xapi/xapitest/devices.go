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
	// inUsePatience is for how long an opener is given time to go before unplug
	// is refused: a device is opened for moments by udev, and by a child between
	// fork and exec.
	inUsePatience = 250 * time.Millisecond
	// goneLimit is for how long unplug waits for the kernel to take a loop device
	// down after its last descriptor was closed, which a read under way delays.
	goneLimit = 10 * time.Second
	pollEvery = 10 * time.Millisecond
)

// device is a name under the device directory and what it leads to.
type device struct {
	name  string // the text of VBD.device
	link  string // path of the symlink
	image string
	loop  *loopDevice // nil in file mode
	nbd   *nbdNode    // nil but under StyleNBD
	made  *madeDevice // nil without Config.Maker
	users int         // attached VBDs: more than one only under StyleSM
	lost  bool        // Rebind gave it to somebody else
}

// attachDevice makes the device of a VBD that is about to be attached. h.mu is
// held, and given up during the work; the VDI's mark keeps others away.
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
	h.devices[name] = d // takes the name
	h.mu.Unlock()
	err = h.makeDevice(d, v, b.mode == "RO")
	h.mu.Lock()
	if err == nil && h.closed { // Close may have passed by already
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
		err = removeIfThere(d.link) // a run before this one may have left it
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

// detachDevice takes a device down, unless another attached VBD uses it. h.mu is
// held, and given up during the work.
func (h *Host) detachDevice(name string) error {
	d := h.devices[name]
	switch {
	case d == nil: // xapi has no data path on record: trivial success
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

// takeDown refuses to take an open device down, save under StyleNBD: there it is
// disconnected first, and then its openers are waited for. h.mu is not held.
func (h *Host) takeDown(d *device, shared bool) error {
	patience := inUsePatience
	if d.nbd != nil {
		if err := d.disconnect(); err != nil {
			return err
		}
		h.mu.Lock()
		h.notify()
		h.mu.Unlock()
		patience = h.cfg.NBDUnplugWait
	}
	disconnects := d.made != nil && h.cfg.Style == StyleNBD // whoever has it open
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

// disconnect takes away all that shows the device; descriptors of it stay. It
// may be repeated.
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

// remove disconnects the device and takes away what was made for it. It may be repeated.
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
	err := poll(ctx, goneLimit, func() (bool, error) { return d.loop.gone(), nil })
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("device is in use (%s does not go away)", d.loop.path)
	}
	return err
}

// poll asks done until it says yes or fails, or ctx ends, or limit has passed,
// which gives context.DeadlineExceeded. The kernel has no notice to wait for.
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
			// Nobody may have looked for a while.
			if ok, err := done(); ok || err != nil {
				return err
			}
			return ctx.Err()
		}
	}
}
