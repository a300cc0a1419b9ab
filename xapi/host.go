package xapi

import "context"

// HostByUUID returns the host with that uuid, or UUIDInvalid.
func (s *Session) HostByUUID(ctx context.Context, uuid string) (HostRef, error) {
	return getText[HostRef](ctx, s, "host.get_by_uuid", uuid)
}

// ControlDomainOf returns the control domain of a host.
func (s *Session) ControlDomainOf(ctx context.Context, host HostRef) (VMRef, error) {
	return getText[VMRef](ctx, s, "host.get_control_domain", string(host))
}
