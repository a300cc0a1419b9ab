package xapitest

import (
	"encoding/base64"
	"fmt"
	"math/bits"
)

// cbtBlock is the size of the blocks in bytes that are tracked.
const cbtBlock = 64 << 10

// cbtLog is the log of the changed blocks of a VDI: of the writes since the snapshot
// before it. It outlives the data of a snapshot.
type cbtLog struct {
	size   int64
	bitmap []byte // the least significant bit first, as in SM's file
	// parent is the snapshot before, child the one after it or the VDI itself.
	parent, child *vdiObject
}

func newLog(size int64) *cbtLog {
	l := &cbtLog{}
	l.grow(size)
	return l
}

// grow makes the log one of a larger disk.
func (l *cbtLog) grow(size int64) {
	blocks := (size + cbtBlock - 1) / cbtBlock
	bitmap := make([]byte, (blocks+7)/8)
	copy(bitmap, l.bitmap)
	l.size, l.bitmap = size, bitmap
}

// mark notes a write of n bytes at off.
func (l *cbtLog) mark(off, n int64) {
	for block := off / cbtBlock; block*cbtBlock < off+n; block++ {
		l.bitmap[block/8] |= 1 << (block % 8)
	}
}

// snapshotLog makes the log of v that of its new snapshot, and a new log for v.
func (v *vdiObject) snapshotLog(snapshot *vdiObject) {
	old := v.log
	snapshot.log, v.log = old, newLog(v.size)
	if p := old.parent; p != nil && p.log != nil {
		p.log.child = snapshot
	}
	v.log.parent, v.log.child, old.child = snapshot, old.child, v
}

// dropLog deletes the log of a VDI. With merge its neighbours in the chain become each
// other's, and the younger one gets its changes, as when a VDI is destroyed.
func (v *vdiObject) dropLog(merge bool) {
	l := v.log
	if l == nil {
		return
	}
	v.log = nil
	parent, child := l.parent, l.child
	if parent != nil && parent.log != nil {
		parent.log.child = nil
		if merge {
			parent.log.child = child
		}
	}
	if merge && child != nil && child.log != nil {
		child.log.parent = parent
		for i, b := range l.bitmap {
			child.log.bitmap[i] |= b
		}
	}
}

// tracksBlocks reports the cbt_enabled of the record. Raw VDIs, whose writes the host
// does not see, are taken to have changed block tracking, for VDI.data_destroy.
func (v *vdiObject) tracksBlocks() bool { return !v.VHD || v.log != nil }

// EnableCBT is VDI.enable_cbt by another client of xapi.
func (h *Host) EnableCBT(vdiUUID string) error { return h.setCBT(vdiUUID, true) }

// DisableCBT is VDI.disable_cbt by another client of xapi.
func (h *Host) DisableCBT(vdiUUID string) error { return h.setCBT(vdiUUID, false) }

func (h *Host) setCBT(vdiUUID string, enable bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vdiByUUID(vdiUUID)
	if v == nil {
		return fmt.Errorf("xapitest: no VDI %s", vdiUUID)
	}
	return describe(h.configureCBT(v.ref, enable))
}

// configureCBT is VDI.enable_cbt and VDI.disable_cbt; h.mu is held, and given up while
// waiting.
func (h *Host) configureCBT(ref string, enable bool) error {
	v, unlock, err := h.lockStorage(ref)
	if err != nil {
		return err
	}
	defer unlock()
	switch {
	case v.isSnapshot:
		return fail("OPERATION_NOT_ALLOWED", "VDI is a snapshot: "+v.ref)
	case v.Type != "user" && v.Type != "system":
		return fail("VDI_INCOMPATIBLE_TYPE", v.ref, v.Type)
	case !v.sr.tracksBlocks():
		return fail("SR_OPERATION_NOT_SUPPORTED", v.sr.ref)
	case v.image == nil:
		return fail("SR_BACKEND_FAILURE_457", "", "Failed to activate changed block tracking [opterr=Raw VDI or snapshot not permitted]", "")
	case enable && v.log == nil:
		v.log = newLog(v.size)
	case !enable:
		v.dropLog(false)
	}
	return nil
}

// checkDataDestroy makes xapi's checks before VDI.data_destroy, for a VDI with a VHD image.
func (v *vdiObject) checkDataDestroy() error {
	switch {
	case !v.VHD:
		return nil
	case !v.isSnapshot:
		return fail("OPERATION_NOT_ALLOWED", "VDI is not a snapshot: "+v.ref)
	case v.log == nil:
		return fail("VDI_NO_CBT_METADATA", v.ref)
	}
	return nil
}

// AnswerChangedBlocks makes the next valid call of VDI.list_changed_blocks answer text
// instead of a bitmap in base64. The control characters that xapi drops are missing on
// the wire.
func (h *Host) AnswerChangedBlocks(text string) {
	h.inject(func(f *faults) { f.changedBlocks = append(f.changedBlocks, text) })
}

// listChangedBlocks is VDI.list_changed_blocks; h.mu is held, and given up while
// waiting. Like xapi it waits while a VBD of the newer VDI is being plugged or unplugged
// and while another operation works on the SR.
func (h *Host) listChangedBlocks(fromRef, toRef string) (text string, err error) {
	if h.vdis[fromRef] == nil {
		return "", handleInvalid("VDI", fromRef)
	}
	to, unlock, err := h.lockStorage(toRef)
	if err != nil {
		return "", err
	}
	defer unlock()
	h.waitForWork("list_changed_blocks")
	from := h.vdis[fromRef]
	switch {
	case from == nil:
		return "", handleInvalid("VDI", fromRef)
	case h.attachedMode(to) != "":
		return "", fail("VDI_IN_USE", to.ref, "list_changed_blocks")
	case to.NoPBD:
		return "", fail("SR_HAS_NO_PBDS", to.sr.ref)
	case !to.sr.tracksBlocks():
		return "", fail("SR_OPERATION_NOT_SUPPORTED", to.sr.ref)
	case from.sr != to.sr:
		return "", fail("INTERNAL_ERROR", "Storage_error ([S(Vdi_does_not_exist);S("+to.uuid+")])")
	}
	if texts := h.faults.changedBlocks; len(texts) > 0 {
		h.faults.changedBlocks = texts[1:]
		return texts[0], nil
	}
	bitmap, err := changedBetween(from, to)
	if err != nil {
		return "", err
	}
	for i, b := range bitmap {
		bitmap[i] = bits.Reverse8(b) // the API has the most significant bit first
	}
	return base64.StdEncoding.EncodeToString(bitmap), nil
}

// changedBetween merges the logs after from, up to and including that of to.
func changedBetween(from, to *vdiObject) ([]byte, error) {
	if from == to {
		return nil, changedBlocksError("Source and target VDI are same")
	}
	var merged *cbtLog
	if from.log != nil && to.log != nil {
		for v := from.log.child; v != nil && v.log != nil; v = v.log.child {
			if merged == nil {
				merged = newLog(v.log.size)
			}
			if v.log.size < merged.size {
				return nil, fail("SR_BACKEND_FAILURE_459", "", "Inconsistent bitmaps", "")
			}
			merged.grow(v.log.size)
			for i, b := range v.log.bitmap {
				merged.bitmap[i] |= b
			}
			if v == to {
				return merged.bitmap, nil
			}
		}
	}
	return nil, changedBlocksError("Source and target VDI are unrelated")
}

func changedBlocksError(why string) error {
	return fail("SR_BACKEND_FAILURE_460", "", "Failed to calculate changed blocks for given VDIs. [opterr="+why+"]", "")
}
