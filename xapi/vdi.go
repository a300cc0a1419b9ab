package xapi

import (
	"context"
	"errors"
	"strconv"
)

// VDIByUUID returns the VDI with that uuid, or UUIDInvalid. Every role may make this call, so
// success is no permission to read the disk.
func (s *Session) VDIByUUID(ctx context.Context, uuid string) (VDIRef, error) {
	return getText[VDIRef](ctx, s, "VDI.get_by_uuid", uuid)
}

// VDIRecord is the part of VDI.get_record that the service uses.
type VDIRecord struct {
	UUID        string
	NameLabel   string
	Type        string // datamodel spelling: "user", "system", "cbt_metadata", …
	VirtualSize int64  // bytes; the block device may be larger
	SR          SRRef
	VBDs        []VBDRef // nil when the record cannot be read at once
	Location    string   // the storage manager's key of the image, mostly the uuid
	Managed     bool
	Missing     bool
	ReadOnly    bool
	IsSnapshot  bool
	Sharable    bool
	// SMConfig is the storage manager's: "host_<ref of the host>" is "RO" or "RW" where
	// the VDI is attached. It is nil when the record cannot be decoded at once: a key
	// that ends its map could hide others.
	SMConfig map[string]string
	// CurrentOperations has xapi's operations on the VDI by task ref: "data_destroy",
	// "snapshot", …
	CurrentOperations map[string]string
}

// vdiWire is VDIRecord as xapi writes it: integers are untyped text.
type vdiWire struct {
	UUID        string `xmlrpc:"uuid"`
	NameLabel   string `xmlrpc:"name_label"`
	Type        string `xmlrpc:"type"`
	VirtualSize string `xmlrpc:"virtual_size"`
	SR          SRRef  `xmlrpc:"SR"`

	VBDs       []VBDRef `xmlrpc:"VBDs"`
	Location   string   `xmlrpc:"location"`
	Managed    bool     `xmlrpc:"managed"`
	Missing    bool     `xmlrpc:"missing"`
	ReadOnly   bool     `xmlrpc:"read_only"`
	IsSnapshot bool     `xmlrpc:"is_a_snapshot"`
	Sharable   bool     `xmlrpc:"sharable"`

	SMConfig          map[string]string `xmlrpc:"sm_config"`
	CurrentOperations map[string]string `xmlrpc:"current_operations"`
}

// VDIRecord returns the record of a VDI, or HandleInvalid.
func (s *Session) VDIRecord(ctx context.Context, ref VDIRef) (VDIRecord, error) {
	const method = "VDI.get_record"
	w, err := get[vdiWire](ctx, s, method, string(ref))
	if unreadable(err) {
		w, err = s.vdiByFields(ctx, ref, err)
	}
	if err != nil {
		return VDIRecord{}, err
	}
	size, err := strconv.ParseInt(w.VirtualSize, 10, 64)
	if err != nil || size < 0 {
		// Not strconv's error, which quotes its argument.
		err := &answerError{errors.New("virtual_size is no size in bytes")}
		return VDIRecord{}, &TransportError{Method: method, Sent: true, Err: err}
	}
	return VDIRecord{
		UUID: w.UUID, NameLabel: w.NameLabel, Type: w.Type, VirtualSize: size, SR: w.SR, VBDs: w.VBDs, Location: w.Location,
		Managed: w.Managed, Missing: w.Missing, ReadOnly: w.ReadOnly, IsSnapshot: w.IsSnapshot, Sharable: w.Sharable,
		SMConfig:          w.SMConfig,
		CurrentOperations: w.CurrentOperations,
	}, nil
}

// vdiByFields is VDIRecord for a VDI whose record cannot be decoded.
func (s *Session) vdiByFields(ctx context.Context, ref VDIRef, cause error) (w vdiWire, err error) {
	f := newFields(ctx, s, "VDI", string(ref), cause)
	ask(f, &w.CurrentOperations, "current_operations")
	ask(f, &w.UUID, "uuid")
	ask(f, &w.NameLabel, "name_label")
	ask(f, &w.Type, "type")
	ask(f, &w.VirtualSize, "virtual_size")
	ask(f, &w.SR, "SR")
	ask(f, &w.Location, "location")
	ask(f, &w.Managed, "managed")
	ask(f, &w.Missing, "missing")
	ask(f, &w.ReadOnly, "read_only")
	ask(f, &w.IsSnapshot, "is_a_snapshot")
	ask(f, &w.Sharable, "sharable")
	return w, f.err
}
