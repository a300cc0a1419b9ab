package interop

import (
	"cmp"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

// The actions of every client in every mode. A client may have more.
const (
	wholeDisk   = "whole disk"
	randomReads = "random"
	pastTheEnd  = "past the end"
	abruptDeath = "abrupt death"
)

var commonActions = []string{wholeDisk, randomReads, pastTheEnd, abruptDeath}

// peer is a client of another project.
type peer struct {
	name     string
	programs []string // the first is the client, and is asked for its version
	version  []string // arguments for that; --version if nil
	does     map[string]action
	also     map[mode]map[string]action // in some modes only
	cannot   map[string]string          // action → reason
	lacks    map[mode]string            // why not
	disk     func(t *testing.T, w *world) (vdi string)
}

// The reasons that several clients share.
const (
	asksWithGO  = "asks with GO, and no relay can refuse that inside TLS"
	knowsTheEnd = "knows the size, and sends nothing that goes beyond it"
)

var peers = []peer{qemuImg, qemuIO, nbdcopy, nbdinfo, nbdsh, nbdkit, fio, nbdClient}

// In the clear a relay that refuses GO, like an old server, makes clients use EXPORT_NAME.
func TestPeers(t *testing.T) {
	w := newWorld(t, `linger = "100ms"`) // or each death takes the default of 1.5 s
	content := randomBytes(1, diskSize)
	vdi := w.addVDI(t, content)
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			for _, program := range p.programs {
				requires.Tool(t, program)
			}
			p.logVersion(t, w)
			vdi := vdi
			if p.disk != nil {
				vdi = p.disk(t, w)
			}
			for _, secure := range []bool{false, true} {
				for _, old := range []bool{false, true} {
					p.runMode(t, w, mode{secure, old}, vdi, content)
				}
			}
		})
	}
}

var versionNumber = regexp.MustCompile(`\d+(\.\d+)+`)

// logVersion logs the version of the client for the report.
func (p peer) logVersion(t *testing.T, w *world) {
	t.Helper()
	args := p.version
	if args == nil {
		args = []string{"--version"}
	}
	x := &exchange{w: w, t: t}
	out, _ := x.command(p.programs[0], args...).CombinedOutput() // some call it a failure
	version := versionNumber.FindString(string(out))
	if version == "" {
		t.Errorf("no version in the output of %s:\n%s", p.programs[0], out)
	}
	t.Logf("peer: %s %s", p.name, version)
}

// runMode runs the actions of a client in a mode, and logs those that it does not have.
func (p peer) runMode(t *testing.T, w *world, m mode, vdi string, content []byte) {
	if why := p.lacks[m]; why != "" {
		t.Logf("n/a: %s/%v: %s", p.name, m, why)
		return
	}
	for _, actionName := range commonActions {
		if (p.does[actionName] == nil) == (p.cannot[actionName] == "") {
			t.Errorf("%s, %s: want either something to do or a reason why not", p.name, actionName)
		}
	}
	for _, actionName := range inOrder(p.cannot) {
		t.Logf("n/a: %s/%v/%s: %s", p.name, m, actionName, p.cannot[actionName])
	}
	actions := maps.Clone(p.does)
	maps.Copy(actions, p.also[m])
	t.Run(m.String(), func(t *testing.T) {
		for _, actionName := range inOrder(actions) {
			t.Run(actionName, func(t *testing.T) {
				if log, plugged := w.exchange(newExchange(t, w, m, vdi, content), actions[actionName]); plugged {
					m.wantOptions(t, log)
				}
			})
		}
	})
}

// inOrder returns the keys: first the actions of every client, then the others.
func inOrder[V any](m map[string]V) []string {
	place := func(actionName string) int {
		if i := slices.Index(commonActions, actionName); i >= 0 {
			return i
		}
		return len(commonActions)
	}
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return cmp.Or(cmp.Compare(place(a), place(b)), cmp.Compare(a, b))
	})
}

// exchange runs an action and checks that the service has released everything afterwards. It
// returns the service's log of the action, and whether there was a VBD.
func (w *world) exchange(x *exchange, act action) (log func() string, plugged bool) {
	before := len(w.service.log())
	log = func() string { return w.service.log()[before:] }
	defer func() {
		if x.t.Failed() {
			x.t.Logf("the service said:\n%s", log())
		}
	}()
	act(x)
	events := w.settled(x.t)
	if most := mostVBDs(x.t, events); most > 1 {
		x.t.Errorf("%d VBDs at one time, want 1 at most", most)
	}
	return log, len(events) > 0
}

// wantOptions checks in the service's log that the client has used this mode and no other.
func (m mode) wantOptions(t *testing.T, log func() string) {
	t.Helper()
	want, other := wire.OptGo, wire.OptExportName
	if m.old {
		want, other = other, want
	}
	asked := func(opt wire.Option) bool { return strings.Contains(log(), "opt="+opt.String()+" ") }
	eventually(t, func() (bool, string) { // the log comes through a pipe
		return asked(want) && asked(wire.OptStartTLS) == m.secure, "asked in another way than " + m.String()
	})
	if asked(other) {
		t.Errorf("asked with %v too", other)
	}
}
