package xapitest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSessions(t *testing.T) {
	h := start(t, Config{})
	local := mustString(t, h, loginMethod, "", "", "1.0", "xapi-nbd")
	if got := h.Sessions(); got != 1 {
		t.Errorf("sessions: got %d, want 1", got)
	}
	if got := must(t, h, "session.get_is_local_superuser", local, local); got != true {
		t.Errorf("is_local_superuser: got %v, want true", got)
	}
	if got := must(t, h, "session.get_rbac_permissions", local, local).(array); len(got) != 0 {
		t.Errorf("permissions of root: got %v, want none", got)
	}
	record := must(t, h, "session.get_record", local, local).(structure)
	for name, want := range map[string]any{"originator": "xapi-nbd", "this_host": h.host.ref, "pool": false, "this_user": nullRef} {
		if got, _ := record.get(name); got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	client := h.NewSession(RoleVMAdmin)
	if got := must(t, h, "session.get_rbac_permissions", client, client).(array); !slices.Contains(got, any("vbd.plug")) {
		t.Errorf("permissions of vm-admin: got %v, want vbd.plug among them", got)
	}
	if want := []Call{{loginMethod, true}, {"session.get_is_local_superuser", true}}; !slices.Equal(h.Calls()[:2], want) {
		t.Errorf("calls: got %v, want %v", h.Calls()[:2], want)
	}
	if last := h.Calls()[len(h.Calls())-1]; last.Local {
		t.Errorf("the client's call: got %v, want not local", last)
	}
	h.ResetCalls()
	if got := h.Calls(); len(got) != 0 {
		t.Errorf("calls after reset: got %v", got)
	}

	must(t, h, "session.logout", local)
	mustFail(t, h, []string{"SESSION_INVALID", local}, "session.logout", local)
	h.ExpireSession(client)
	mustFail(t, h, []string{"SESSION_INVALID", client}, "session.get_uuid", client, client)
	if got := h.Sessions(); got != 0 {
		t.Errorf("sessions: got %d, want 0", got)
	}
}

// TestSessionRecord: the lowest role may read the permissions of its session.
func TestSessionRecord(t *testing.T) {
	h := start(t, Config{})
	for role, root := range map[Role]bool{RoleRoot: true, RoleReadOnly: false} {
		s := h.NewSession(role)
		record := must(t, h, "session.get_record", s, s).(structure)
		for name, want := range map[string]any{"uuid": must(t, h, "session.get_uuid", s, s), "is_local_superuser": root, "pool": false} {
			if got, _ := record.get(name); got != want {
				t.Errorf("role %d, %s: got %v, want %v", role, name, got, want)
			}
		}
		permissions, _ := record.get("rbac_permissions")
		if got := slices.Contains(permissions.(array), any("session.get_record")); got == root {
			t.Errorf("role %d: got permissions %v, want none of root's and the getters of others", role, permissions)
		}
		if slices.Contains(permissions.(array), any("vbd.plug")) {
			t.Errorf("role %d: got permissions %v, want no vbd.plug", role, permissions)
		}
		h.ExpireSession(s)
		for _, method := range []string{"session.get_record", "session.get_uuid"} {
			mustFail(t, h, []string{"SESSION_INVALID", s}, method, s, s)
		}
	}
}

func TestRoles(t *testing.T) {
	h := start(t, Config{})
	root := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{})
	vbd := createVBD(t, h, root, uuid)
	st := vbdStruct(t, h, root, uuid)
	for _, role := range []Role{RoleRoot, RolePoolAdmin, RoleVMAdmin, RoleVMOperator, RoleReadOnly} {
		s := h.NewSession(role)
		must(t, h, "VDI.get_by_uuid", s, uuid)
		may := role <= RoleVMAdmin
		if may {
			must(t, h, "VBD.destroy", s, mustString(t, h, "VBD.create", s, st))
			must(t, h, "VDI.get_nbd_info", s, st["VDI"])
			continue
		}
		denied := func(permission string) []string {
			return []string{"RBAC_PERMISSION_DENIED", permission, "No permission in user session. (Roles with this permission: pool-admin, pool-operator, vm-power-admin, vm-admin)"}
		}
		mustFail(t, h, denied("vbd.create"), "VBD.create", s, st)
		mustFail(t, h, denied("vbd.plug"), "VBD.plug", s, vbd)
		mustFail(t, h, denied("vbd.destroy"), "VBD.destroy", s, "no such VBD") // role before object
		mustFail(t, h, denied("vdi.get_nbd_info"), "VDI.get_nbd_info", s, st["VDI"])
	}
}

