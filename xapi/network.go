package xapi

import "context"

// NetworkPurpose is what a network may be used for. Values not listed here occur
// and mean nothing to this service.
type NetworkPurpose string

// The purposes that allow NBD.
const (
	PurposeNBD         NetworkPurpose = "nbd"          // with TLS
	PurposeInsecureNBD NetworkPurpose = "insecure_nbd" // without
)

// NetworkRecord is the part of network.get_record that the service looks at.
type NetworkRecord struct {
	UUID    string           `xmlrpc:"uuid"`
	Purpose []NetworkPurpose `xmlrpc:"purpose"` // mostly empty
}

// NetworkRecords returns all networks of the pool.
func (s *Session) NetworkRecords(ctx context.Context) (map[NetworkRef]NetworkRecord, error) {
	return records[NetworkRef, NetworkRecord](get[map[string]NetworkRecord](ctx, s, "network.get_all_records"))
}
