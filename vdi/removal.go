package vdi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// removal takes one VBD from any state to none, and its entries out of the state
// folder. try is called until it succeeds, by one goroutine at a time.
type removal struct {
	m     *Manager
	log   *slog.Logger
	nonce string      // in the VBD's tag; "" if not known
	vbd   xapi.VBDRef // "" until known
	ask   bool        // xapi has to be asked what the state is: something was tried, perhaps by another process
	gone  bool        // the VBD is certainly gone; only entries may be left

	// suspect is set for a VBD that only the journal names: it may be another
	// host's.
	suspect bool
	// created is when VBD.create was called whose outcome is not known; else zero.
	created time.Time
	// epoch is one of the local session in which xapi knew the session of that call, or
	// which came after the call: its end means that xapi has restarted. Zero if none
	// is known yet.
	epoch xapi.Epoch

	// What the device was bound to before the first unplug.
	device string // VBD.device
	record blockdev.Record
	noted  bool // both are known

	phase phase

	// Guarded by m.mu.
	uuid string // of the VBD, "" until known
	vdi  string // uuid, "" until known
}

// phase is what a try was about when it failed.
type phase int

const (
	asking phase = iota // logging in, asking for records
	unplugging
	finishing // destroying, removing entries
)

// createPatience is how long a VBD.create that was not answered is looked for, unless
// xapi restarts. xapi needs nothing but its database for it, so that only a xapi that
// hangs is late, but there is no limit to that. One that is later still is found by its
// tag.
const createPatience = time.Hour

var (
	errNotCreated = errors.New("VBD.create was not answered, and xapi may still execute it")
	errNotOurs    = errors.New("the VBD belongs to another VM or host")
	errRebound    = errors.New("the device was bound anew, and unplugging would disconnect somebody else")
)

// try makes one attempt. Its local session is a fresh one: the client's may be
// dead, and so may one of ours from before a restart of xapi.
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

// forget removes the entries. The nonce goes first: the next process sees at once
// that a VBD of the journal is gone, but would look long for the VBD of a nonce.
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

// find looks for the VBD, by its uuid or by its tag.
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
	// Before the look: what is executed between the two shows in it.
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

// cannotExecute reports whether xapi will certainly not execute a VBD.create that it
// did not answer, or no more than createPatience allows for. A restart makes it certain:
// it ends the process that had the call, and all sessions, so that a call that has not
// come there yet, as one that a pool supporter has to forward, is refused.
func (r *removal) cannotExecute(ctx context.Context) (bool, error) {
	if r.created.IsZero() || time.Since(r.created) >= createPatience {
		return true, nil
	}
	now, err := r.m.cfg.Local.Check(ctx)
	if err != nil {
		return false, err
	}
	if r.epoch == 0 { // of an earlier process
		r.epoch = now
	}
	return now > r.epoch, nil
}

// learn notes uuids of the VBD and its VDI; empty ones are not known.
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

// removeVBD takes the VBD from any state to none; nil means that it is certainly
// gone. If it has to, it first asks xapi what the state is, and does not interfere
// with work that is under way: an unplug whose answer was lost goes on, and so
// does a plug that another process began. Every error is worth another try.
func (r *removal) removeVBD(ctx context.Context, s *xapi.Session) error {
	plugged := true
	if r.ask || r.checkBinding() != nil { // somebody else may have unplugged it
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

// examine looks at a VBD's record: whether the VBD is ours and xapi is done with
// it, and what is not known of it yet.
func (r *removal) examine(ctx context.Context, s *xapi.Session, record xapi.VBDRecord) error {
	if r.suspect {
		if err := r.m.checkOurs(ctx, s, record); err != nil {
			return err
		}
		r.suspect = false
	}
	r.learn(record.UUID, "")
	if t, ok := readTag(record.OtherConfig); ok && r.nonce == "" {
		r.nonce = t.nonce
	}
	r.m.mu.Lock()
	known := r.vdi != ""
	r.m.mu.Unlock()
	toNote := record.CurrentlyAttached && !r.noted
	var of xapi.VDIRecord
	if !known || toNote {
		var err error
		of, err = s.VDIRecord(ctx, record.VDI)
		if err != nil && !errors.Is(err, xapi.HandleInvalid) { // else xapi will remove the VBD
			return err
		}
		r.learn("", of.UUID)
	}
	if err := unfinished(record); err != nil || !toNote {
		return err
	}
	return r.note(record.Device, of)
}

// note reads what the device is bound to before this process unplugs it for the
// first time. If the device is called nbdN, that must not contradict the VDI. Other
// devices, and one that is not bound, have an empty record.
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

// checkBinding refuses to unplug while the device is bound to something else than
// when it was ours. xapi disconnects by the device's name: after an unplug that
// failed half-way another VBD may have got the device.
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

// readBinding reads what a VBD.device is bound to. A text that is no path of a
// device has no record.
func (m *Manager) readBinding(device string) (r blockdev.Record, bound bool, err error) {
	if checkDevice(device) != nil {
		return r, false, nil
	}
	return blockdev.ReadRecord(filepath.Join(m.cfg.DeviceDir, device), m.cfg.Roots)
}

// checkOurs returns an error matching errNotOurs unless the VBD is one of this
// host's control domain and no other host's tag is on it.
func (m *Manager) checkOurs(ctx context.Context, s *xapi.Session, record xapi.VBDRecord) error {
	h, err := readInventory(ctx, m.cfg.Inventory)
	if err != nil {
		return err
	}
	dom0, err := s.VMByUUID(ctx, h.controlDomain) // not from memory: a wrong ref would be another VM's
	if err != nil {
		return err
	}
	if record.VM != dom0 {
		return errNotOurs
	}
	if t, ok := readTag(record.OtherConfig); ok && t.installation != h.installation {
		return errNotOurs
	}
	return nil
}

// isGone reports whether xapi says that the VBD does not exist. A dead session
// is HANDLE_INVALID too, of another class, and proves nothing.
func isGone(err error) bool {
	var e *xapi.Error
	if !errors.As(err, &e) || len(e.Params) == 0 || e.Params[0] != "VBD" {
		return false
	}
	return e.Code == xapi.HandleInvalid || e.Code == xapi.UUIDInvalid
}

// logout ends a local session; xapi keeps only so many of one originator.
func logout(ctx context.Context, s *xapi.Session, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), logoutTimeout)
	defer cancel()
	if err := s.Logout(ctx); err != nil && !errors.Is(err, xapi.SessionInvalid) {
		log.Debug("cannot log out", "err", err)
	}
}

// logoutTimeout bounds what is only tidiness.
const logoutTimeout = 5 * time.Second
