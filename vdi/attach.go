package vdi

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// attach creates the VBD, records it, plugs it and opens its device, in this order; the
// package documentation says why. If it fails, detach undoes the steps that succeeded.
func (a *attachment) attach(ctx context.Context, s *xapi.Session) error {
	h, err := readInventory(ctx, a.m.cfg.Inventory)
	if err != nil {
		return err
	}
	if err := a.m.holdHost(ctx, h); err != nil {
		return err
	}
	if err := a.findVDI(ctx); err != nil {
		return err
	}
	a.changed = a.listChanged(ctx, s)
	dom0, err := a.m.controlDomain(ctx, s, h)
	if err != nil {
		return err
	}
	a.vm.dom0 = dom0
	check := a.checkExclusive // nothing is plugged that must not be written
	if !a.isWritable() {
		check = a.checkOtherWriters
	}
	if err := check(ctx); err != nil {
		return err
	}
	spec := xapi.VBDSpec{VM: dom0, VDI: a.vdiRef, Write: a.isWritable(), OtherConfig: newTag(h.Installation, a.nonce, a.m.owner)}
	if err := a.create(ctx, s, spec); err != nil {
		return err
	}
	a.move(plugging)
	if err := a.plug(ctx, s); err != nil {
		return err
	}
	a.move(opening)
	if err := a.open(ctx, s); err != nil || !a.isWritable() {
		return err
	}
	// Somebody may have begun to use the VDI since the first check.
	began := a.guard.now()
	if err := a.checkExclusive(ctx); err != nil {
		return err
	}
	a.guard.confirm(began)
	a.helpers.Go(func() {
		<-a.ready // before, the attachment cannot be ended
		a.keepGuarding(a.checkExclusive)
	})
	return nil
}

// findVDI asks xapi for the ref of the VDI, with the local session, and stores the epoch
// of that session. The client's session was valid before this call. So when the epoch has
// ended, xapi has restarted since and the client's session is invalid: xapi cannot execute
// a call made with it from now on. See removal.cannotExecute.
func (a *attachment) findVDI(ctx context.Context) error {
	err := a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
		a.vdiRef, err = local.VDIByUUID(ctx, a.vdi)
		return err
	})
	if err != nil {
		return err
	}
	a.epoch, err = a.m.cfg.Local.Epoch(ctx)
	return err
}

// create makes the VBD and its entries in the state folder. The nonce is durable before
// VBD.create is called: xapi may execute the call after this process has ended.
func (a *attachment) create(ctx context.Context, s *xapi.Session, spec xapi.VBDSpec) error {
	// Set even if addCreate fails: the rename may have happened although the sync failed.
	a.recorded, a.created = true, time.Now()
	if err := a.m.journal.addCreate(pendingCreate{a.nonce, a.created, a.vdi}); err != nil {
		return err
	}
	ref, err := s.CreateVBD(ctx, spec)
	a.mayExist = err == nil || answerLost(err)
	if errors.Is(err, xapi.HandleInvalid) {
		a.m.rememberControlDomain(controlDomain{})
	}
	if err != nil {
		return err
	}
	a.vbd = ref
	a.move(recording)
	uuid, err := s.VBDUUID(ctx, ref)
	if err != nil {
		return err
	}
	a.m.mu.Lock()
	a.vbdUUID = uuid
	a.m.mu.Unlock()
	if err := a.m.journal.add(uuid); err != nil {
		return err
	}
	if err := a.m.journal.forgetCreate(a.nonce); err != nil {
		return err
	}
	a.log.Info("VBD created", "vbd", uuid)
	return nil
}

// plug plugs the VBD. If the connection to xapi breaks before the response, xapi still
// completes the plug, so plug polls the VBD's record until the operation is over.
func (a *attachment) plug(ctx context.Context, s *xapi.Session) error {
	err := s.PlugVBD(ctx, a.vbd)
	if !answerLost(err) {
		return err
	}
	a.log.Warn("the answer to VBD.plug was lost, asking xapi", "vbd", a.vbdUUID, "err", err)
	attached := false
	asked := retry(ctx, a.log, "asking what became of VBD.plug", func(ctx context.Context) error {
		var record xapi.VBDRecord
		err := a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			record, err = local.VBDRecord(ctx, a.vbd)
			return err
		})
		switch {
		case isGone(err):
			return nil
		case err != nil:
			return err
		}
		attached = record.CurrentlyAttached
		return unfinished(record)
	})
	if asked == nil && attached {
		return nil
	}
	return err
}

// answerLost reports whether err leaves open if xapi has executed the call or will
// execute it: the request was sent and no response arrived.
func answerLost(err error) bool {
	var lost *xapi.TransportError
	return errors.As(err, &lost) && lost.Sent
}

// unfinished returns an error that matches errBusy if the record lists an operation in
// progress.
func unfinished(r xapi.VBDRecord) error {
	for _, operation := range r.CurrentOperations {
		return fmt.Errorf("%w: %s", errBusy, operation)
	}
	return nil
}

var errBusy = errors.New("xapi is still working on the VBD")

