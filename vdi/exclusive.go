package vdi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"xapi-nbd/xapi"
)

// The rules by which a VDI may be attached for writing. On the VM's own host xapi itself
// neither refuses to plug the disk of a running VM for writing, nor to start a VM from a disk
// that is plugged for writing; and it does not protect snapshots. See [ExclusiveError].
const (
	ruleManaged   = "not_managed"   // xapi does not manage the VDI
	ruleMissing   = "missing"       // the storage manager does not find its image
	ruleReadOnly  = "read_only"     // read_only is set, as for the parents of snapshots
	ruleSnapshot  = "snapshot"      // it is a snapshot
	ruleType      = "type"          // it is no disk of a VM
	ruleSharable  = "sharable"      // several VMs may use it
	ruleOperation = "operation"     // xapi works on it
	ruleAttached  = "attached"      // another VBD of it is attached, on any VM and host
	ruleBusy      = "busy"          // another VBD of it is being attached or detached
	ruleGone      = "gone"          // xapi does not have it any more
	ruleWritten   = "being_written" // a client of this service writes it
	ruleRead      = "being_read"    // a client of this service reads it
	ruleUnknown   = "unknown"       // xapi has not told for too long
)

// ExclusiveRules are the values of [ExclusiveError].Rule.
var ExclusiveRules = []string{
	ruleManaged, ruleMissing, ruleReadOnly, ruleSnapshot, ruleType, ruleSharable, ruleOperation,
	ruleAttached, ruleBusy, ruleGone, ruleWritten, ruleRead, ruleUnknown,
}

// ExclusiveError is returned by [Manager.AttachWritable] for a VDI that must not be written,
// and by [Manager.Attach] for one that a client writes. It is also the cause of the end of a
// [WritableDisk]'s Lifetime when somebody else begins to use the VDI.
type ExclusiveError struct {
	Rule string // the rule that is broken, one of ExclusiveRules
	Seen string // the observation, in words; it holds no secret
}

// Error names the rule.
func (e *ExclusiveError) Error() string {
	return fmt.Sprintf("writing needs the VDI for itself (rule %s): %s", e.Rule, e.Seen)
}

// exclusive returns an *ExclusiveError unless the records allow to write the VDI. vbds are
// all VBDs of the VDI but those of other processes of the service. ours is the VBD of the attachment, "" before there is one; if it is not
// attached, the error matches ErrLost. A VBD of a halted VM is not attached, and is no reason
// to refuse.
func exclusive(of xapi.VDIRecord, vbds map[xapi.VBDRef]xapi.VBDRecord, ours xapi.VBDRef) error {
	broken := func(rule, format string, args ...any) error {
		return &ExclusiveError{rule, fmt.Sprintf(format, args...)}
	}
	switch {
	case !of.Managed:
		return broken(ruleManaged, "xapi does not manage it")
	case of.Missing:
		return broken(ruleMissing, "its image is missing")
	case of.ReadOnly:
		return broken(ruleReadOnly, "it is read-only")
	case of.IsSnapshot:
		return broken(ruleSnapshot, "it is a snapshot")
	case of.Type != "user" && of.Type != "system":
		return broken(ruleType, "its type is %q", of.Type)
	case of.Sharable:
		return broken(ruleSharable, "it is sharable")
	}
	// The VBDs first: they name the VM that is the reason of an operation on the VDI.
	for _, ref := range slices.Sorted(maps.Keys(vbds)) {
		vbd := vbds[ref]
		switch {
		case ref != ours && vbd.CurrentlyAttached:
			return broken(ruleAttached, "VBD %s (%s) of %s is attached", vbd.UUID, vbd.Mode, vbd.VM)
		case unfinished(vbd) != nil:
			return broken(ruleBusy, "VBD %s (%s) of %s: %v", vbd.UUID, vbd.Mode, vbd.VM, unfinished(vbd))
		}
	}
	for _, operation := range of.CurrentOperations {
		return broken(ruleOperation, "xapi is working on it: %s", operation)
	}
	if ours != "" && !vbds[ours].CurrentlyAttached {
		return fmt.Errorf("%w: xapi does not list the VBD as attached", ErrLost)
	}
	return nil
}

// checkOtherWriters returns an *ExclusiveError if another process of the service, which an
// upgrade has replaced, attaches the VDI for writing: to read it would end the client that
// writes. Within this process admits decides that.
func (a *attachment) checkOtherWriters(ctx context.Context) error {
	others, err := a.m.OtherGenerations()
	if err != nil || len(others) == 0 {
		return err
	}
	var vbds map[xapi.VBDRef]xapi.VBDRecord
	err = a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
		vbds, err = local.VBDsOfVDI(ctx, a.vdiRef)
		return err
	})
	if err != nil {
		return err
	}
	ofOthers, err := a.m.takeOfOtherProcesses(vbds)
	if err != nil {
		return err
	}
	for _, vbd := range ofOthers {
		if vbd.Mode == "RW" {
			return usedByOtherProcess(vbd)
		}
	}
	return nil
}

// checkExclusive asks xapi with the local session whether the VDI may be written: two calls,
// one for the VDI and one for all its VBDs. Errors that are neither an *ExclusiveError nor
// ErrLost mean that xapi has not told.
func (a *attachment) checkExclusive(ctx context.Context) error {
	var of xapi.VDIRecord
	var vbds map[xapi.VBDRef]xapi.VBDRecord
	err := a.m.cfg.Local.Do(ctx, func(local *xapi.Session) (err error) {
		if of, err = local.VDIRecord(ctx, a.vdiRef); err != nil {
			return err
		}
		vbds, err = local.VBDsOfVDI(ctx, a.vdiRef)
		return err
	})
	switch {
	case errors.Is(err, xapi.HandleInvalid) && !xapi.SessionEnded(err):
		return &ExclusiveError{ruleGone, "xapi does not have it any more"}
	case err != nil:
		return err
	}
	// VBDs of strangers first: they are the more serious reason.
	ofOthers, err := a.m.takeOfOtherProcesses(vbds)
	if err != nil {
		return err
	}
	if err := exclusive(of, vbds, a.vbd); err != nil {
		return err
	}
	for _, vbd := range ofOthers {
		if vbd.CurrentlyAttached || unfinished(vbd) != nil {
			return usedByOtherProcess(vbd)
		}
	}
	return nil
}

// takeOfOtherProcesses removes the VBDs of other living processes of the service from vbds, and
// returns them. Those are processes that an upgrade has replaced, or by which it has replaced
// this one.
func (m *Manager) takeOfOtherProcesses(vbds map[xapi.VBDRef]xapi.VBDRecord) (taken []xapi.VBDRecord, err error) {
	for ref, vbd := range vbds {
		t, ok := readTag(vbd.OtherConfig)
		if !ok {
			continue
		}
		other, err := m.ofOtherProcess(t.owner, t.nonce)
		if err != nil {
			return nil, err
		}
		if other {
			taken = append(taken, vbd)
			delete(vbds, ref)
		}
	}
	return taken, nil
}

// usedByOtherProcess returns the error for a VDI of which another process of the service has a
// VBD. That process cannot share it: only with one VBD all see the same data, and each other's
// writes.
func usedByOtherProcess(vbd xapi.VBDRecord) *ExclusiveError {
	rule, does := ruleRead, "reads"
	if vbd.Mode == "RW" {
		rule, does = ruleWritten, "writes"
	}
	return &ExclusiveError{rule, fmt.Sprintf("a client that the process from before an upgrade still serves %s it; "+
		"other connections, also with its session, are refused until all its connections have ended", does)}
}
