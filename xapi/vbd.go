package xapi

import (
	"context"
	"fmt"
	"strings"
	"unicode"
)

// VBDSpec has the VDI and the VM of a new VBD. Its other properties are fixed: an unpluggable
// disk on the lowest free userdevice.
type VBDSpec struct {
	VM  VMRef
	VDI VDIRef
	// Write makes the mode RW. xapi refuses that for a VDI with read_only set, with
	// VDIReadOnly, but not for a snapshot, and not for a VDI that a VM uses.
	Write bool
	// OtherConfig is the initial other_config, by which the caller recognises the VBD. Keys
	// must not contain any of < > & " ', which xapi does not escape in its replies.
	OtherConfig map[string]string
}

// vbdConstructor is the parameter of VBD.create. All members but the last three are
// required: xapi answers a missing one with INTERNAL_ERROR and an OCaml exception. Servers
// before 1.257 ignore device and currently_attached.
type vbdConstructor struct {
	VM                 string            `xmlrpc:"VM"`
	VDI                string            `xmlrpc:"VDI"`
	UserDevice         string            `xmlrpc:"userdevice"`
	Bootable           bool              `xmlrpc:"bootable"`
	Mode               string            `xmlrpc:"mode"`
	Type               string            `xmlrpc:"type"`
	Empty              bool              `xmlrpc:"empty"`
	OtherConfig        map[string]string `xmlrpc:"other_config"`
	QoSAlgorithmType   string            `xmlrpc:"qos_algorithm_type"`
	QoSAlgorithmParams map[string]string `xmlrpc:"qos_algorithm_params"`
	Unpluggable        bool              `xmlrpc:"unpluggable"`
	Device             string            `xmlrpc:"device"`
	CurrentlyAttached  bool              `xmlrpc:"currently_attached"`
}

// CreateVBD creates the record of a VBD; PlugVBD attaches it. After a TransportError with
// Sent a VBD with an unknown ref may exist: search for its OtherConfig with VBDsOfVM.
func (s *Session) CreateVBD(ctx context.Context, spec VBDSpec) (VBDRef, error) {
	const method = "VBD.create"
	mode := ModeReadOnly
	if spec.Write {
		mode = ModeReadWrite
	}
	ref, err := call[VBDRef](ctx, s, s.c.cfg.MutateTimeout, method, vbdConstructor{
		VM: string(spec.VM), VDI: string(spec.VDI),
		UserDevice:  "autodetect", // resolved under a lock; own choices would race
		Mode:        mode,
		Type:        "Disk",
		OtherConfig: spec.OtherConfig,
		Unpluggable: true,
	})
	return nonEmpty(method, ref, err)
}

// PlugVBD attaches the VBD's VDI. After it the record's Device is the name of the block
// device. It may take minutes, or hours while another operation holds the VDI. After a
// TransportError with Sent xapi may still be plugging: check CurrentlyAttached.
func (s *Session) PlugVBD(ctx context.Context, ref VBDRef) error {
	return mutate(ctx, s, "VBD.plug", string(ref))
}

// UnplugVBD detaches the VDI. The caller must have closed every descriptor of the device. The
// error for a VBD that is not attached is DeviceAlreadyDetached.
func (s *Session) UnplugVBD(ctx context.Context, ref VBDRef) error {
	return mutate(ctx, s, "VBD.unplug", string(ref))
}

// DestroyVBD removes the record. The error for an attached VBD is OperationNotAllowed.
func (s *Session) DestroyVBD(ctx context.Context, ref VBDRef) error {
	return mutate(ctx, s, "VBD.destroy", string(ref))
}

// VBDByUUID returns the VBD with that uuid, or UUIDInvalid.
func (s *Session) VBDByUUID(ctx context.Context, uuid string) (VBDRef, error) {
	return getText[VBDRef](ctx, s, "VBD.get_by_uuid", uuid)
}

// VBDUUID returns the VBD's uuid, or HandleInvalid.
func (s *Session) VBDUUID(ctx context.Context, ref VBDRef) (string, error) {
	return getText[string](ctx, s, "VBD.get_uuid", string(ref))
}

// VMOfVBD returns the VM that a VBD belongs to, or HandleInvalid.
func (s *Session) VMOfVBD(ctx context.Context, ref VBDRef) (VMRef, error) {
	return getText[VMRef](ctx, s, "VBD.get_VM", string(ref))
}

