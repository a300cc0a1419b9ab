package xapi

import "context"

// NetworkPurpose is a purpose of a network. This service ignores values that are not listed
// here.
type NetworkPurpose string

// The purposes that allow NBD.
const (
	PurposeNBD         NetworkPurpose = "nbd"          // with TLS
	PurposeInsecureNBD NetworkPurpose = "insecure_nbd" // without
)

// NetworkRecord is the part of network.get_record that the service uses.
type NetworkRecord struct {
	UUID    string           `xmlrpc:"uuid"`
	Purpose []NetworkPurpose `xmlrpc:"purpose"` // mostly empty
}

// NetworkRecords returns all networks of the pool.
func (s *Session) NetworkRecords(ctx context.Context) (map[NetworkRef]NetworkRecord, error) {
	all, err := records[NetworkRef, NetworkRecord](get[map[string]NetworkRecord](ctx, s, "network.get_all_records"))
	if unreadable(err) {
		return eachRecord(ctx, s.networkRecord, func() ([]NetworkRef, error) { return get[[]NetworkRef](ctx, s, "network.get_all") })
	}
	return all, err
}

func (s *Session) networkRecord(ctx context.Context, ref NetworkRef) (NetworkRecord, error) {
	r, err := get[NetworkRecord](ctx, s, "network.get_record", string(ref))
	if unreadable(err) {
		f := newFields(ctx, s, "network", string(ref), err)
		ask(f, &r.UUID, "uuid")
		ask(f, &r.Purpose, "purpose")
		return r, f.err
	}
	return r, err
}
