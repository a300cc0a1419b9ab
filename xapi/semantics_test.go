package xapi_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// host starts a simulated host and a client of it.
func host(t *testing.T) (*xapitest.Host, *xapi.Client) {
	t.Helper()
	h, err := xapitest.Start(xapitest.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("close host: %v", err)
		}
	})
	c := xapi.New(xapi.Config{Socket: h.Socket(), CallTimeout: 20 * time.Second, MutateTimeout: 20 * time.Second})
	t.Cleanup(c.Close)
	return h, c
}

func login(t *testing.T, c *xapi.Client) *xapi.Session {
	t.Helper()
	s, err := c.Login(t.Context(), "xapi-nbd")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func addVDI(t *testing.T, h *xapitest.Host, label string) string {
	t.Helper()
	uuid, err := h.AddVDI(xapitest.VDISpec{Size: 1 << 20, NameLabel: label})
	if err != nil {
		t.Fatal(err)
	}
	return uuid
}

// spec returns the VBDSpec that offers the VDI to the control domain.
func spec(t *testing.T, h *xapitest.Host, s *xapi.Session, vdiUUID string) xapi.VBDSpec {
	t.Helper()
	vm, err := s.VMByUUID(t.Context(), h.ControlDomainUUID())
	if err != nil {
		t.Fatal(err)
	}
	vdi, err := s.VDIByUUID(t.Context(), vdiUUID)
	if err != nil {
		t.Fatal(err)
	}
	return xapi.VBDSpec{VM: vm, VDI: vdi, OtherConfig: map[string]string{"xapi-nbd": "test", "note": ` <&"' é `}}
}

func TestLoginAndLogout(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	if n := h.Sessions(); n != 1 {
		t.Errorf("got %d sessions, want 1", n)
	}
	if uuid, err := s.UUID(t.Context()); err != nil || len(uuid) != 36 {
		t.Errorf("got uuid %q, %v", uuid, err)
	}
	record, err := s.Record(t.Context())
	if err != nil || !record.IsLocalSuperuser || len(record.RBACPermissions) != 0 {
		t.Errorf("got %+v, %v, want a local superuser without a list", record, err)
	}
	if err := s.Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := h.Sessions(); n != 0 {
		t.Errorf("got %d sessions, want none", n)
	}
	if err := s.Logout(t.Context()); !errors.Is(err, xapi.SessionInvalid) {
		t.Errorf("second logout: got %v, want SESSION_INVALID", err)
	}
}

func TestVBDCreateToDestroy(t *testing.T) {
	h, c := host(t)
	ctx := t.Context()
	uuid := addVDI(t, h, "a <fault>text</fault> & 'more' ")
	s := login(t, c)
	want := spec(t, h, s, uuid)

	vdi, err := s.VDIRecord(ctx, want.VDI)
	if err != nil {
		t.Fatal(err)
	}
	if vdi.UUID != uuid || vdi.VirtualSize != 1<<20 || vdi.NameLabel != "a <fault>text</fault> & 'more' " || !vdi.Managed || vdi.Missing || vdi.Type != "user" || vdi.SR == "" {
		t.Errorf("got VDI %+v", vdi)
	}

	vbd, err := s.CreateVBD(ctx, want)
	if err != nil {
		t.Fatal(err)
	}
	record, err := s.VBDRecord(ctx, vbd)
	if err != nil {
		t.Fatal(err)
	}
	if record.VM != want.VM || record.VDI != want.VDI || record.CurrentlyAttached || record.Mode != "RO" {
		t.Errorf("got created VBD %+v", record)
	}
	if diff := cmp.Diff(want.OtherConfig, record.OtherConfig); diff != "" {
		t.Errorf("other_config (-want +got):\n%s", diff)
	}
	if got, err := s.VBDUUID(ctx, vbd); err != nil || got != record.UUID {
		t.Errorf("got uuid %q, %v, want %q", got, err, record.UUID)
	}
	if got, err := s.VBDByUUID(ctx, record.UUID); err != nil || got != vbd {
		t.Errorf("got ref %q, %v, want %q", got, err, vbd)
	}

	check := func(step string, err error, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", step, err, want)
		}
	}
	check("unplug before plug", s.UnplugVBD(ctx, vbd), xapi.DeviceAlreadyDetached)
	check("plug", s.PlugVBD(ctx, vbd), nil)
	check("second plug", s.PlugVBD(ctx, vbd), xapi.DeviceAlreadyAttached)
	check("destroy while attached", s.DestroyVBD(ctx, vbd), xapi.OperationNotAllowed)
	if record, err := s.VBDRecord(ctx, vbd); err != nil || !record.CurrentlyAttached || record.Device == "" {
		t.Errorf("got plugged VBD %+v, %v", record, err)
	}
	all, err := s.VBDsOfVM(ctx, want.VM)
	if err != nil || len(all) != 1 || all[vbd].UUID != record.UUID {
		t.Errorf("got VBDs %+v, %v, want the one", all, err)
	}
	check("unplug", s.UnplugVBD(ctx, vbd), nil)
	check("destroy", s.DestroyVBD(ctx, vbd), nil)
	check("destroy again", s.DestroyVBD(ctx, vbd), xapi.HandleInvalid)
	_, err = s.VBDByUUID(ctx, record.UUID)
	check("look up", err, xapi.UUIDInvalid)
	_, err = s.VDIByUUID(ctx, "no such thing")
	check("look up nonsense", err, xapi.UUIDInvalid)
}