// The modes of a VBD.
const (
	ModeReadOnly  = "RO"
	ModeReadWrite = "RW"
)

// VBDRecord is the part of VBD.get_record that the service uses.
type VBDRecord struct {
	UUID string `xmlrpc:"uuid"`
	VM   VMRef  `xmlrpc:"VM"`
	VDI  VDIRef `xmlrpc:"VDI"`
	// Device is the block device's path without "/dev/", known after a plug and
	// stale after an unplug. It may contain slashes ("sm/backend/…").
	Device            string            `xmlrpc:"device"`
	UserDevice        string            `xmlrpc:"userdevice"`
	CurrentlyAttached bool              `xmlrpc:"currently_attached"`
	Mode              string            `xmlrpc:"mode"` // ModeReadOnly or ModeReadWrite
	OtherConfig       map[string]string `xmlrpc:"other_config"`
	// CurrentOperations has xapi's operations on the VBD by task ref: "plug", "unplug", …
	CurrentOperations map[string]string `xmlrpc:"current_operations"`
}

// VBDRecord returns the record of a VBD, or HandleInvalid. OtherConfig is nil if only that
// field cannot be decoded.
func (s *Session) VBDRecord(ctx context.Context, ref VBDRef) (VBDRecord, error) {
	r, err := get[VBDRecord](ctx, s, "VBD.get_record", string(ref))
	if unreadable(err) {
		return s.vbdByFields(ctx, ref, err)
	}
	return r, err
}

// vbdByFields is VBDRecord for a VBD whose record cannot be decoded. It reads the operations
// first: if there is none, the fields that it reads later are final.
func (s *Session) vbdByFields(ctx context.Context, ref VBDRef, cause error) (r VBDRecord, err error) {
	f := newFields(ctx, s, "VBD", string(ref), cause)
	ask(f, &r.CurrentOperations, "current_operations")
	ask(f, &r.CurrentlyAttached, "currently_attached")
	ask(f, &r.Device, "device")
	ask(f, &r.UUID, "uuid")
	ask(f, &r.VM, "VM")
	ask(f, &r.VDI, "VDI")
	ask(f, &r.UserDevice, "userdevice")
	ask(f, &r.Mode, "mode")
	if f.err != nil {
		return r, f.err
	}
	ask(f, &r.OtherConfig, "other_config")
	if unreadable(f.err) {
		return r, nil
	}
	return r, f.err
}

// VBDsOfVM returns all VBDs of a VM, attached or not, of all clients. It also returns those
// whose record cannot be decoded as a whole, see VBDRecord.
func (s *Session) VBDsOfVM(ctx context.Context, vm VMRef) (map[VBDRef]VBDRecord, error) {
	return s.vbdsWhere(ctx, "VM", string(vm), "VM.get_VBDs")
}

// VBDsOfVDI returns all VBDs of a VDI, of all VMs and hosts, attached or not, of all clients.
// It also returns those whose record cannot be decoded as a whole, see VBDRecord.
func (s *Session) VBDsOfVDI(ctx context.Context, vdi VDIRef) (map[VBDRef]VBDRecord, error) {
	return s.vbdsWhere(ctx, "VDI", string(vdi), "VDI.get_VBDs")
}

// vbdsWhere returns the VBDs of the object ref. class is its class, and the name of the
// field of a VBD that has ref. list is the call that lists them.
func (s *Session) vbdsWhere(ctx context.Context, class, ref, list string) (map[VBDRef]VBDRecord, error) {
	const method = "VBD.get_all_records_where"
	// The filter language has no escapes in quoted text (db_filter_lex.mll), so a ref
	// that would need one is refused.
	unsafe := func(r rune) bool { return r == '"' || r == '\\' || unicode.IsControl(r) || unicode.IsSpace(r) }
	if ref == "" || strings.ContainsFunc(ref, unsafe) {
		return nil, fmt.Errorf("xapi: %s: %w: %s ref", method, ErrArgument, class)
	}
	all, err := records[VBDRef, VBDRecord](get[map[string]VBDRecord](ctx, s, method, `field "`+class+`"="`+ref+`"`))
	if unreadable(err) {
		return eachRecord(ctx, s.VBDRecord, func() ([]VBDRef, error) { return get[[]VBDRef](ctx, s, list, ref) })
	}
	return all, err
}
