package nbd

import (
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// The payload of BLOCK_STATUS says which range, and which contexts.
func TestExtendedStatusFilter(t *testing.T) {
	tests := []struct {
		name    string
		payload []byte
		want    wire.Errno
	}{
		{"our context", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID}}.Append(nil), wire.Success},
		{"up to the end", wire.StatusFilter{Length: 1<<20 - 512, IDs: []uint32{baseAllocationID}}.Append(nil), wire.Success},
		{"past the end", wire.StatusFilter{Length: 1 << 20, IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"absurd length", wire.StatusFilter{Length: 1<<64 - 1, IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"of nothing", wire.StatusFilter{IDs: []uint32{baseAllocationID}}.Append(nil), wire.EINVAL},
		{"no context", wire.StatusFilter{Length: 512}.Append(nil), wire.EINVAL},
		{"unknown context", wire.StatusFilter{Length: 512, IDs: []uint32{0}}.Append(nil), wire.EINVAL},
		{"known and unknown", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID, 7}}.Append(nil), wire.EINVAL},
		{"twice", wire.StatusFilter{Length: 512, IDs: []uint32{baseAllocationID, baseAllocationID}}.Append(nil), wire.EINVAL},
		{"no payload", nil, wire.EINVAL},
		{"cut short", make([]byte, 7), wire.EINVAL},
		{"half a context", make([]byte, 14), wire.EINVAL},
		{"long", make([]byte, maxFilter), wire.EINVAL},
		{"too long", make([]byte, maxFilter+4), wire.EINVAL},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newTestServer(t).chunked(wire.OptExtendedHeaders, "a")
				r := wire.Request{Command: wire.CmdBlockStatus, Flags: wire.CmdFlagPayloadLen, Cookie: 9, Offset: 512, Length: uint64(len(tt.payload))}
				if tt.want == wire.Success {
					p.status(r, tt.payload)
				} else if got := p.fails(r, tt.payload); got != tt.want {
					t.Errorf("got %v, want %v", got, tt.want)
				}
				p.content(ranged(wire.CmdRead, 0, 0, 512))
			})
		})
	}
}