func TestNetworkRecords(t *testing.T) {
	h, c := host(t)
	want := map[string][]xapi.NetworkPurpose{
		h.AddNetwork():      nil,
		h.AddNetwork("nbd"): {xapi.PurposeNBD},
		h.AddNetwork("insecure_nbd", "something_unknown"): {xapi.PurposeInsecureNBD, "something_unknown"},
	}
	records, err := login(t, c).NetworkRecords(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][]xapi.NetworkPurpose)
	for _, r := range records {
		if _, ours := want[r.UUID]; ours {
			got[r.UUID] = append([]xapi.NetworkPurpose(nil), r.Purpose...)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("purposes (-want +got):\n%s", diff)
	}
}

func TestRoles(t *testing.T) {
	h, c := host(t)
	uuid := addVDI(t, h, "")
	root := login(t, c)
	for role, allowed := range map[xapitest.Role]bool{
		xapitest.RoleRoot: true, xapitest.RolePoolAdmin: true, xapitest.RoleVMAdmin: true,
		xapitest.RoleVMOperator: false, xapitest.RoleReadOnly: false,
	} {
		s := c.Bind(xapi.SessionRef(h.NewSession(role)))
		vbd, err := s.CreateVBD(t.Context(), spec(t, h, s, uuid))
		if allowed {
			if err != nil {
				t.Errorf("role %v: %v", role, err)
			} else if err := root.DestroyVBD(t.Context(), vbd); err != nil {
				t.Error(err)
			}
			continue
		}
		e, ok := errors.AsType[*xapi.Error](err)
		if !ok || e.Code != xapi.RBACPermissionDenied || len(e.Params) == 0 || e.Params[0] != "vbd.create" {
			t.Errorf("role %v: got %v, want RBAC_PERMISSION_DENIED for vbd.create", role, err)
		}
	}
}

// A restart of xapi ends sessions, not the client: the next call connects anew.
func TestRestart(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	ref := string(s.Ref())
	h.Restart()
	_, err := s.UUID(t.Context())
	if !errors.Is(err, xapi.SessionInvalid) {
		t.Errorf("got %v, want SESSION_INVALID", err)
	}
	if err != nil && strings.Contains(err.Error(), ref) {
		t.Error("the error repeats the session ref")
	}
	if _, err := login(t, c).UUID(t.Context()); err != nil {
		t.Errorf("after a new login: %v", err)
	}
}

// After a lost reply Sent is true, the call is not repeated, and the VBD is found by its
// other_config.
func TestLostReplyOfCreate(t *testing.T) {
	h, c := host(t)
	ctx := t.Context()
	s := login(t, c)
	want := spec(t, h, s, addVDI(t, h, ""))
	h.ResetCalls()
	h.LoseReply("VBD.create")
	_, err := s.CreateVBD(ctx, want)
	if transport, ok := errors.AsType[*xapi.TransportError](err); !ok || !transport.Sent {
		t.Fatalf("got %v, want a TransportError with Sent", err)
	}
	if calls := h.Calls(); len(calls) != 1 {
		t.Errorf("got calls %v, want one VBD.create", calls)
	}
	all, err := s.VBDsOfVM(ctx, want.VM)
	if err != nil || len(all) != 1 {
		t.Fatalf("got %v, %v, want one VBD", all, err)
	}
	for ref, record := range all {
		if record.OtherConfig["xapi-nbd"] != "test" {
			t.Errorf("got other_config %v, want our mark", record.OtherConfig)
		}
		if err := s.DestroyVBD(ctx, ref); err != nil {
			t.Error(err)
		}
	}
}

