package xapitest

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"xapi-nbd/vdi/vhd/vhdtest"
)

const nullRef = "OpaqueRef:NULL"

// object has the fields of every row of xapi's database.
type object struct{ ref, uuid string }

func newObject() object { return object{"OpaqueRef:" + newUUID(), newUUID()} }

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

type sessionObject struct {
	object
	role       Role
	local      bool // made by a local login
	originator string
	login      time.Time

	otherConfig map[string]string
}

type vdiObject struct {
	object
	VDISpec
	storage
	sr   *srObject
	size int64
	busy bool // a storage operation is in progress
	// guest is the VM of VDISpec.VMName, guestVBD its VBD; zero without one.
	guest, guestVBD object
	// operation is data_destroy while that waits, task its task's ref; else both are empty.
	operation, task string
}

type networkObject struct {
	object
	purposes    []string
	otherConfig map[string]string
}

// store is xapi's database. Host.mu guards it.
type store struct {
	host, pool, dom0 object
	otherDom0        bool     // see OtherControlDomain
	sr, unpluggedSR  srObject // the latter has no PBD on this host
	moreSRs          []*srObject
	sessions         map[string]*sessionObject
	vdis             map[string]*vdiObject
	vms              map[string]*vmObject
	vbds             map[string]*vbdObject
	vbdOrder         []*vbdObject
	networks         map[string]*networkObject
	networkOrder     []*networkObject
	devices          map[string]*device // by name under the device directory
}

func newStore() store {
	return store{
		host: newObject(), pool: newObject(), dom0: newObject(),
		sr: newSR("ext"), unpluggedSR: newSR("ext"),
		sessions: map[string]*sessionObject{},
		vdis:     map[string]*vdiObject{},
		vms:      map[string]*vmObject{},
		vbds:     map[string]*vbdObject{},
		networks: map[string]*networkObject{},
		devices:  map[string]*device{},
	}
}

// VDISpec describes a VDI to add.
type VDISpec struct {
	// Image is the path of an existing file that holds the data. If it is
	// empty, AddVDI makes a sparse file of Size bytes.
	Image string
	Size  int64
	// VirtualSize is the record's virtual_size in bytes; 0 means the size of the
	// image, and so of the device.
	VirtualSize int64
	// SectorSize is the logical block size of the loop device: 512, the default, or 4096.
	SectorSize int
	// Type is the VDI's type in xapi's spelling; the default is "user".
	Type      string
	NameLabel string
	// VMName is the name-label of a guest that has a VBD of the VDI, not plugged; "" means
	// that there is none. Of the guest and its VBD only the getters answer.
	VMName string
	// Description and Tags are the record's name_description and tags, OtherConfig its
	// other_config. xapi does not escape the keys of maps, and neither does a Host.
	Description string
	Tags        []string
	OtherConfig map[string]string
	// Unmanaged, Missing and ReadOnly set the record's fields managed, missing
	// and read_only; the first two make VBD.plug fail.
	Unmanaged, Missing, ReadOnly bool
	// NoPBD puts the VDI on an SR that this host is not attached to.
	NoPBD bool
	// SR is the uuid of the VDI's SR, see AddSR. Empty means the first one.
	SR string
	// VHD keeps the content in a VHD image as well, as SM does, see Chain. The VDI can
	// have snapshots and changed block tracking then. Size must be a multiple of 2 MiB,
	// and the content is to be written with WriteVDI only.
	VHD bool
	// Sharable sets the record's field sharable.
	Sharable bool
}

// AddVDI adds a VDI and returns its uuid.
func (h *Host) AddVDI(spec VDISpec) (uuid string, err error) {
	v := &vdiObject{object: newObject(), VDISpec: spec}
	if v.Image == "" {
		v.Image = filepath.Join(h.imageDir(), v.uuid+".raw")
		if err := os.WriteFile(v.Image, nil, 0o644); err != nil {
			return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
		}
		if err := os.Truncate(v.Image, spec.Size); err != nil {
			return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
		}
	}
	if v.Image, err = filepath.Abs(v.Image); err != nil {
		return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
	}
	fi, err := os.Stat(v.Image)
	if err != nil {
		return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
	}
	v.size = cmp.Or(spec.VirtualSize, fi.Size())
	switch v.SectorSize {
	case 0:
		v.SectorSize = 512
	case 512, 4096:
	default:
		return "", fmt.Errorf("xapitest: adding a VDI: sector size %d is neither 512 nor 4096", v.SectorSize)
	}
	if v.Type == "" {
		v.Type = "user"
	}
	if v.VMName != "" {
		v.guest, v.guestVBD = newObject(), newObject()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if v.sr, err = h.srByUUID(spec.SR); err != nil {
		return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
	}
	if v.NoPBD {
		v.sr = &h.unpluggedSR
	}
	if v.VHD {
		if spec.Image != "" || spec.VirtualSize != 0 || v.size%vhdtest.BlockSize != 0 {
			return "", errors.New("xapitest: adding a VDI: a VHD is empty and has blocks of 2 MiB")
		}
		if err := h.newImage(v, nil); err != nil {
			return "", fmt.Errorf("xapitest: adding a VDI: %w", err)
		}
	}
	h.vdis[v.ref] = v
	return v.uuid, nil
}

// ImagePath is the path of the file with the VDI's data, or "" for an unknown uuid.
func (h *Host) ImagePath(vdiUUID string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.vdiByUUID(vdiUUID); v != nil {
		return v.Image
	}
	return ""
}

func (h *Host) vdiByUUID(uuid string) *vdiObject {
	for _, v := range h.vdis {
		if v.uuid == uuid {
			return v
		}
	}
	return nil
}

func (h *Host) vbdByUUID(uuid string) *vbdObject {
	for _, v := range h.vbdOrder {
		if v.uuid == uuid {
			return v
		}
	}
	return nil
}

// AddNetwork adds a network with the given purposes and returns its uuid.
func (h *Host) AddNetwork(purposes ...string) (uuid string) {
	n := &networkObject{object: newObject(), purposes: slices.Clone(purposes)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.networks[n.ref] = n
	h.networkOrder = append(h.networkOrder, n)
	return n.uuid
}

// OtherControlDomain makes the control domain of this host another VM than that of
// the inventory, as if the inventory were of another host of the pool.
func (h *Host) OtherControlDomain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.otherDom0 = true
}

// SetPurposes replaces a network's purposes, without the checks of network.add_purpose,
// because some tests need contradictory sets. It ignores an unknown uuid.
func (h *Host) SetPurposes(networkUUID string, purposes ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range h.networks {
		if n.uuid == networkUUID {
			n.purposes = slices.Clone(purposes)
		}
	}
}

// SetNetworkOtherConfig replaces a network's other_config, see VDISpec.OtherConfig. An
// unknown uuid is ignored.
func (h *Host) SetNetworkOtherConfig(networkUUID string, otherConfig map[string]string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range h.networks {
		if n.uuid == networkUUID {
			n.otherConfig = maps.Clone(otherConfig)
		}
	}
}

// NewSession makes a client's session and returns its ref. Sessions does not count it.
func (h *Host) NewSession(role Role) (ref string) {
	s := &sessionObject{object: newObject(), role: role, login: time.Now()}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sessions[s.ref] = s
	return s.ref
}

// SetSessionOtherConfig replaces a session's other_config, see VDISpec.OtherConfig. An
// unknown ref is ignored.
func (h *Host) SetSessionOtherConfig(ref string, otherConfig map[string]string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.sessions[ref]; s != nil {
		s.otherConfig = maps.Clone(otherConfig)
	}
}

// ExpireSession ends a session, as time, eviction or a logout would.
func (h *Host) ExpireSession(ref string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.sessions, ref)
	h.notify()
}

