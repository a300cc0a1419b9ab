package service

import (
	"errors"
	"slices"
	"strings"

	"xapi-nbd/nbd"
	"xapi-nbd/xapi"
)

// The rules by which the service refuses clients, for log and statistics. The
// server has further ones, see nbd.Rules.
const (
	reasonName       = "malformed_name"
	reasonNotYet     = "xapi_not_ready"
	reasonDraining   = "draining"
	reasonTLS        = nbd.RuleTLSPolicy
	reasonSession    = "session"
	reasonRole       = "permission"
	reasonRejections = "too_many_rejections"
	reasonAnswer     = "xapi_answer"
	reasonVBDs       = "vbd_limit"
	reasonConns      = nbd.RuleConnLimit
	reasonAttaching  = "still_attaching"
	reasonLost       = "device_lost"
	reasonStopping   = nbd.RuleStopping
	reasonXapi       = "xapi_unreachable"
	reasonNoVDI      = "no_such_vdi"
	reasonPlug       = "plug_failed"
	reasonDetaching  = "still_detaching"
	reasonLocked     = "other_instance"
	reasonJournal    = "journal_locked"
	reasonSize       = "device_too_small"
	reasonNoWriting  = "writing_not_allowed"
	reasonExclusive  = "not_exclusive"
	reasonOther      = nbd.RuleOther
)

// remedies are the advice of the log about refusals, by rule. Every rule of the service has
// one.
var remedies = map[string]string{
	reasonName:       "take the export name from VDI.get_nbd_info as it is; in a URI its ? is %3F",
	reasonNotYet:     "wait; if it stays like this: xapi-nbd check",
	reasonDraining:   "connect to another host of the pool, or later",
	reasonTLS:        "xapi-nbd check",
	reasonSession:    "log in again and ask VDI.get_nbd_info anew",
	reasonRole:       "use a session of the role vm-admin or a stronger one",
	reasonRejections: "see which client of this address asks with sessions that have ended",
	reasonAnswer:     "see the cause, and xapi's log (/var/log/xensource.log)",
	reasonVBDs:       "wait for other disks to be done, or raise max_vbds",
	reasonAttaching:  "try again later; another operation holds the VDI, or its storage is slow",
	reasonLost:       "try again; see which tool unplugs VBDs of the control domain",
	reasonStopping:   "connect again later",
	reasonXapi:       "systemctl status xapi",
	reasonNoVDI:      "take the uuid from xapi; the VDI may have been destroyed",
	reasonPlug:       "see what xapi's code means; the host needs a plugged PBD of the VDI's SR",
	reasonDetaching:  "try again later; xapi-nbd status --json lists the VBD under leftovers, with xapi's last error",
	reasonLocked:     "stop the other instance (the log names its process), or do not start this one",
	reasonJournal:    "see which process has locked journal.lock in the state folder (lslocks), and end or continue it",
	reasonSize:       "compare the VDI's virtual size with its storage; VDI.update or SR.scan may correct it",
	reasonNoWriting:  "set allow_write = true and install the drop-in for the unit, or ask for mode=ro",
	reasonExclusive:  "stop the VM and other users of the VDI, and block the VM's start first: see OPERATIONS.md, writing to a disk",
	reasonOther:      "see the cause",
}

// refusalRules are the values of the label reason of the refusals: those of the
// service and those of the server.
func refusalRules() []string {
	rules := nbd.Rules()
	for rule := range remedies {
		rules = append(rules, rule)
	}
	slices.Sort(rules)
	return slices.Compact(rules)
}

// byRule adds rule and remedy to a *nbd.Refusal. It returns other errors as they are.
func byRule(rule string, err error) error {
	var r *nbd.Refusal
	if !errors.As(err, &r) || r.Rule == rule {
		return err
	}
	named := *r
	named.Rule, named.Remedy = rule, remedies[rule]
	return &named
}

// PublicName implements nbd.PublicNamer: only the VDI's uuid of an export name may be
// shown, also if the name is malformed otherwise.
func (e *exporter) PublicName(name string) string {
	path, _, _ := strings.Cut(name, "?")
	if uuid := strings.TrimPrefix(path, "/"); xapi.IsUUID(uuid) {
		return "/" + strings.ToLower(uuid)
	}
	return ""
}