// A call that was dropped before its execution has the same error, and getters are not
// repeated either.
func TestDroppedConnection(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	h.ResetCalls()
	h.DropConnection("session.get_uuid")
	_, err := s.UUID(t.Context())
	if transport, ok := errors.AsType[*xapi.TransportError](err); !ok || !transport.Sent {
		t.Errorf("got %v, want a TransportError with Sent", err)
	}
	if calls := h.Calls(); len(calls) != 1 {
		t.Errorf("got calls %v, want one", calls)
	}
	if _, err := s.UUID(t.Context()); err != nil {
		t.Errorf("the next call: %v", err)
	}
}

// When the context of a plug ends, xapi continues.
func TestAbandonedPlug(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	vbd, err := s.CreateVBD(t.Context(), spec(t, h, s, addVDI(t, h, "")))
	if err != nil {
		t.Fatal(err)
	}
	release := h.Block("VBD.plug")
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	arrived := make(chan error, 1)
	h.ResetCalls()
	go func() {
		arrived <- h.Wait(t.Context(), func([]xapitest.VBD) bool { return len(h.Calls()) > 0 })
		cancel()
	}()
	err = s.PlugVBD(ctx, vbd)
	if err := <-arrived; err != nil {
		t.Fatal(err)
	}
	if transport, ok := errors.AsType[*xapi.TransportError](err); !ok || !transport.Sent || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want a TransportError with Sent that matches context.Canceled", err)
	}
	release()
	if err := h.Wait(t.Context(), func(vbds []xapitest.VBD) bool { return vbds[0].CurrentlyAttached }); err != nil {
		t.Fatal(err)
	}
	if err := s.UnplugVBD(t.Context(), vbd); err != nil {
		t.Error(err)
	}
	if err := s.DestroyVBD(t.Context(), vbd); err != nil {
		t.Error(err)
	}
}

// Calls do not wait for each other, as they would in kolo's client.
func TestConcurrentCalls(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	vbd, err := s.CreateVBD(t.Context(), spec(t, h, s, addVDI(t, h, "")))
	if err != nil {
		t.Fatal(err)
	}
	release := h.Block("VBD.plug")
	plugged := make(chan error, 1)
	go func() { plugged <- s.PlugVBD(t.Context(), vbd) }()
	for range 20 {
		if _, err := s.UUID(t.Context()); err != nil {
			t.Error(err)
		}
	}
	release()
	if err := <-plugged; err != nil {
		t.Error(err)
	}
	if err := s.UnplugVBD(t.Context(), vbd); err != nil {
		t.Error(err)
	}
}

// TestWaitLoginWhileBooting: WaitLogin waits until the host has booted, after any error.
func TestWaitLoginWhileBooting(t *testing.T) {
	h, c := host(t)
	h.Fail("session.login_with_password", "UUID_INVALID", "host", "x")
	h.Booting(true)
	h.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		if c.N == 1 && c.After {
			h.Booting(false)
		}
		return xapitest.Proceed
	})
	s, err := c.WaitLogin(t.Context(), "xapi-nbd")
	if err != nil {
		t.Fatal(err)
	}
	if n := len(h.Calls()); n != 3 {
		t.Errorf("got %d logins, want 3: booting, UUID_INVALID, success", n)
	}
	if err := s.Logout(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestWaitLoginWithoutXapi(t *testing.T) {
	h, c := host(t)
	h.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := c.WaitLogin(ctx, "xapi-nbd")
	if _, ok := errors.AsType[*xapi.TransportError](err); !ok || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline and the last attempt", err)
	}
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
	if s, err := c.WaitLogin(t.Context(), "xapi-nbd"); err != nil {
		t.Error(err)
	} else if err := s.Logout(t.Context()); err != nil {
		t.Error(err)
	}
}
