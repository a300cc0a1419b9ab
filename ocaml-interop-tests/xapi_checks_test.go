package interop

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"xapi-nbd/xapi"
)

// xapiWires are the two forms of the answers of the xapi in OCaml.
var xapiWires = []struct{ name, wire string }{
	{"wire of xapi", "xapi"},
	{"wire of XmlRpc-Light", "typed"},
}

var xapiChecks = []struct {
	name    string
	booting int
	check   func(t *testing.T, h *host)
}{
	{name: "session", check: sessionLife},
	{name: "session without permissions", check: sessionWithoutPermissions},
	{name: "dead session", check: deadSession},
	{name: "network purposes", check: networkPurposes},
	{name: "VM and VDI by uuid", check: lookups},
	{name: "VDI record", check: vdiRecord},
	{name: "life of a VBD", check: vbdLife},
	{name: "VBDs of the control domain", check: vbdsOfVM},
	{name: "text that needs escaping", check: unusualText},
	{name: "errors of VBD.create", check: createErrors},
	{name: "errors of VBD.plug", check: plugErrors},
	{name: "calls at once", check: callsAtOnce},
	{name: "host that boots", booting: 2, check: bootingHost},
	{name: "restart", check: restart},
}

func TestXapi(t *testing.T) {
	xapiProgram.build(t) // or skips all
	t.Run("xapi in OCaml", func(t *testing.T) {
		for _, w := range xapiWires {
			t.Run(w.name, func(t *testing.T) {
				for _, c := range xapiChecks {
					t.Run(c.name, func(t *testing.T) {
						h := startHost(t, w.wire, c.booting)
						t.Log("peer: " + h.facts["peer"])
						c.check(t, h)
					})
				}
			})
		}
	})
}

func sessionLife(t *testing.T, h *host) {
	s := h.login(t)
	uuid, err := s.UUID(t.Context())
	if err != nil || !xapi.IsUUID(uuid) {
		t.Errorf("UUID: got %q and error %v", uuid, err)
	}
	got, err := s.Record(t.Context())
	if diff := cmp.Diff(xapi.SessionRecord{UUID: uuid, IsLocalSuperuser: true}, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
		t.Errorf("Record: error %v, difference (-want +got):\n%s", err, diff)
	}
	other := h.login(t)
	if other.Ref() == s.Ref() {
		t.Error("two logins gave the same session")
	}
	if err := s.Logout(t.Context()); err != nil {
		t.Error(err)
	}
	_, err = s.UUID(t.Context())
	wantFailure(t, err, xapi.SessionInvalid, withheld)
	wantFailure(t, s.Logout(t.Context()), xapi.SessionInvalid, withheld)
	if _, err := other.UUID(t.Context()); err != nil {
		t.Errorf("the other session: %v", err)
	}
}

// A session with a read-only role.
func sessionWithoutPermissions(t *testing.T, h *host) {
	s := h.client.Bind(xapi.SessionRef(h.facts["read-only"]))
	got, err := s.Record(t.Context())
	if err != nil || got.IsLocalSuperuser || got.Pool {
		t.Errorf("Record: got %+v, error %v", got, err)
	}
	if !slices.Contains(got.RBACPermissions, "vdi.get_record") || slices.Contains(got.RBACPermissions, "vbd.plug") {
		t.Errorf("permissions %q", got.RBACPermissions)
	}
	_, err = s.CreateVBD(t.Context(), xapi.VBDSpec{VM: h.dom0(t, s), VDI: h.vdi(t, s, "disk")})
	wantFailure(t, err, xapi.RBACPermissionDenied, "vbd.create", "No permission in user session.")
	vbd := h.create(t, h.login(t), "disk", nil)
	wantFailure(t, s.PlugVBD(t.Context(), vbd), xapi.RBACPermissionDenied, "vbd.plug", "No permission in user session.")
	if r := record(t, s, vbd); r.CurrentlyAttached {
		t.Error("the VBD is attached all the same")
	}
}

