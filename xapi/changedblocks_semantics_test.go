package xapi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// trackedDisk is a disk of 8 MiB with changed block tracking, its snapshot, later writes
// and the snapshot after them.
func trackedDisk(t *testing.T, h *xapitest.Host) (base, this string) {
	t.Helper()
	disk, err := h.AddVDI(xapitest.VDISpec{VHD: true, Size: 8 << 20})
	if err == nil {
		err = h.EnableCBT(disk)
	}
	if err == nil {
		base, err = h.SnapshotVDI(disk)
	}
	for _, off := range []int64{0, 1 << 20, 8<<20 - 1024} {
		if err == nil {
			err = h.WriteVDI(disk, bytes.Repeat([]byte{1}, 1024), off)
		}
	}
	if err == nil {
		this, err = h.SnapshotVDI(disk)
	}
	if err != nil {
		t.Fatal(err)
	}
	return base, this
}

func vdiRef(t *testing.T, s *xapi.Session, uuid string) xapi.VDIRef {
	t.Helper()
	ref, err := s.VDIByUUID(t.Context(), uuid)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// The blocks of two snapshots whose contents differ are those that have changed.
func TestListChangedBlocksOfHost(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	base, this := trackedDisk(t, h)
	changed, err := s.ListChangedBlocks(t.Context(), vdiRef(t, s, base), vdiRef(t, s, this), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	older, err := os.ReadFile(h.ImagePath(base))
	if err != nil {
		t.Fatal(err)
	}
	newer, err := os.ReadFile(h.ImagePath(this))
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < changed.Size(); off += xapi.ChangedBlockSize {
		differ := !bytes.Equal(older[off:off+xapi.ChangedBlockSize], newer[off:off+xapi.ChangedBlockSize])
		if got, _ := changed.Run(off, 1); got != differ {
			t.Errorf("block at %d: changed %t, contents differ %t", off, got, differ)
		}
	}
	if got, want := changed.Bytes(), int64(3*xapi.ChangedBlockSize); got != want {
		t.Errorf("got %d changed bytes, want %d", got, want)
	}
}

func TestListChangedBlocksRefusedByHost(t *testing.T) {
	h, c := host(t)
	s := login(t, c)
	uuid, this := trackedDisk(t, h)
	base, to := vdiRef(t, s, uuid), vdiRef(t, s, this)
	ask := func(from, to xapi.VDIRef) error {
		_, err := s.ListChangedBlocks(t.Context(), from, to, 8<<20)
		return err
	}
	if err := ask(to, base); !errors.Is(err, xapi.CBTChangedBlocksFailed) {
		t.Errorf("the wrong way round: got %v", err)
	}
	if err := ask(base, "OpaqueRef:gone"); !errors.Is(err, xapi.HandleInvalid) {
		t.Errorf("without a VDI: got %v", err)
	}
	vbd, err := s.CreateVBD(t.Context(), spec(t, h, s, this))
	if err == nil {
		err = s.PlugVBD(t.Context(), vbd)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := ask(base, to); !errors.Is(err, xapi.VDIInUse) {
		t.Errorf("attached: got %v", err)
	}

	// The records show an attachment.
	record, err := s.VDIRecord(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	modes := 0
	for key, value := range record.SMConfig {
		if key != "vhd-parent" && value == "RO" {
			modes++
		}
	}
	if modes != 1 || record.Sharable || !record.IsSnapshot {
		t.Errorf("got %+v, want a snapshot that is attached RO by one host", record)
	}
	if sr, err := s.SRRecord(t.Context(), record.SR); err != nil || sr.Type != "ext" || !xapi.IsUUID(sr.UUID) {
		t.Errorf("got %+v, %v, want an SR of the type ext", sr, err)
	}
	if err := s.UnplugVBD(t.Context(), vbd); err != nil {
		t.Fatal(err)
	}

	for _, text := range []string{"", "AAAA", "no base64"} {
		h.AnswerChangedBlocks(text)
		if err := ask(base, to); !errors.Is(err, xapi.ErrAnswer) {
			t.Errorf("answer %q: got %v, want ErrAnswer", text, err)
		}
	}
	reached, release := h.BlockWork("list_changed_blocks")
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-reached; cancel() }()
	if _, err := s.ListChangedBlocks(ctx, base, to, 8<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}

// An sm_config that cannot be decoded is nil, and hides no other field.
func TestVDIRecordWithOddSMConfig(t *testing.T) {
	for _, tt := range oddKeys {
		t.Run(tt.name, func(t *testing.T) {
			h, c := host(t)
			s := login(t, c)
			uuid := addVDI(t, h, "disk")
			h.SetSMConfig(uuid, tt.key, "x")
			record, err := s.VDIRecord(t.Context(), vdiRef(t, s, uuid))
			if err != nil || record.UUID != uuid || record.NameLabel != "disk" {
				t.Errorf("got %+v, %v", record, err)
			}
			if isNil := record.SMConfig == nil; isNil != tt.byFields {
				t.Errorf("got sm_config %q, want none: %t", record.SMConfig, tt.byFields)
			}
		})
	}
}