// open opens the device that VBD.device names.
//
// Another client of xapi may unplug the VBD between the plug and the opening, and the
// device node may then belong to another disk. So open reads the VBD's record again after
// the device is open; from then on Device.Check notices such a change. xapi updates its
// records a little late, so open also compares the image to which the node is bound with
// the VDI.
func (a *attachment) open(ctx context.Context, s *xapi.Session) error {
	vbd, err := a.record(ctx, s)
	if err != nil {
		return err
	}
	a.device = vbd.Device
	a.log.Info("VBD plugged", "vbd", a.vbdUUID, "device", vbd.Device)
	if err := checkDevice(vbd.Device); err != nil {
		return err
	}
	opts := blockdev.Options{Roots: a.m.cfg.Roots, Direct: a.m.cfg.DirectIO, Write: a.isWritable()}
	opts.MayChange = func() error { return a.guard.wait(a.lifetime) }
	a.dev, err = blockdev.Open(ctx, filepath.Join(a.m.cfg.DeviceDir, vbd.Device), opts)
	if err != nil {
		return err
	}
	if opts.Direct && !a.dev.Direct() {
		a.log.Warn("the device cannot be read past the page cache, so it is read through it", "device", vbd.Device)
	}
	now, err := a.record(ctx, s)
	switch {
	case err != nil:
		return err
	case !now.CurrentlyAttached || now.Device != vbd.Device || len(now.CurrentOperations) > 0:
		return fmt.Errorf("%w before it was opened", ErrLost)
	}
	// From here on the VDI cannot be resized: xapi refuses that while it is plugged.
	of, err := a.vdiRecord(ctx, s)
	if err != nil {
		return err
	}
	a.description, a.nameLabel = describe(of), of.NameLabel
	a.vm.vbds = slices.DeleteFunc(of.VBDs, func(ref xapi.VBDRef) bool { return ref == a.vbd })
	if image := filepath.Base(a.dev.BoundTo()); xapi.IsUUID(image) && image != of.UUID && image != of.Location {
		return fmt.Errorf("%w: %s is bound to %s", ErrLost, vbd.Device, a.dev.BoundTo())
	}
	a.virtualSize = of.VirtualSize
	if err := checkSize(a.dev.Size(), of.VirtualSize); err != nil {
		return err
	}
	reason, err := checkFrozen(of, a.m.cfg.AllowMultipleAttach)
	if a.isWritable() {
		reason, err = "writable", errors.New("the VDI is attached for writing")
	}
	if a.notFrozen = reason; err != nil {
		for base := range a.changed {
			a.logUnknown(base, err)
		}
	}
	if device := a.dev.Size(); reason == "" && device != of.VirtualSize {
		// The device of a VHD image has the size of the image: this is that of another one.
		reason, err = "size", fmt.Errorf("the device has %d bytes, the VDI has %d", device, of.VirtualSize)
	}
	var sr string
	if reason == "" {
		if sr, err = a.srOf(ctx, s, of); err != nil {
			reason = "xapi"
		}
	}
	a.helpers.Go(func() { a.findBlocks(of, sr, reason, err) })
	return nil
}

// checkSize returns a *SizeError for a device that is smaller than the VDI: a backup of it
// would be incomplete. A larger device is common, because LVM rounds volumes up.
func checkSize(device, virtual int64) error {
	if virtual == 0 || device < virtual {
		return &SizeError{Device: device, Virtual: virtual}
	}
	return nil
}

// record asks xapi for the VBD's record. It falls back to the local session: the client's
// session may have ended with a restart of xapi during the plug, which leaves the VBD
// plugged.
func (a *attachment) record(ctx context.Context, s *xapi.Session) (record xapi.VBDRecord, err error) {
	record, err = s.VBDRecord(ctx, a.vbd)
	if xapi.SessionEnded(err) || answerLost(err) {
		err = a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			record, err = local.VBDRecord(ctx, a.vbd)
			return err
		})
	}
	return record, err
}

// vdiRecord asks xapi for the VDI's record. It falls back to the local session as record
// does, and uses only that one if s is nil.
func (a *attachment) vdiRecord(ctx context.Context, s *xapi.Session) (record xapi.VDIRecord, err error) {
	if s != nil {
		record, err = s.VDIRecord(ctx, a.vdiRef)
	}
	if s == nil || xapi.SessionEnded(err) || answerLost(err) {
		err = a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
			record, err = local.VDIRecord(ctx, a.vdiRef)
			return err
		})
	}
	return record, err
}

// checkDevice returns an error for a VBD.device that must not become part of a path: xapi
// supplies the text, and on some hosts it contains slashes.
func checkDevice(device string) error {
	if !filepath.IsLocal(device) || strings.ContainsFunc(device, isControl) {
		return fmt.Errorf("xapi names no usable device: %q", device)
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// describe returns the export description that NBD clients can ask for.
func describe(r xapi.VDIRecord) string {
	if r.NameLabel == "" {
		return "VDI " + r.UUID
	}
	return fmt.Sprintf("VDI %s (%s)", r.UUID, r.NameLabel)
}