func deadSession(t *testing.T, h *host) {
	const ref = "OpaqueRef:0b1c0000-0000-4000-8000-00000000dead"
	dead := h.client.Bind(ref)
	ctx := t.Context()
	_, err1 := dead.Record(ctx)
	_, err2 := dead.VDIByUUID(ctx, h.facts["disk"])
	_, err3 := dead.NetworkRecords(ctx)
	_, err4 := dead.CreateVBD(ctx, xapi.VBDSpec{})
	for _, err := range []error{err1, err2, err3, err4, dead.UnplugVBD(ctx, "OpaqueRef:x"), dead.Logout(ctx)} {
		wantFailure(t, err, xapi.SessionInvalid, withheld)
		if err != nil && strings.Contains(err.Error(), ref) {
			t.Errorf("the error tells the session: %v", err)
		}
	}
}

func networkPurposes(t *testing.T, h *host) {
	records, err := h.login(t).NetworkRecords(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for ref, r := range records {
		if !strings.HasPrefix(string(ref), "OpaqueRef:") || !xapi.IsUUID(r.UUID) {
			t.Errorf("network %s: %+v", ref, r)
		}
		var purposes []string
		for _, p := range r.Purpose {
			purposes = append(purposes, string(p))
		}
		got = append(got, strings.Join(purposes, ","))
	}
	slices.Sort(got)
	if want := []string{"", "a new one," + string(xapi.PurposeInsecureNBD), string(xapi.PurposeNBD)}; !slices.Equal(got, want) {
		t.Errorf("purposes: got %q, want %q", got, want)
	}
}

func lookups(t *testing.T, h *host) {
	s := h.login(t)
	ctx := t.Context()
	h.dom0(t, s)
	h.vdi(t, s, "disk")
	for _, uuid := range []string{"", "no uuid", h.facts["disk"] + "0", "ÄÖÜ <&>"} {
		_, err := s.VMByUUID(ctx, uuid)
		wantFailure(t, err, xapi.UUIDInvalid, "VM", uuid)
		_, err = s.VDIByUUID(ctx, uuid)
		wantFailure(t, err, xapi.UUIDInvalid, "VDI", uuid)
		_, err = s.VBDByUUID(ctx, uuid)
		wantFailure(t, err, xapi.UUIDInvalid, "VBD", uuid)
	}
	_, err := s.VDIRecord(ctx, "OpaqueRef:NULL")
	wantFailure(t, err, xapi.HandleInvalid, "VDI", "OpaqueRef:NULL")
	_, err = s.VBDUUID(ctx, "OpaqueRef:gone")
	wantFailure(t, err, xapi.HandleInvalid, "VBD", "OpaqueRef:gone")
}

func vdiRecord(t *testing.T, h *host) {
	s := h.login(t)
	got, err := s.VDIRecord(t.Context(), h.vdi(t, s, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	want := xapi.VDIRecord{
		UUID: h.facts["disk"], NameLabel: ` a <b> & "c" 'd'  ü  `, Type: "user", VirtualSize: 5 << 40,
		SR: xapi.SRRef(h.facts["sr"]), Location: h.facts["disk"], Managed: true, IsSnapshot: true,
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("VDI record (-want +got):\n%s", diff)
	}
}

func vbdLife(t *testing.T, h *host) {
	s := h.login(t)
	ctx := t.Context()
	config := map[string]string{"xapi-nbd": "installation nonce"}
	vbd := h.create(t, s, "disk", config)
	want := xapi.VBDRecord{
		VM: h.dom0(t, s), VDI: h.vdi(t, s, "disk"), UserDevice: "0", Mode: "RO", OtherConfig: config,
	}
	step := func(name string, change func()) {
		t.Helper()
		change()
		if diff := cmp.Diff(want, record(t, s, vbd), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("VBD after %s (-want +got):\n%s", name, diff)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	var err error
	step("create", func() {
		want.UUID, err = s.VBDUUID(ctx, vbd)
		must(err)
	})
	if found, err := s.VBDByUUID(ctx, want.UUID); err != nil || found != vbd {
		t.Errorf("VBDByUUID: got %s and error %v, want %s", found, err, vbd)
	}
	wantFailure(t, s.UnplugVBD(ctx, vbd), xapi.DeviceAlreadyDetached, string(vbd))
	step("plug", func() {
		must(s.PlugVBD(ctx, vbd))
		got := record(t, s, vbd)
		if !strings.HasPrefix(got.Device, "sm/backend/") || !strings.HasSuffix(got.Device, "/"+h.facts["disk"]) {
			t.Errorf("device %q", got.Device)
		}
		want.CurrentlyAttached, want.Device = true, got.Device
	})
	wantFailure(t, s.PlugVBD(ctx, vbd), xapi.DeviceAlreadyAttached, string(vbd))
	wantFailure(t, s.DestroyVBD(ctx, vbd), xapi.OperationNotAllowed,
		"VBD '"+want.UUID+"' still attached to '"+h.facts["dom0"]+"'")
	step("unplug", func() {
		must(s.UnplugVBD(ctx, vbd))
		want.CurrentlyAttached = false
	})
	must(s.DestroyVBD(ctx, vbd))
	_, err = s.VBDRecord(ctx, vbd)
	wantFailure(t, err, xapi.HandleInvalid, "VBD", string(vbd))
	wantFailure(t, s.UnplugVBD(ctx, vbd), xapi.HandleInvalid, "VBD", string(vbd))
	_, err = s.VBDByUUID(ctx, want.UUID)
	wantFailure(t, err, xapi.UUIDInvalid, "VBD", want.UUID)
}

func vbdsOfVM(t *testing.T, h *host) {
	s := h.login(t)
	ctx := t.Context()
	dom0 := h.dom0(t, s)
	want := map[xapi.VBDRef]string{}
	check := func() {
		t.Helper()
		records, err := s.VBDsOfVM(ctx, dom0)
		got := map[xapi.VBDRef]string{}
		for ref, r := range records {
			got[ref] = r.UserDevice
		}
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("got %v and error %v, want %v", got, err, want)
		}
	}
	check()
	first := h.create(t, s, "disk", nil)
	second := h.create(t, s, "missing", nil)
	want[first], want[second] = "0", "1"
	check()
	if err := s.DestroyVBD(ctx, first); err != nil {
		t.Error(err)
	}
	delete(want, first)
	check()
	want[h.create(t, s, "no-pbd", nil)] = "0"
	check()
	if others, err := s.VBDsOfVM(ctx, "OpaqueRef:another"); err != nil || len(others) != 0 {
		t.Errorf("VBDs of another VM: got %v, error %v", others, err)
	}
}

func unusualText(t *testing.T, h *host) {
	s := h.login(t)
	config := map[string]string{
		"markup": `</value><!-- & "quoted" 'so' -->`, "entity": "&amp; &lt;", "empty": "", "umlaut": "Größe ☃ 🖴",
	}
	vbd := h.create(t, s, "disk", config)
	if diff := cmp.Diff(config, record(t, s, vbd).OtherConfig); diff != "" {
		t.Errorf("other_config (-want +got):\n%s", diff)
	}
}

func createErrors(t *testing.T, h *host) {
	s := h.login(t)
	ctx := t.Context()
	dom0, disk := h.dom0(t, s), h.vdi(t, s, "disk")
	_, err := s.CreateVBD(ctx, xapi.VBDSpec{VM: "OpaqueRef:x", VDI: disk})
	wantFailure(t, err, xapi.HandleInvalid, "VM", "OpaqueRef:x")
	_, err = s.CreateVBD(ctx, xapi.VBDSpec{VM: dom0, VDI: "OpaqueRef:y"})
	wantFailure(t, err, xapi.HandleInvalid, "VDI", "OpaqueRef:y")
	_, err = s.CreateVBD(ctx, xapi.VBDSpec{VM: dom0, VDI: h.vdi(t, s, "cbt")})
	wantFailure(t, err, xapi.VDIIncompatibleType, h.facts["cbt-ref"], "CBT metadata")
	if records, err := s.VBDsOfVM(ctx, dom0); err != nil || len(records) != 0 {
		t.Errorf("VBDs afterwards: got %v, error %v", records, err)
	}
}

func plugErrors(t *testing.T, h *host) {
	s := h.login(t)
	tests := []struct {
		vdi    string
		code   xapi.ErrorCode
		params func(vbd string) []string
	}{
		{"in-use", xapi.VDIInUse, func(string) []string { return []string{h.facts["in-use-ref"], "resize"} }},
		{"in-use-by-sm", xapi.VDIInUse, func(string) []string { return nil }},
		{"unmanaged", xapi.VDINotManaged, func(vbd string) []string { return []string{vbd} }},
		{"missing", xapi.VDIMissing, func(string) []string { return []string{h.facts["sr"], h.facts["missing-ref"]} }},
		{"no-pbd", xapi.SRHasNoPBDs, func(string) []string { return []string{h.facts["sr"]} }},
		{"elsewhere", xapi.SRBackendFailure, func(string) []string {
			return []string{"", "The VDI is not available [opterr=VDI not detached cleanly]", ""}
		}},
	}
	for _, tt := range tests {
		vbd := h.create(t, s, tt.vdi, nil)
		wantFailure(t, s.PlugVBD(t.Context(), vbd), tt.code, tt.params(string(vbd))...)
		if r := record(t, s, vbd); r.CurrentlyAttached || r.Device != "" {
			t.Errorf("%s: got %+v after a plug that failed", tt.vdi, r)
		}
		if err := s.DestroyVBD(t.Context(), vbd); err != nil {
			t.Error(err)
		}
	}
}

func callsAtOnce(t *testing.T, h *host) {
	s := h.login(t)
	dom0, disk := h.dom0(t, s), h.vdi(t, s, "disk")
	refs := make([]xapi.VBDRef, 32)
	var wg sync.WaitGroup
	for i := range refs {
		wg.Go(func() {
			var err error
			refs[i], err = s.CreateVBD(t.Context(), xapi.VBDSpec{VM: dom0, VDI: disk})
			if err == nil {
				err = s.PlugVBD(t.Context(), refs[i])
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	records, err := s.VBDsOfVM(t.Context(), dom0)
	if err != nil || len(records) != len(refs) {
		t.Errorf("got %d VBDs and error %v, want %d", len(records), err, len(refs))
	}
	for _, ref := range refs {
		if !records[ref].CurrentlyAttached {
			t.Errorf("VBD %s is not attached", ref)
		}
	}
}

// A host that is starting refuses with xapi's errors until it has started.
func bootingHost(t *testing.T, h *host) {
	_, err := h.client.Login(t.Context(), "interop")
	wantFailure(t, err, xapi.HostStillBooting)
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	s, err := h.client.WaitLogin(ctx, "interop")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.UUID(t.Context()); err != nil {
		t.Error(err)
	}
}

// While xapi is not running nothing is sent; after its start no session is valid.
func restart(t *testing.T, h *host) {
	s := h.login(t)
	h.stop()
	_, err := s.UUID(t.Context())
	var unanswered *xapi.TransportError
	if !errors.As(err, &unanswered) || unanswered.Sent {
		t.Errorf("without xapi: got error %v, want that nothing was sent", err)
	}
	h.start(t, 0)
	_, err = s.UUID(t.Context())
	wantFailure(t, err, xapi.SessionInvalid, withheld)
	h.login(t)
}
