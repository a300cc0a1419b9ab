package xapitest

import "time"

const loginMethod = "session.login_with_password"

func sessionMethods() []*method {
	ms := []*method{
		{name: loginMethod, params: []kind{text, text}, optional: []kind{text, text}, role: RoleReadOnly, run: login},
		{name: "session.logout", session: true, role: RoleReadOnly, run: func(h *Host, c *call) (any, error) {
			delete(h.sessions, c.session.ref)
			h.notify()
			return "", nil
		}},
	}
	return append(ms, recordMethods("session", func(h *Host, ref string) structure {
		if s := h.sessions[ref]; s != nil {
			return h.sessionRecord(s)
		}
		return nil
	})...)
}

// login never checks credentials: a caller on the unix socket is local root.
func login(h *Host, c *call) (any, error) {
	s := &sessionObject{object: newObject(), role: RoleRoot, local: true, login: time.Now()}
	if len(c.args) > 3 {
		s.originator = c.text(3)
	}
	h.sessions[s.ref] = s
	h.notify()
	return s.ref, nil
}

func (h *Host) sessionRecord(s *sessionObject) structure {
	user := ""
	if s.role != RoleRoot {
		user = "user@example.org"
	}
	return structure{
		{"uuid", s.uuid},
		{"this_host", h.host.ref},
		{"this_user", nullRef},
		{"last_active", dateTimeOf(s.login)},
		{"pool", false},
		{"other_config", mapValue(s.otherConfig)},
		{"is_local_superuser", s.role == RoleRoot},
		{"subject", nullRef},
		{"validation_time", dateTimeOf(s.login)},
		{"auth_user_sid", ""},
		{"auth_user_name", user},
		{"rbac_permissions", permissions(s.role)},
		{"tasks", array{}},
		{"parent", nullRef},
		{"originator", s.originator},
		{"client_certificate", false},
	}
}
