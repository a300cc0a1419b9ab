package vdi

import (
	"errors"
	"slices"
	"testing"

	"xapi-nbd/xapi"
)

// Each rule that depends on the records is broken by one change of a VDI that may be written.
func TestExclusive(t *testing.T) {
	type vbds = map[xapi.VBDRef]xapi.VBDRecord
	busy := map[string]string{"OpaqueRef:task": "attach"}
	tests := []struct {
		name   string
		change func(*xapi.VDIRecord, vbds)
		rule   string // "" if the VDI may be written
	}{
		{"nobody else", func(*xapi.VDIRecord, vbds) {}, ""},
		{"disk of a system", func(of *xapi.VDIRecord, _ vbds) { of.Type = "system" }, ""},
		{"VBD of a halted VM", func(_ *xapi.VDIRecord, v vbds) { v["OpaqueRef:vm"] = xapi.VBDRecord{Mode: "RW", VM: "OpaqueRef:other"} }, ""},
		{"not managed", func(of *xapi.VDIRecord, _ vbds) { of.Managed = false }, ruleManaged},
		{"missing", func(of *xapi.VDIRecord, _ vbds) { of.Missing = true }, ruleMissing},
		{"read-only", func(of *xapi.VDIRecord, _ vbds) { of.ReadOnly = true }, ruleReadOnly},
		{"snapshot", func(of *xapi.VDIRecord, _ vbds) { of.IsSnapshot = true }, ruleSnapshot},
		{"memory of a VM", func(of *xapi.VDIRecord, _ vbds) { of.Type = "suspend" }, ruleType},
		{"metadata", func(of *xapi.VDIRecord, _ vbds) { of.Type = "cbt_metadata" }, ruleType},
		{"unknown type", func(of *xapi.VDIRecord, _ vbds) { of.Type = "" }, ruleType},
		{"sharable", func(of *xapi.VDIRecord, _ vbds) { of.Sharable = true }, ruleSharable},
		{"snapshot in progress", func(of *xapi.VDIRecord, _ vbds) {
			of.CurrentOperations = map[string]string{"OpaqueRef:task": "snapshot"}
		}, ruleOperation},
		{"VM runs", func(_ *xapi.VDIRecord, v vbds) {
			v["OpaqueRef:vm"] = xapi.VBDRecord{Mode: "RW", VM: "OpaqueRef:other", CurrentlyAttached: true}
		}, ruleAttached},
		{"VM reads", func(_ *xapi.VDIRecord, v vbds) {
			v["OpaqueRef:vm"] = xapi.VBDRecord{Mode: "RO", VM: "OpaqueRef:other", CurrentlyAttached: true}
		}, ruleAttached},
		{"dom0 reads", func(_ *xapi.VDIRecord, v vbds) {
			v["OpaqueRef:foreign"] = xapi.VBDRecord{Mode: "RO", VM: "OpaqueRef:dom0", CurrentlyAttached: true}
		}, ruleAttached},
		{"VM starts", func(_ *xapi.VDIRecord, v vbds) {
			v["OpaqueRef:vm"] = xapi.VBDRecord{Mode: "RW", VM: "OpaqueRef:other", CurrentOperations: busy}
		}, ruleBusy},
		{"ours is unplugged", func(_ *xapi.VDIRecord, v vbds) {
			v["OpaqueRef:ours"] = xapi.VBDRecord{Mode: "RW", VM: "OpaqueRef:dom0", CurrentlyAttached: true, CurrentOperations: busy}
		}, ruleBusy},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			of := xapi.VDIRecord{Type: "user", Managed: true}
			all := vbds{"OpaqueRef:ours": {Mode: "RW", VM: "OpaqueRef:dom0", CurrentlyAttached: true}}
			tt.change(&of, all)
			err := exclusive(of, all, "OpaqueRef:ours")
			var broken *ExclusiveError
			if tt.rule == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.As(err, &broken) || broken.Rule != tt.rule || broken.Seen == "" {
				t.Errorf("got %v, want rule %s", err, tt.rule)
			}
			if !slices.Contains(ExclusiveRules, tt.rule) {
				t.Errorf("%s is not in ExclusiveRules", tt.rule)
			}
		})
	}
}

// Before the VBD is created there is none of ours, and later it must be attached.
func TestExclusiveOurs(t *testing.T) {
	of := xapi.VDIRecord{Type: "user", Managed: true}
	if err := exclusive(of, nil, ""); err != nil {
		t.Errorf("before the VBD is created: %v", err)
	}
	if err := exclusive(of, nil, "OpaqueRef:ours"); !errors.Is(err, ErrLost) {
		t.Errorf("destroyed: got %v, want ErrLost", err)
	}
	detached := map[xapi.VBDRef]xapi.VBDRecord{"OpaqueRef:ours": {Mode: "RW"}}
	if err := exclusive(of, detached, "OpaqueRef:ours"); !errors.Is(err, ErrLost) {
		t.Errorf("unplugged: got %v, want ErrLost", err)
	}
}
