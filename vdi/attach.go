package vdi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// stage is where an attachment stands in its life; it only moves on.
type stage int

const (
	attaching stage = iota
	attached
	detaching
)

// attachment is one VBD and the device behind it. One goroutine, run, takes it
// from create to forget.
type attachment struct {
	m     *Manager
	log   *slog.Logger
	vdi   string // uuid
	nonce string // in the VBD's tag: finds it when its ref was never heard of

	ready  chan struct{} // closed when attaching is over, either way
	unused chan struct{} // closed when the last user of an attached one leaves
	gone   chan struct{} // closed when detaching is over

	// Guarded by m.mu.
	stage   stage
	users   int
	vbdUUID string // "" until known

	// Written before ready is closed, constant afterwards.
	err         error
	dev         *blockdev.Device
	description string

	// Used by run alone.
	vbd       xapi.VBDRef // "" until known
	mayExist  bool        // xapi was asked to create it
	journaled bool
}

// run is the whole life of an attachment. It does not hear the contexts of its
// users: a plug that was begun is completed and then used or undone.
func (a *attachment) run(s *xapi.Session) {
	defer a.m.remove(a)
	ctx := context.Background()
	err := a.attach(ctx, s)

	a.m.mu.Lock()
	a.err = err
	a.stage = attached
	if err != nil || a.users == 0 {
		a.stage = detaching
	}
	serve := a.stage == attached
	a.m.mu.Unlock()
	close(a.ready)

	if serve {
		<-a.unused
	}
	a.detach(ctx)
}

// waitGone waits until a detaching attachment has ended.
func (a *attachment) waitGone(ctx context.Context) error {
	select {
	case <-a.gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// attach creates, records, plugs and opens, in this order: see the package
// documentation for why. What it did before it failed is undone by detach.
func (a *attachment) attach(ctx context.Context, s *xapi.Session) error {
	h, err := readInventory(ctx, a.m.cfg.Inventory)
	if err != nil {
		return err
	}
	vdiRef, err := s.VDIByUUID(ctx, a.vdi)
	if err != nil {
		return err
	}
	record, err := s.VDIRecord(ctx, vdiRef)
	if err != nil {
		return err
	}
	dom0, err := s.VMByUUID(ctx, h.controlDomain)
	if err != nil {
		return err
	}
	if err := a.create(ctx, s, xapi.VBDSpec{VM: dom0, VDI: vdiRef, OtherConfig: newTag(h.installation, a.nonce)}); err != nil {
		return err
	}
	a.log.Info("VBD created", "vbd", a.vbdUUID)
	if err := s.PlugVBD(ctx, a.vbd); err != nil {
		return err
	}
	vbd, err := s.VBDRecord(ctx, a.vbd)
	if err != nil {
		return err
	}
	a.log.Info("VBD plugged", "vbd", a.vbdUUID, "device", vbd.Device)
	a.description = describe(record)
	return a.open(ctx, vbd.Device, record.VirtualSize)
}

// create makes the VBD and its journal entry.
func (a *attachment) create(ctx context.Context, s *xapi.Session, spec xapi.VBDSpec) error {
	ref, err := s.CreateVBD(ctx, spec)
	var lost *xapi.TransportError
	a.mayExist = err == nil || (errors.As(err, &lost) && lost.Sent)
	if err != nil {
		return err
	}
	a.vbd = ref
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
	a.journaled = true
	return nil
}

// open opens what VBD.device names.
func (a *attachment) open(ctx context.Context, device string, virtualSize int64) error {
	if err := checkDevice(device); err != nil {
		return err
	}
	dev, err := blockdev.Open(ctx, filepath.Join(a.m.cfg.DeviceDir, device))
	if err != nil {
		return err
	}
	a.dev = dev
	if dev.Size() != virtualSize {
		// LVM rounds raw volumes up; what the device holds is what is served.
		a.log.Warn("the device's size is not the VDI's virtual size", "device_size", dev.Size(), "virtual_size", virtualSize)
	}
	return nil
}

// checkDevice refuses a VBD.device that must not become part of a path. The
// text comes from outside, and on some hosts it contains slashes.
func checkDevice(device string) error {
	if !filepath.IsLocal(device) || strings.ContainsFunc(device, isControl) {
		return fmt.Errorf("xapi names no usable device: %q", device)
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// describe makes the text for people that clients may ask for.
func describe(r xapi.VDIRecord) string {
	if r.NameLabel == "" {
		return "VDI " + r.UUID
	}
	return fmt.Sprintf("VDI %s (%s)", r.UUID, r.NameLabel)
}
