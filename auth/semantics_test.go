package auth_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/auth"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

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
	c := xapi.New(xapi.Config{Socket: h.Socket(), CallTimeout: 20 * time.Second})
	t.Cleanup(c.Close)
	return h, c
}

// authorizer has a local session of its own.
func authorizer(c *xapi.Client) *auth.Authorizer {
	return auth.NewAuthorizer(c, xapi.NewLocal(c, "xapi-nbd"))
}

// request parses the export name of a client with that session.
func request(t *testing.T, h *xapitest.Host, ref string) auth.Request {
	t.Helper()
	const vdi = "7a2e8f00-1234-4abc-9def-0123456789ab"
	r, err := auth.ParseExportName(h.ExportName(vdi, ref))
	if err != nil {
		t.Fatal(err)
	}
	if r.VDI != vdi || string(r.Session) != ref {
		t.Fatalf("got a wrong request: VDI %q", r.VDI)
	}
	return r
}

func TestAuthorize(t *testing.T) {
	h, c := host(t)
	local := xapi.NewLocal(c, "xapi-nbd")
	if _, err := local.Epoch(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := auth.NewAuthorizer(c, local)
	tests := []struct {
		name    string
		role    xapitest.Role
		allowed bool
	}{
		{"root, whose list is empty", xapitest.RoleRoot, true},
		{"pool admin", xapitest.RolePoolAdmin, true},
		{"vm admin", xapitest.RoleVMAdmin, true},
		{"vm operator", xapitest.RoleVMOperator, false},
		{"read only", xapitest.RoleReadOnly, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ref := h.NewSession(tt.role)
			h.ResetCalls()
			s, err := a.Authorize(t.Context(), "peer", request(t, h, ref))
			want := []xapitest.Call{{Method: "session.get_record"}}
			if tt.allowed {
				want = append(want, xapitest.Call{Method: "session.get_uuid", Local: true})
			}
			if calls := h.Calls(); !slices.Equal(calls, want) {
				t.Errorf("got calls %v, want %v", calls, want)
			}
			if tt.allowed {
				if err != nil {
					t.Fatal(err)
				}
				if string(s.Session.Ref()) != ref {
					t.Error("got a session other than the client's")
				}
				return
			}
			e, ok := errors.AsType[*auth.PermissionError](err)
			if !ok || !errors.Is(err, auth.ErrPermission) || e.Permission != "vbd.create" || err.Error() != "missing permission vbd.create" {
				t.Errorf("got %v, want missing permission vbd.create", err)
			}
			if errors.Is(err, auth.ErrSession) || s.Session != nil {
				t.Errorf("got %v and session %v, want an error about the role alone", err, s)
			}
		})
	}
}

// Keys that xapi does not escape make the session's record unreadable as a whole: its
// permissions are found all the same, and no others.
func TestAuthorizeWithOddKeys(t *testing.T) {
	const endOfMap = `x</name><value>v</value></member></struct></value></member>` +
		`<member><name>is_local_superuser</name><value><boolean>1</boolean></value></member>` +
		`<member><name>y</name><value><struct><member><name>z`
	for _, key := range []string{"R&D <é>", endOfMap} {
		h, c := host(t)
		a := authorizer(c)
		allowed, denied := h.NewSession(xapitest.RoleVMAdmin), h.NewSession(xapitest.RoleReadOnly)
		for _, ref := range []string{allowed, denied} {
			h.SetSessionOtherConfig(ref, map[string]string{key: "x"})
		}
		if _, err := a.Authorize(t.Context(), "peer", request(t, h, allowed)); err != nil {
			t.Errorf("key %q: got %v, want the session accepted", key, err)
		}
		if _, err := a.Authorize(t.Context(), "peer", request(t, h, denied)); !errors.Is(err, auth.ErrPermission) {
			t.Errorf("key %q: got %v, want a missing permission", key, err)
		}
	}
}

func TestAuthorizeRejects(t *testing.T) {
	h, c := host(t)
	a := authorizer(c)
	expired := h.NewSession(xapitest.RoleRoot)
	h.ExpireSession(expired)
	for _, ref := range []string{expired, "OpaqueRef:NULL", "OpaqueRef:00000000-0000-4000-8000-000000000000", "garbage&;]]>", "é"} {
		_, err := a.Authorize(t.Context(), "peer", auth.Request{Session: xapi.SessionRef(ref)})
		e, ok := errors.AsType[*xapi.Error](err)
		if !errors.Is(err, auth.ErrSession) || !ok || e.Code != xapi.SessionInvalid || !errors.Is(err, xapi.SessionInvalid) {
			t.Errorf("got %v, want ErrSession and SESSION_INVALID", err)
			continue
		}
		if got, want := err.Error(), "session rejected by xapi (SESSION_INVALID)"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if strings.Contains(e.Error(), ref) {
			t.Errorf("the ref is in %q", e)
		}
	}
}

