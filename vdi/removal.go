package vdi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// removal removes one VBD in any state, and its entries in the state folder. One
// goroutine at a time calls try until it succeeds.
type removal struct {
	m     *Manager
	log   *slog.Logger
	nonce string      // in the VBD's tag; "" if not known
	vbd   xapi.VBDRef // "" until known
	ask   bool        // the VBD's record must be read first: an earlier attempt, perhaps of another process, may have changed it
	gone  bool        // the VBD does not exist; only entries may be left

	// suspect is set for a VBD that only the journal names: it may be another
	// host's.
	suspect bool
	// created is when VBD.create was called, if its result is not known; else zero.
	created time.Time
	// epoch is an epoch of the local session that began before the session of that call
	// could end, or after the call: when it has ended, xapi has restarted. Zero if not
	// known yet.
	epoch xapi.Epoch

	// The binding of the device before the first unplug.
	device string // VBD.device
	record blockdev.Record
	noted  bool // device and record are known

	phase phase

	// Guarded by m.mu.
	uuid string // of the VBD, "" until known
	vdi  string // uuid, "" until known
}

// phase is the step at which an attempt failed.
type phase int

const (
	asking phase = iota // logging in, asking for records
	unplugging
	finishing // destroying, removing entries
)

// createTimeout is how long the VBD of a VBD.create without a response is searched for,
// unless xapi restarts. The call only needs xapi's database, so it is late only if xapi
// hangs, for which there is no limit. A VBD that appears even later is found by its tag.
const createTimeout = time.Hour

var (
	errNotCreated = errors.New("VBD.create was not answered, and xapi may still execute it")
	// errOtherProcess: it is in use, or its process removes it.
	errOtherProcess = errors.New("the VBD belongs to another process of this service")
	errNotOurs      = errors.New("the VBD belongs to another VM or host")
	errRebound      = errors.New("the device was bound anew, and unplugging would disconnect somebody else")
)

// try makes one attempt, with a new local session: the client's session may be invalid, and
// so may the kept one after a restart of xapi.
func (r *removal) try(ctx context.Context) error {
	if !r.gone {
		r.phase = asking
		defer func() { r.ask = true }()
		if err := r.remove(ctx); err != nil {
			return err
		}
		r.gone = true
	}
	r.phase = finishing
	return r.forget()
}

// forget removes the entries in the state folder, the nonce first. If only the uuid is left
// the next process sees at once that the VBD is gone; for a nonce it would have to search
// for up to createTimeout.
func (r *removal) forget() error {
	r.m.mu.Lock()
	uuid := r.uuid
	r.m.mu.Unlock()
	if r.nonce != "" {
		if err := r.m.journal.forgetCreate(r.nonce); err != nil {
			return err
		}
	}
	if uuid == "" {
		return nil
	}
	return r.m.journal.forget(uuid)
}

func (r *removal) remove(ctx context.Context) error {
	s, err := r.m.cfg.Client.Login(ctx, Originator)
	if err != nil {
		return err
	}
	defer logout(ctx, s, r.log)
	if r.vbd == "" {
		if err := r.find(ctx, s); err != nil || r.vbd == "" {
			return err // without a match there is nothing to remove
		}
	}
	return r.removeVBD(ctx, s)
}

// find searches for the VBD by its uuid, or else by its tag, and sets r.vbd. It returns nil
// with r.vbd "" if the VBD does not exist and cannot appear any more.
func (r *removal) find(ctx context.Context, s *xapi.Session) error {
	r.m.mu.Lock()
	uuid := r.uuid
	r.m.mu.Unlock()
	if uuid != "" {
		ref, err := s.VBDByUUID(ctx, uuid)
		if isGone(err) {
			return nil
		}
		r.vbd = ref
		return err
	}
	// Before the search: a call that is executed in between is then found by it.
	over, err := r.cannotExecute(ctx)
	if err != nil {
		return err
	}
	tagged, err := r.m.tagged(ctx, s)
	if err != nil {
		return err
	}
	for _, v := range tagged {
		if v.nonce == r.nonce {
			r.vbd = v.ref
			r.learn(v.uuid, "")
			return nil
		}
	}
	if !over {
		return errNotCreated
	}
	return nil
}

// cannotExecute reports whether xapi will not execute the pending VBD.create any more. That
// is certain after a restart of xapi, which ends the process that had the call and all
// sessions, so that xapi refuses a call that arrives later, such as one that a pool
// supporter forwards. It is also assumed after createTimeout.
func (r *removal) cannotExecute(ctx context.Context) (bool, error) {
	if r.created.IsZero() || time.Since(r.created) >= createTimeout {
		return true, nil
	}
	now, err := r.m.cfg.Local.Check(ctx)
	if err != nil {
		return false, err
	}
	if r.epoch == 0 { // an earlier process made the call
		r.epoch = now
	}
	return now > r.epoch, nil
}

// learn stores the uuids of the VBD and of its VDI; it ignores empty ones.
func (r *removal) learn(vbd, vdi string) {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if vbd != "" {
		r.uuid = vbd
	}
	if vdi != "" {
		r.vdi = vdi
	}
}

