package vdi_test

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// stagePaths are all sequences of stages of an attachment. run makes an attachment that must
// go through the stages in path, in this order.
var stagePaths = []struct {
	name   string
	path   string
	change func(*vdi.Config)
	run    func(f *fixture)
}{
	{"served and left", "creating recording plugging opening attached detaching forgetting gone", nil,
		func(f *fixture) { leave(f.attach(f.session(xapitest.RoleVMAdmin))) }},
	{"no such VDI", "creating detaching gone", nil, func(f *fixture) {
		f.host.Fail("VDI.get_by_uuid", "UUID_INVALID", "VDI", f.vdi)
		f.attachFails()
	}},
	{"create refused", "creating detaching forgetting gone", nil, func(f *fixture) {
		f.host.Fail("VBD.create", "INTERNAL_ERROR", "no")
		f.attachFails()
	}},
	{"answer to create lost", "creating detaching forgetting gone", nil, func(f *fixture) {
		f.host.LoseReply("VBD.create")
		f.attachFails()
	}},
	{"uuid not told", "creating recording detaching forgetting gone", nil, func(f *fixture) {
		f.host.Fail("VBD.get_uuid", "INTERNAL_ERROR", "no")
		f.attachFails()
	}},
	{"not recorded", "creating recording detaching forgetting gone", nil, func(f *fixture) {
		do(f.t, os.Mkdir(filepath.Join(f.stateDir, "VBDs_to_clean_up.new"), 0o700))
		f.attachFails()
	}},
	{"plug refused", "creating recording plugging detaching forgetting gone", nil, func(f *fixture) {
		f.host.Fail("VBD.plug", "INTERNAL_ERROR", "no")
		f.attachFails()
	}},
	{"answer to plug lost", "creating recording plugging opening attached detaching forgetting gone", nil, func(f *fixture) {
		f.host.LoseReply("VBD.plug")
		leave(f.attach(f.session(xapitest.RoleVMAdmin)))
	}},
	{"not opened", "creating recording plugging opening detaching forgetting gone", nil, func(f *fixture) {
		f.host.Fail("VBD.get_record", "INTERNAL_ERROR", "no")
		f.attachFails()
	}},
	{"nobody waits", "creating recording plugging opening detaching forgetting gone", nil, func(f *fixture) {
		release := f.block("VBD.plug")
		ctx, cancel := context.WithCancel(f.t.Context())
		failed := make(chan error)
		go func() {
			_, err := f.manager.Attach(ctx, f.session(xapitest.RoleVMAdmin), f.vdi)
			failed <- err
		}()
		f.wait("VBD.plug", f.called("VBD.plug", 1))
		cancel()
		<-failed
		release()
	}},
	{"lost and found", "creating recording plugging opening attached lingering attached detaching forgetting gone", lingers, func(f *fixture) {
		lose(f.attach(f.session(xapitest.RoleVMAdmin)))
		leave(f.attach(f.session(xapitest.RoleVMAdmin)))
	}},
	{"lost for good", "creating recording plugging opening attached lingering detaching forgetting gone", lingers,
		func(f *fixture) { lose(f.attach(f.session(xapitest.RoleVMAdmin))) }},
	{"taken away", "creating recording plugging opening attached lost detaching forgetting gone", nil, func(f *fixture) {
		d := f.attach(f.session(xapitest.RoleVMAdmin))
		do(f.t, os.Remove(filepath.Join(f.host.DeviceDir(), f.host.VBDs()[0].Device)))
		wantEnd(f.t, d)
		lose(d)
	}},
	{"detach fails", "creating recording plugging opening attached detaching left", nil, func(f *fixture) {
		f.host.Fail("VBD.unplug", "INTERNAL_ERROR", "no")
		leave(f.attach(f.session(xapitest.RoleVMAdmin)))
	}},
	{"entry stays", "creating recording plugging opening attached detaching forgetting left", nil, func(f *fixture) {
		d := f.attach(f.session(xapitest.RoleVMAdmin))
		obstacle := filepath.Join(f.stateDir, "VBDs_to_clean_up.new")
		do(f.t, os.Mkdir(obstacle, 0o700))
		leave(d)
		f.waitLeftovers(1)
		f.manager.Kill()
		do(f.t, os.Remove(obstacle))
		f.manager = f.open()
		f.recover()
	}},
}

func (f *fixture) attachFails() {
	f.t.Helper()
	if d, err := f.manager.Attach(f.t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi); err == nil {
		d.Close()
		f.t.Error("attached, and should not have been")
	}
}

// Each attachment goes through its path, and all paths together have every transition.
func TestStages(t *testing.T) {
	taken := make(map[string]bool)
	for _, tt := range stagePaths {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, func(c *vdi.Config) {
				if tt.change != nil {
					tt.change(c)
				}
			})
			var mu sync.Mutex
			path := []string{"creating"}
			f.manager.OnTransition(func(transition string) {
				mu.Lock()
				defer mu.Unlock()
				taken[transition] = true
				from, to, _ := strings.Cut(transition, " ")
				if last := path[len(path)-1]; from != last {
					t.Errorf("step from %s, but the attachment was %s", from, last)
				}
				path = append(path, to)
			})
			tt.run(f)
			f.closeManager()
			if got := strings.Join(path, " "); got != tt.path {
				t.Errorf("got  %s\nwant %s", got, tt.path)
			}
			f.wantClean()
		})
	}
	for _, transition := range vdi.Transitions() {
		if !taken[transition] {
			t.Errorf("no path has the transition %s", transition)
		}
		delete(taken, transition)
	}
	for transition := range taken {
		t.Errorf("%s is in a path, but not in the table", transition)
	}
}

// The package documentation lists the transitions that the program has.
func TestTransitionsOfTheDocumentation(t *testing.T) {
	source, err := os.ReadFile("doc.go")
	do(t, err)
	var drawn []string
	for _, m := range regexp.MustCompile(`(?m)^//\t(\w+) +──► (\w+) +\S.*$`).FindAllStringSubmatch(string(source), -1) {
		drawn = append(drawn, m[1]+" "+m[2])
	}
	if n := strings.Count(string(source), "──►"); n != len(drawn) {
		t.Errorf("%d transitions are listed, and this test can read %d of them", n, len(drawn))
	}
	transitions := vdi.Transitions()
	slices.Sort(transitions)
	slices.Sort(drawn)
	if !slices.Equal(drawn, transitions) {
		t.Errorf("documentation: %q\nprogram: %q", drawn, transitions)
	}
}