// TestRecords calls every getter, so that each has its member.
func TestRecords(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleReadOnly)
	root := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{NameLabel: "disk"})
	h.AddNetwork("nbd")
	vm, err := h.AddVM("web")
	if err != nil {
		t.Fatal(err)
	}
	refs := map[string]string{
		"VM_metrics": mustString(t, h, "VM.get_metrics", s, mustString(t, h, "VM.get_by_uuid", s, vm)),
		"session":    s, "VM": h.dom0.ref, "host": h.host.ref, "pool": h.pool.ref,
		"VBD": createVBD(t, h, root, uuid), "VDI": mustString(t, h, "VDI.get_by_uuid", s, uuid),
		"network": must(t, h, "network.get_all", s).(array)[0].(string),
		"SR":      h.sr.ref,
	}
	for class, names := range memberNames {
		record := must(t, h, class+".get_record", s, refs[class]).(structure)
		for _, name := range names {
			if _, ok := record.get(name); !ok {
				t.Errorf("%s: no member %s", class, name)
				continue
			}
			must(t, h, class+".get_"+name, s, refs[class])
		}
	}
	for class, members := range map[string]int{"session": 16, "VDI": 32, "VBD": 22, "network": 16} {
		if got := len(must(t, h, class+".get_record", s, refs[class]).(structure)); got != members {
			t.Errorf("%s: got %d members, want %d", class, got, members)
		}
	}
	if got := must(t, h, "host.get_control_domain", s, mustString(t, h, "host.get_by_uuid", s, h.InstallationUUID())); got != h.dom0.ref {
		t.Errorf("control domain: got %v", got)
	}
	if got := must(t, h, "pool.get_all", s).(array); len(got) != 1 || must(t, h, "pool.get_master", s, got[0]) != h.host.ref {
		t.Errorf("pools: got %v", got)
	}
}

func TestNetworksAndNBDInfo(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleVMAdmin)
	uuid := addVDI(t, h, VDISpec{})
	vdi := mustString(t, h, "VDI.get_by_uuid", s, uuid)
	network := h.AddNetwork()
	if got := must(t, h, "VDI.get_nbd_info", s, vdi).(array); len(got) != 0 {
		t.Errorf("without a purpose: got %v, want none", got)
	}
	h.SetPurposes(network, "nbd", "insecure_nbd")
	for _, m := range must(t, h, "network.get_all_records", s).(structure) {
		if got, _ := m.value.(structure).get("purpose"); len(got.(array)) != 2 || got.(array)[1] != "insecure_nbd" {
			t.Errorf("purpose: got %v", got)
		}
	}
	infos := must(t, h, "VDI.get_nbd_info", s, vdi).(array)
	if len(infos) != 1 {
		t.Fatalf("got %d infos, want 1", len(infos))
	}
	if got, _ := infos[0].(structure).get("exportname"); got != h.ExportName(uuid, s) || got != "/"+uuid+"?session_id="+s {
		t.Errorf("exportname: got %v", got)
	}
}

func TestInventory(t *testing.T) {
	h := start(t, Config{})
	b, err := os.ReadFile(h.Inventory())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"INSTALLATION_UUID='" + h.InstallationUUID() + "'\n", "CONTROL_DOMAIN_UUID='" + h.ControlDomainUUID() + "'\n"} {
		if !strings.Contains(string(b), line) {
			t.Errorf("got %q, want the line %q", b, line)
		}
	}
}

