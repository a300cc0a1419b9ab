package vdi

import (
	"context"
	"errors"
	"time"

	"xapi-nbd/xapi"
)

// The name of a VDI is in the record that attach reads. The name of its VM takes two more
// calls to xapi and no client needs it, so xapi is asked only when a status is shown.

// vmNameAfter is how long after a failure xapi may be asked again for the name of a VM.
const vmNameAfter = 30 * time.Second

// maxVBDsAsked is how many VBDs of a VDI are tried to find its VM. Nearly every VDI has one
// besides that of this service.
const maxVBDsAsked = 4

// vmName is the name of the VM to which an attached VDI belongs.
type vmName struct {
	// Written before attachment.ready is closed, constant afterwards.
	vbds []xapi.VBDRef // of the VDI when the device was opened, without that of this service
	dom0 xapi.VMRef    // the control domain, whose VBDs are ignored

	// Guarded by Manager.mu.
	label    string    // "" if unknown, or if there is no VM
	known    bool      // xapi has returned the name, or that there is no VM
	askAgain time.Time // xapi is not asked before this time
}

// NameVMs asks xapi for the names of the VMs to which the attached VDIs belong, once for
// each attachment; [Manager.Status] returns them. A name that xapi does not return before
// ctx ends stays empty, and a later call asks again. During one call others return at once.
func (m *Manager) NameVMs(ctx context.Context) {
	if !m.naming.TryLock() {
		return
	}
	defer m.naming.Unlock()
	for _, a := range m.unnamed() {
		label, err := a.askVMName(ctx)
		m.mu.Lock()
		a.vm.label, a.vm.known = label, err == nil
		a.vm.askAgain = time.Now().Add(vmNameAfter)
		m.mu.Unlock()
		if err != nil {
			a.log.Debug("cannot ask for the name of the VM", "err", err)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// unnamed returns the attachments for whose VM xapi is to be asked.
func (m *Manager) unnamed() (all []*attachment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.attachments {
		if a.isReady() && a.err == nil && !a.vm.known && !time.Now().Before(a.vm.askAgain) {
			all = append(all, a)
		}
	}
	return all
}

// askVMName asks xapi for the name of the first VM, other than the control domain, that has
// a VBD of the VDI. It returns "" if there is none.
func (a *attachment) askVMName(ctx context.Context) (label string, err error) {
	err = a.m.cfg.Local.Do(ctx, func(s *xapi.Session) error {
		for _, vbd := range a.vm.vbds[:min(len(a.vm.vbds), maxVBDsAsked)] {
			vm, err := s.VMOfVBD(ctx, vbd)
			if err == nil && vm != a.vm.dom0 {
				label, err = s.VMNameLabel(ctx, vm)
			}
			switch {
			case isHandleOf(err, "VBD"), isHandleOf(err, "VM"): // gone meanwhile
			case err != nil || label != "":
				return err
			}
		}
		return nil
	})
	return label, err
}

// isHandleOf reports whether err means that an object of the class does not exist any more.
func isHandleOf(err error, class string) bool {
	var e *xapi.Error
	return errors.As(err, &e) && e.Code == xapi.HandleInvalid && len(e.Params) > 0 && e.Params[0] == class
}