// TestAuthorizeOtherErrors: only xapi's errors about the session are ErrSession.
func TestAuthorizeOtherErrors(t *testing.T) {
	tests := []struct {
		name, code string
		params     []string
		rejected   bool
	}{
		{"destroyed meanwhile", "HANDLE_INVALID", []string{"session", "x"}, true},
		{"another handle", "HANDLE_INVALID", []string{"host", "x"}, false},
		{"handle without parameters", "HANDLE_INVALID", nil, false},
		{"broken text", "INVALID_VALUE", []string{"Invalid UTF-8 string in parameter", "x"}, true},
		{"booting", "HOST_STILL_BOOTING", nil, false},
		{"internal", "INTERNAL_ERROR", []string{"Db_exn"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			h.Fail("session.get_record", tt.code, tt.params...)
			_, err := authorizer(c).Authorize(t.Context(), "peer", request(t, h, h.NewSession(xapitest.RoleRoot)))
			if !errors.Is(err, xapi.ErrorCode(tt.code)) || errors.Is(err, auth.ErrSession) != tt.rejected {
				t.Errorf("got %v, want %s, ErrSession %v", err, tt.code, tt.rejected)
			}
		})
	}
	t.Run("unreachable", func(t *testing.T) {
		h, c := host(t)
		r := request(t, h, h.NewSession(xapitest.RoleRoot))
		h.Stop()
		_, err := authorizer(c).Authorize(t.Context(), "peer", r)
		if _, ok := errors.AsType[*xapi.TransportError](err); !ok || errors.Is(err, auth.ErrSession) {
			t.Errorf("got %v, want a TransportError", err)
		}
	})
}

func TestPurposeAsksAllNetworks(t *testing.T) {
	h, c := host(t)
	p := auth.NewNetworkPolicy(xapi.NewLocal(c, "xapi-nbd"), 0)
	check := func(calls int, want xapi.NetworkPurpose, wantErr error) {
		t.Helper()
		h.ResetCalls()
		if got, err := p.Purpose(t.Context()); got != want || !errors.Is(err, wantErr) {
			t.Errorf("got %q, %v, want %q, %v", got, err, want, wantErr)
		}
		if got := h.Calls(); len(got) != calls {
			t.Errorf("got calls %v, want %d", got, calls)
		}
		if n := h.Sessions(); n != 1 {
			t.Errorf("got %d local sessions, want one for all calls", n)
		}
	}
	check(2, "", auth.ErrNoPurpose) // login and call
	a := h.AddNetwork()
	b := h.AddNetwork("nbd")
	check(1, xapi.PurposeNBD, nil)
	h.SetPurposes(a, "insecure_nbd")
	check(1, "", auth.ErrConflictingPurpose)
	h.SetPurposes(b)
	check(1, xapi.PurposeInsecureNBD, nil)
	h.SetPurposes(a, "something_else")
	check(1, "", auth.ErrNoPurpose)
	h.Restart()
	check(3, "", auth.ErrNoPurpose) // the session is dead: login and call again
}

// TestPurposeFailures: a failure is not cached; the next caller calls again.
func TestPurposeFailures(t *testing.T) {
	h, c := host(t)
	h.AddNetwork("nbd")
	p := auth.NewNetworkPolicy(xapi.NewLocal(c, "xapi-nbd"), time.Hour)

	h.Fail("network.get_all_records", "INTERNAL_ERROR", "x")
	if _, err := p.Purpose(t.Context()); !errors.Is(err, xapi.InternalError) {
		t.Errorf("got %v, want INTERNAL_ERROR", err)
	}
	h.LoseReply("network.get_all_records")
	if _, err := p.Purpose(t.Context()); err == nil {
		t.Error("got no error for a lost reply")
	}
	h.Booting(true)
	if _, err := p.Purpose(t.Context()); !errors.Is(err, xapi.HostStillBooting) {
		t.Errorf("got %v, want HOST_STILL_BOOTING", err)
	}
	h.Booting(false)
	if got, err := p.Purpose(t.Context()); got != xapi.PurposeNBD || err != nil {
		t.Errorf("got %q, %v, want nbd", got, err)
	}
	h.Stop()
	if got, err := p.Purpose(t.Context()); got != xapi.PurposeNBD || err != nil {
		t.Errorf("xapi away, answer known: got %q, %v, want nbd", got, err)
	}
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
}