// removeVBD unplugs the VBD if it is plugged, and destroys it. It returns nil only if the
// VBD does not exist any more. Where needed it first reads the VBD's record, and returns an
// error if an operation is in progress: an unplug whose response was lost goes on in xapi,
// and so does a plug of an earlier process. After any error it may be called again.
func (r *removal) removeVBD(ctx context.Context, s *xapi.Session) error {
	plugged := true
	if r.ask || r.checkBinding() != nil { // another client of xapi may have unplugged it
		record, err := s.VBDRecord(ctx, r.vbd)
		switch {
		case isGone(err):
			return nil
		case err != nil:
			return err
		}
		if err := r.examine(ctx, s, record); err != nil {
			return err
		}
		plugged = record.CurrentlyAttached
	}
	if plugged {
		if err := r.checkBinding(); err != nil {
			return err
		}
		r.phase = unplugging
		err := s.UnplugVBD(ctx, r.vbd)
		if err != nil && !errors.Is(err, xapi.DeviceAlreadyDetached) && !isGone(err) {
			return err
		}
	}
	r.phase = finishing
	if err := s.DestroyVBD(ctx, r.vbd); err != nil && !isGone(err) {
		return err
	}
	return nil
}

// examine checks by its record that the VBD belongs to this service and that no operation is
// in progress, and stores the uuids and the binding if they are not known yet.
func (r *removal) examine(ctx context.Context, s *xapi.Session, record xapi.VBDRecord) error {
	suspect := r.suspect
	if suspect {
		if err := r.m.checkOurs(ctx, s, record); err != nil {
			return err
		}
		r.suspect = false
	}
	r.learn(record.UUID, "")
	t, ok := readTag(record.OtherConfig)
	if other, err := r.m.ofOtherProcess(t.owner, t.nonce); other || err != nil {
		return cmp.Or(err, errOtherProcess)
	}
	if suspect && !ok {
		// Somebody has changed its other_config: it may be in use by the process that an
		// upgrade has replaced.
		if others, err := r.m.OtherGenerations(); err != nil || len(others) > 0 {
			r.suspect = true
			return cmp.Or(err, errOtherProcess)
		}
	}
	if ok && r.nonce == "" {
		r.m.mu.Lock()
		r.nonce = t.nonce
		r.m.mu.Unlock()
	}
	r.m.mu.Lock()
	known := r.vdi != ""
	r.m.mu.Unlock()
	toNote := record.CurrentlyAttached && !r.noted
	var of xapi.VDIRecord
	if !known || toNote {
		var err error
		of, err = s.VDIRecord(ctx, record.VDI)
		if err != nil && !errors.Is(err, xapi.HandleInvalid) { // without a VDI, xapi removes the VBD itself
			return err
		}
		r.learn("", of.UUID)
	}
	if err := unfinished(record); err != nil || !toNote {
		return err
	}
	return r.note(record.Device, of)
}

// note stores the binding of the device before this process unplugs it for the first time.
// It returns errRebound if an nbdN device is bound to an image of another VDI. Other
// devices, and those that are not bound, have an empty record.
func (r *removal) note(device string, of xapi.VDIRecord) error {
	record, bound, err := r.m.readBinding(device)
	if err != nil {
		return err
	}
	image := filepath.Base(record.Path)
	if bound && of.UUID != "" && xapi.IsUUID(image) && image != of.UUID && image != of.Location {
		return fmt.Errorf("%w: %s is bound to %s", errRebound, device, record.Path)
	}
	r.device, r.record, r.noted = device, record, true
	return nil
}

// checkBinding returns errRebound if the device is bound to another image than before the
// first unplug. xapi disconnects by the name of the device, and after an unplug that failed
// half-way another VBD may have got the same device.
func (r *removal) checkBinding() error {
	if !r.noted {
		return nil
	}
	now, bound, err := r.m.readBinding(r.device)
	if err != nil {
		return err
	}
	if bound && now != r.record {
		return fmt.Errorf("%w: %s is bound to %s", errRebound, r.device, now.Path)
	}
	return nil
}

// readBinding reads the binding of a VBD.device. A text that is no path of a device has
// none.
func (m *Manager) readBinding(device string) (r blockdev.Record, bound bool, err error) {
	if checkDevice(device) != nil {
		return r, false, nil
	}
	return blockdev.ReadRecord(filepath.Join(m.cfg.DeviceDir, device), m.cfg.Roots)
}

// checkOurs returns an error that matches errNotOurs unless the VBD belongs to this host's
// control domain and has no tag of another host.
func (m *Manager) checkOurs(ctx context.Context, s *xapi.Session, record xapi.VBDRecord) error {
	h, err := readInventory(ctx, m.cfg.Inventory)
	if err != nil {
		return err
	}
	dom0, err := s.VMByUUID(ctx, h.ControlDomain) // not the remembered ref: a wrong one could be another VM
	if err != nil {
		return err
	}
	if record.VM != dom0 {
		return errNotOurs
	}
	if t, ok := readTag(record.OtherConfig); ok && t.installation != h.Installation {
		return errNotOurs
	}
	return nil
}

// isGone reports whether err means that the VBD does not exist. For an invalid session xapi
// also returns HANDLE_INVALID, but with another class.
func isGone(err error) bool {
	var e *xapi.Error
	if !errors.As(err, &e) || len(e.Params) == 0 || e.Params[0] != "VBD" {
		return false
	}
	return e.Code == xapi.HandleInvalid || e.Code == xapi.UUIDInvalid
}

// logout ends a local session: xapi limits the sessions of one originator.
func logout(ctx context.Context, s *xapi.Session, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), logoutTimeout)
	defer cancel()
	if err := s.Logout(ctx); err != nil && !xapi.SessionEnded(err) {
		log.Debug("cannot log out", "err", err)
	}
}

// logoutTimeout is short because a session that is not logged out does no harm.
const logoutTimeout = 5 * time.Second
