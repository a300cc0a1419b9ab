package xapi

import "context"

// SRRecord is the part of SR.get_record that the service uses.
type SRRecord struct {
	UUID string `xmlrpc:"uuid"`
	Type string `xmlrpc:"type"` // of the storage manager's driver: "ext", "lvmoiscsi", …
}

// SRRecord returns the record of an SR, or HandleInvalid.
func (s *Session) SRRecord(ctx context.Context, ref SRRef) (SRRecord, error) {
	r, err := get[SRRecord](ctx, s, "SR.get_record", string(ref))
	if unreadable(err) {
		f := newFields(ctx, s, "SR", string(ref), err)
		ask(f, &r.UUID, "uuid")
		ask(f, &r.Type, "type")
		return r, f.err
	}
	return r, err
}
