package xapitest

import (
	"slices"
	"strings"
)

// Role is the role of a session. Each role has the permissions of the later ones.
type Role int

const (
	// RoleRoot is the local superuser, whose list of permissions is empty.
	RoleRoot Role = iota
	// RolePoolAdmin may do everything, by its list of permissions.
	RolePoolAdmin
	// RoleVMAdmin may export disks: it is the weakest one allowed to create and plug VBDs.
	RoleVMAdmin
	// RoleVMOperator may not create VBDs.
	RoleVMOperator
	// RoleReadOnly may call getters, log in and log out.
	RoleReadOnly
)

// rolesFrom names the roles of xapi that include the weakest one given.
var rolesFrom = map[Role]string{
	RolePoolAdmin:  "pool-admin",
	RoleVMAdmin:    "pool-admin, pool-operator, vm-power-admin, vm-admin",
	RoleVMOperator: "pool-admin, pool-operator, vm-power-admin, vm-admin, vm-operator",
	RoleReadOnly:   "pool-admin, pool-operator, vm-power-admin, vm-admin, vm-operator, read-only",
}

// checkRole is xapi's RBAC check. The permission's name is the method's in lower case.
func checkRole(s *sessionObject, m *method) error {
	if s.role <= m.role {
		return nil
	}
	return &failure{"RBAC_PERMISSION_DENIED", []string{
		strings.ToLower(m.name),
		"No permission in user session. (Roles with this permission: " + rolesFrom[m.role] + ")",
	}}
}

// permissions is rbac_permissions of a session: empty for the local superuser.
func permissions(role Role) array {
	var names []string
	if role != RoleRoot {
		for name, m := range methods {
			if m.session && role <= m.role {
				names = append(names, strings.ToLower(name))
			}
		}
	}
	slices.Sort(names)
	return stringArray(names)
}
