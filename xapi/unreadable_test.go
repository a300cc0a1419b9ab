package xapi_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// endOfMap is a key that looks like the end of its map, followed by a field of the record.
const endOfMap = `x</name><value>v</value></member></struct></value></member><member><name>uuid</name><value>forged</value></member>` +
	`<member><name>y</name><value><struct><member><name>z`

// A record with odd keys is read, at most with one call for each field.
var oddKeys = []struct {
	name, key string
	byFields  bool
}{
	{"unescaped", "R&D <é>\x01\xff</name>", false},
	{"end of the map", endOfMap, true},
}

func TestVDIRecordWithOddKeys(t *testing.T) {
	for _, tt := range oddKeys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			s := login(t, c)
			record := func(otherConfig map[string]string) xapi.VDIRecord {
				uuid, err := h.AddVDI(xapitest.VDISpec{Size: 1 << 20, NameLabel: "R&D", Type: "system", ReadOnly: true, OtherConfig: otherConfig})
				if err != nil {
					t.Fatal(err)
				}
				ref, err := s.VDIByUUID(t.Context(), uuid)
				if err != nil {
					t.Fatal(err)
				}
				h.ResetCalls()
				r, err := s.VDIRecord(t.Context(), ref)
				if err != nil {
					t.Fatal(err)
				}
				if r.UUID != uuid || r.Location != uuid {
					t.Errorf("got uuid %q and location %q, want %q", r.UUID, r.Location, uuid)
				}
				r.UUID, r.Location = "", ""
				return r
			}
			want := record(nil)
			if tt.byFields {
				want.SMConfig = nil // a field that is not asked for alone
			}
			got := record(map[string]string{tt.key: "x"})
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("record (-want +got):\n%s", diff)
			}
			if byFields := len(h.Calls()) > 1; byFields != tt.byFields {
				t.Errorf("got %d calls, want more than one: %v", len(h.Calls()), tt.byFields)
			}
		})
	}
}

// A VBD of another client, or changed by one, does not hide ours.
func TestVBDsOfVMWithOddKeys(t *testing.T) {
	for _, tt := range oddKeys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			ctx := t.Context()
			s := login(t, c)
			spec := spec(t, h, s, addVDI(t, h, ""))
			ours, err := s.CreateVBD(ctx, spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.PlugVBD(ctx, ours); err != nil {
				t.Fatal(err)
			}
			foreign, err := h.AddForeignVBD(addVDI(t, h, ""), map[string]string{tt.key: "x"})
			if err != nil {
				t.Fatal(err)
			}
			want, err := s.VBDRecord(ctx, ours)
			if err != nil {
				t.Fatal(err)
			}
			all, err := s.VBDsOfVM(ctx, spec.VM)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, all[ours]); diff != "" {
				t.Errorf("our record (-want +got):\n%s", diff)
			}
			ref, err := s.VBDByUUID(ctx, foreign)
			if err != nil || len(all) != 2 || all[ref].UUID != foreign {
				t.Errorf("got %+v, %v, want ours and %s", all, err, foreign)
			}
			// Another client changes our VBD.
			if err := h.AddToOtherConfig(want.UUID, tt.key, "x"); err != nil {
				t.Fatal(err)
			}
			got, err := s.VBDRecord(ctx, ours)
			if err != nil || got.UUID != want.UUID || got.Device != want.Device || !got.CurrentlyAttached {
				t.Errorf("got %+v, %v, want %+v", got, err, want)
			}
		})
	}
}

// All VBDs of a VDI are found, also those of other clients and those with odd keys.
func TestVBDsOfVDIWithOddKeys(t *testing.T) {
	for _, tt := range oddKeys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			ctx := t.Context()
			s := login(t, c)
			disk := addVDI(t, h, "")
			ours, err := s.CreateVBD(ctx, spec(t, h, s, disk))
			if err != nil {
				t.Fatal(err)
			}
			foreign, err := h.AddForeignVBD(disk, map[string]string{tt.key: "x"})
			if err != nil {
				t.Fatal(err)
			}
			if err := h.PlugForeign(foreign); err != nil {
				t.Fatal(err)
			}
			if _, err := h.AddForeignVBD(addVDI(t, h, ""), nil); err != nil {
				t.Fatal(err)
			}
			ref, err := s.VDIByUUID(ctx, disk)
			if err != nil {
				t.Fatal(err)
			}
			all, err := s.VBDsOfVDI(ctx, ref)
			if err != nil || len(all) != 2 || all[ours].CurrentlyAttached {
				t.Errorf("got %+v, %v, want ours and the foreign one", all, err)
			}
			for ref, r := range all {
				if ref != ours && (r.UUID != foreign || !r.CurrentlyAttached) {
					t.Errorf("got %+v, want %s, which is attached", r, foreign)
				}
			}
		})
	}
}

func TestNetworkRecordsWithOddKeys(t *testing.T) {
	for _, tt := range oddKeys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			odd := h.AddNetwork("insecure_nbd", "other")
			h.SetNetworkOtherConfig(odd, map[string]string{tt.key: "x"})
			h.AddNetwork()
			all, err := login(t, c).NetworkRecords(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var purposes []xapi.NetworkPurpose
			for _, n := range all {
				purposes = append(purposes, n.Purpose...)
			}
			if len(all) != 2 || !slices.Equal(purposes, []xapi.NetworkPurpose{"insecure_nbd", "other"}) {
				t.Errorf("got %+v, want two networks and the purposes of one", all)
			}
		})
	}
}