// Sessions counts the live sessions that were made by login.
func (h *Host) Sessions() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, s := range h.sessions {
		if s.local {
			n++
		}
	}
	return n
}

// ExportName is the exportname that VDI.get_nbd_info gives to a session.
func (h *Host) ExportName(vdiUUID, ref string) string {
	return "/" + vdiUUID + "?session_id=" + ref
}

// AddForeignVBD makes a detached VBD of the control domain that belongs to another client,
// and returns its uuid. For otherConfig see VDISpec.OtherConfig.
func (h *Host) AddForeignVBD(vdiUUID string, otherConfig map[string]string) (uuid string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return "", fmt.Errorf("xapitest: no VDI %s", vdiUUID)
	}
	b, err := h.createVBD(vbdFields{
		vm: h.dom0.ref, vdi: v.ref, userdevice: "autodetect", mode: "RO", typ: "Disk",
		unpluggable: true, otherConfig: maps.Clone(otherConfig),
	})
	if err != nil {
		return "", describe(err)
	}
	b.foreign = true
	return b.uuid, nil
}

// AddToOtherConfig is VBD.add_to_other_config by another client of xapi, but replaces
// the value of a key that exists. As to the key see VDISpec.OtherConfig.
func (h *Host) AddToOtherConfig(vbdUUID, key, value string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := h.vbdByUUID(vbdUUID)
	if b == nil {
		return fmt.Errorf("xapitest: no VBD %s", vbdUUID)
	}
	b.otherConfig = maps.Clone(b.otherConfig) // a record that is being written has the old one
	if b.otherConfig == nil {
		b.otherConfig = map[string]string{}
	}
	b.otherConfig[key] = value
	return nil
}

// MoveToOtherVM makes a VBD one of another VM than this host's control domain, such as
// a guest or the control domain of another host.
func (h *Host) MoveToOtherVM(vbdUUID string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := h.vbdByUUID(vbdUUID)
	if b == nil {
		return fmt.Errorf("xapitest: no VBD %s", vbdUUID)
	}
	b.vm = newObject().ref
	return nil
}

// PlugForeign plugs a VBD made by AddForeignVBD.
func (h *Host) PlugForeign(vbdUUID string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := h.vbdByUUID(vbdUUID)
	if b == nil || !b.foreign {
		return fmt.Errorf("xapitest: no foreign VBD %s", vbdUUID)
	}
	return describe(h.plug(b.ref))
}

// describe turns an API error into one for people.
func describe(err error) error {
	var f *failure
	if errors.As(err, &f) {
		return fmt.Errorf("xapitest: %s %q", f.code, f.params)
	}
	return err
}

func (h *Host) snapshot() []VBD {
	vbds := make([]VBD, 0, len(h.vbdOrder))
	for _, b := range h.vbdOrder {
		if h.ofVM(b) {
			continue
		}
		vdiUUID := ""
		if v := h.vdis[b.vdi]; v != nil {
			vdiUUID = v.uuid
		}
		vbds = append(vbds, VBD{
			UUID: b.uuid, Ref: b.ref, VDI: vdiUUID, Device: b.device, Mode: b.mode, CurrentlyAttached: b.attached,
			OtherConfig: maps.Clone(b.otherConfig), Foreign: b.foreign,
		})
	}
	return vbds
}

// happened notes a step in the life of a VBD; h.mu is held.
func (h *Host) happened(b *vbdObject, change string) {
	h.events = append(h.events, Event{time.Now(), b.uuid, change})
	h.notify()
}
