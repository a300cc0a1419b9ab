package xapi

import "context"

// VMByUUID returns the VM with that uuid, or UUIDInvalid. The service asks for
// the control domain only.
func (s *Session) VMByUUID(ctx context.Context, uuid string) (VMRef, error) {
	return getText[VMRef](ctx, s, "VM.get_by_uuid", uuid)
}