func TestDataDestroy(t *testing.T) {
	h := start(t, Config{})
	s := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{})
	vdi := mustString(t, h, "VDI.get_by_uuid", s, uuid)
	vbd := createVBD(t, h, s, uuid)

	h.cfg.DataDestroyWait = 20 * time.Millisecond
	mustFail(t, h, []string{"VDI_IN_USE", vdi, "data_destroy"}, "VDI.data_destroy", s, vdi)
	if got := must(t, h, "VDI.get_type", s, vdi); got != "user" {
		t.Errorf("type after failure: got %v, want user", got)
	}

	h.cfg.DataDestroyWait = time.Minute
	h.ResetCalls()
	done := make(chan []string, 1)
	go func() {
		_, failed, err := try(t, h, "VDI.data_destroy", s, vdi)
		if err != nil {
			failed = []string{err.Error()}
		}
		done <- failed
	}()
	waitCalls(t, h, 1)
	must(t, h, "VBD.destroy", s, vbd)
	if failed := <-done; failed != nil {
		t.Errorf("got %q, want success once the VBD is gone", failed)
	}
	if got := must(t, h, "VDI.get_type", s, vdi); got != "cbt_metadata" {
		t.Errorf("type: got %v, want cbt_metadata", got)
	}
	mustFail(t, h, []string{"VDI_INCOMPATIBLE_TYPE", vdi, "CBT metadata"}, "VDI.get_nbd_info", s, vdi)
	must(t, h, "VDI.data_destroy", s, vdi)
}

// waitCalls waits until n calls have arrived since the last ResetCalls.
func waitCalls(t *testing.T, h *Host, n int) {
	t.Helper()
	waitFor(t, h, func([]VBD) bool { return len(h.Calls()) >= n })
}

func waitFor(t *testing.T, h *Host, condition func([]VBD) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := h.Wait(ctx, condition); err != nil {
		t.Fatal(err)
	}
}

func TestRestartStopResume(t *testing.T) {
	h := start(t, Config{})
	s := mustString(t, h, loginMethod, "", "")
	vbd := createVBD(t, h, s, addVDI(t, h, VDISpec{}))
	idle := dial(t, h)

	h.Restart()
	if _, err := io.ReadAll(idle); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("idle connection: got %v, want that it broke", err)
	}
	mustFail(t, h, []string{"SESSION_INVALID", s}, "VBD.plug", s, vbd)
	if h.Sessions() != 0 || len(h.VBDs()) != 1 {
		t.Errorf("after Restart: got %d sessions and %d VBDs, want 0 and 1", h.Sessions(), len(h.VBDs()))
	}

	s = mustString(t, h, loginMethod, "", "")
	h.Stop()
	if _, err := net.Dial("unix", h.Socket()); err == nil {
		t.Error("dialling after Stop: got a connection")
	}
	if _, err := os.Stat(h.Socket()); !os.IsNotExist(err) {
		t.Errorf("the socket after Stop: got %v, want that it does not exist", err)
	}
	for range 2 {
		if err := h.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	must(t, h, "session.get_uuid", s, s)
}

// TestDropConnections: all of them break, but nothing else.
func TestDropConnections(t *testing.T) {
	h := start(t, Config{})
	s := mustString(t, h, loginMethod, "", "")
	wantBroken := func(conn net.Conn) {
		t.Helper()
		if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v, want that the connection broke", err)
		}
	}
	idle := dial(t, h)
	h.DropConnections()
	wantBroken(idle)

	h.mu.Lock() // one more is accepted, the others are not
	waiting := []net.Conn{dial(t, h), dial(t, h), dial(t, h)}
	h.breakConnections()
	h.mu.Unlock()
	for _, conn := range waiting {
		wantBroken(conn)
	}
	must(t, h, "session.get_uuid", s, s)

	h.Stop()
	h.DropConnections()
	if _, err := net.Dial("unix", h.Socket()); err == nil {
		t.Error("dialling a stopped host: got a connection")
	}
}

// TestLongPath: the error names the cause, of which the kernel's EINVAL says nothing.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "more than a unix socket can have") {
		t.Errorf("got %v", err)
	}
}

func TestWait(t *testing.T) {
	h := start(t, Config{})
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	never := func([]VBD) bool { return false }
	if err := h.Wait(ctx, never); !errors.Is(err, cause) {
		t.Errorf("got %v, want the cause", err)
	}
	_ = h.Close()
	if err := h.Wait(t.Context(), never); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: got %v, want %v", err, net.ErrClosed)
	}
}
