package xapi

import "context"

// VMByUUID returns the VM with that uuid, or UUIDInvalid.
func (s *Session) VMByUUID(ctx context.Context, uuid string) (VMRef, error) {
	return getText[VMRef](ctx, s, "VM.get_by_uuid", uuid)
}

// VMNameLabel returns the name_label of a VM, which may be empty, or HandleInvalid.
func (s *Session) VMNameLabel(ctx context.Context, ref VMRef) (string, error) {
	return get[string](ctx, s, "VM.get_name_label", string(ref))
}
