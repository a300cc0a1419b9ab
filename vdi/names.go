package vdi

import (
	"context"
	"errors"
	"time"

	"xapi-nbd/xapi"
)

// A VDI's name is in the record that an attach asks for. That of its VM takes two
// calls to xapi, which no client needs: they are made when somebody looks.

// vmNameAfter is how long after a failure xapi is asked again for the name of a VM.
const vmNameAfter = 30 * time.Second

// maxVBDsAsked is of how many VBDs of a VDI the VM is asked for. Nearly every VDI has
// one besides ours.
const maxVBDsAsked = 4

// vmName is what is known of the VM that an attached VDI belongs to.
type vmName struct {
	// Written before attachment.ready is closed, constant afterwards.
	vbds []xapi.VBDRef // of the VDI when the device was opened, without ours
	dom0 xapi.VMRef    // the control domain, whose VBDs tell nothing

	// Guarded by Manager.mu.
	label    string    // "" if it is not known, or if there is no VM
	known    bool      // xapi has answered
	askAgain time.Time // not before
}

// NameVMs asks xapi for the names of the VMs that the attached VDIs belong to, for
// [Manager.Status], once for each attachment. What xapi does not tell before ctx
// ends stays empty; a later call may ask again. While one call asks, others return
// at once.
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

// unnamed are the attachments whose VM is to be asked for.
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

// askVMName asks xapi for the name of the first VM, other than the control domain,
// that has a VBD of the VDI; "" means that there is none.
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

// isHandleOf reports whether xapi does not know an object of the class any more.
func isHandleOf(err error, class string) bool {
	var e *xapi.Error
	return errors.As(err, &e) && e.Code == xapi.HandleInvalid && len(e.Params) > 0 && e.Params[0] == class
}
