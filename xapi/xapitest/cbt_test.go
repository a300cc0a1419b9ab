package xapitest

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// cbtWorld is a host with a disk whose changed blocks are tracked.
type cbtWorld struct {
	*Host
	t             *testing.T
	random        *rand.ChaCha8
	session, disk string
}

func newCBTWorld(t *testing.T, size int64) *cbtWorld {
	t.Helper()
	w := &cbtWorld{Host: start(t, Config{DataDestroyWait: time.Millisecond}), t: t, random: rand.NewChaCha8([32]byte{})}
	w.session = w.NewSession(RoleVMAdmin)
	w.disk = addVDI(t, w.Host, VDISpec{VHD: true, Size: size})
	if err := w.EnableCBT(w.disk); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *cbtWorld) ref(uuid string) string {
	w.t.Helper()
	return mustString(w.t, w.Host, "VDI.get_by_uuid", w.session, uuid)
}

// changed lists the changed blocks between two VDIs.
func (w *cbtWorld) changed(from, to string) []byte {
	w.t.Helper()
	text := mustString(w.t, w.Host, "VDI.list_changed_blocks", w.session, w.ref(from), w.ref(to))
	bitmap, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		w.t.Fatal(err)
	}
	return bitmap
}

// refuses lists the changed blocks and expects an error.
func (w *cbtWorld) refuses(want []string, from, to string) {
	w.t.Helper()
	mustFail(w.t, w.Host, want, "VDI.list_changed_blocks", w.session, w.ref(from), w.ref(to))
}

// arrived waits until a call of method has reached the host.
func (w *cbtWorld) arrived(method string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	err := w.Wait(ctx, func([]VBD) bool {
		return slices.ContainsFunc(w.Calls(), func(c Call) bool { return c.Method == method })
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func unrelated() []string {
	return []string{"SR_BACKEND_FAILURE_460", "", "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are unrelated]", ""}
}

// The bytes are those that SM's tools gave for the same writes.
func TestChangedBlocksBitOrder(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	from := snapshot(t, w.Host, w.disk)
	for _, off := range []int64{0, 128 << 10, 576 << 10} {
		write(t, w.Host, w.disk, w.random, 64<<10, off)
	}
	if got := w.changed(from, snapshot(t, w.Host, w.disk)); !bytes.Equal(got, []byte{0xa0, 0x40, 0, 0}) {
		t.Errorf("got %x, want a0400000", got)
	}
}

// The bitmap between any two snapshots of a disk has exactly the blocks that were
// written between them, and so each block that differs; also after the data of some was
// destroyed, some were destroyed, and the disk grew.
func TestChangedBlocksAreThoseWritten(t *testing.T) {
	w := newCBTWorld(t, 4*mib)
	r := rand.New(rand.NewPCG(1, 2))
	size := int64(4 * mib)
	var snapshots []string
	var contents [][]byte
	written := []map[int64]bool{{}} // before each snapshot since the one before
	for i := range 8 {
		for range r.IntN(6) {
			n := 512 * (1 + r.Int64N(400))
			off := 512 * r.Int64N((size-n)/512+1)
			write(t, w.Host, w.disk, w.random, int(n), off)
			for block := off / cbtBlock; block*cbtBlock < off+n; block++ {
				written[i][block] = true
			}
		}
		snapshots = append(snapshots, snapshot(t, w.Host, w.disk))
		contents = append(contents, content(t, w.Host, w.disk))
		written = append(written, map[int64]bool{})
		if i == 4 {
			size += 6 * mib
			if err := w.ResizeVDI(w.disk, size); err != nil {
				t.Fatal(err)
			}
		}
	}
	check := func(kept []int) {
		t.Helper()
		for i, from := range kept {
			for _, to := range kept[i+1:] {
				bitmap := w.changed(snapshots[from], snapshots[to])
				if want := (len(contents[to])/cbtBlock + 7) / 8; len(bitmap) != want {
					t.Fatalf("snapshots %d to %d: got %d bytes, want %d", from, to, len(bitmap), want)
				}
				for block := range int64(len(contents[to]) / cbtBlock) {
					want := false
					for _, between := range written[from+1 : to+1] {
						want = want || between[block]
					}
					got := bitmap[block/8]&(0x80>>(block%8)) != 0
					if got != want || !got && differ(contents[from], contents[to], block) {
						t.Fatalf("snapshots %d to %d, block %d: got changed %t, want %t", from, to, block, got, want)
					}
				}
			}
		}
	}
	check([]int{0, 1, 2, 3, 4, 5, 6, 7})
	must(t, w.Host, "VDI.data_destroy", w.session, w.ref(snapshots[2]))
	check([]int{0, 1, 2, 3, 4, 5, 6, 7})
	if err := w.DestroyVDI(snapshots[3]); err != nil {
		t.Fatal(err)
	}
	if err := w.CollectGarbage(); err != nil {
		t.Fatal(err)
	}
	check([]int{0, 1, 2, 4, 5, 6, 7})
	checkChain(t, w.Host, w.disk)
}

// differ compares a block of two disks; beyond the end of a disk it is zero.
func differ(a, b []byte, block int64) bool {
	part := func(disk []byte) []byte {
		p := make([]byte, cbtBlock)
		if block*cbtBlock < int64(len(disk)) {
			copy(p, disk[block*cbtBlock:])
		}
		return p
	}
	return !bytes.Equal(part(a), part(b))
}

func TestChangedBlocksErrors(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	a, b := snapshot(t, w.Host, w.disk), snapshot(t, w.Host, w.disk)
	w.changed(a, w.disk) // the disk itself, while it is not attached
	same := unrelated()
	same[2] = "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are same]"
	w.refuses(same, a, a)
	w.refuses(unrelated(), b, a) // the wrong way round
	other := addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib})
	w.refuses(unrelated(), a, other) // without changed block tracking
	if err := w.EnableCBT(other); err != nil {
		t.Fatal(err)
	}
	w.refuses(unrelated(), a, other)
	w.refuses(unrelated(), a, addVDI(t, w.Host, VDISpec{})) // raw

	elsewhere := addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib, SR: w.AddSR("nfs")})
	mustFail(t, w.Host, []string{"INTERNAL_ERROR", "Storage_error ([S(Vdi_does_not_exist);S(" + b + ")])"}, "VDI.list_changed_blocks", w.session, w.ref(elsewhere), w.ref(b))
	linstor := addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib, SR: w.AddSR("linstor")})
	sr := mustString(t, w.Host, "VDI.get_SR", w.session, w.ref(linstor))
	w.refuses([]string{"SR_OPERATION_NOT_SUPPORTED", sr}, linstor, linstor)
	w.refuses([]string{"SR_HAS_NO_PBDS", w.unpluggedSR.ref}, a, addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib, NoPBD: true}))
	mustFail(t, w.Host, []string{"HANDLE_INVALID", "VDI", "gone"}, "VDI.list_changed_blocks", w.session, "gone", w.ref(b))
	mustFail(t, w.Host, []string{"HANDLE_INVALID", "VDI", "gone"}, "VDI.list_changed_blocks", w.session, w.ref(a), "gone")

	// A VM operator may, a read-only role may not.
	must(t, w.Host, "VDI.list_changed_blocks", w.NewSession(RoleVMOperator), w.ref(a), w.ref(b))
	if _, failed, err := try(t, w.Host, "VDI.list_changed_blocks", w.NewSession(RoleReadOnly), w.ref(a), w.ref(b)); err != nil || failed[0] != "RBAC_PERMISSION_DENIED" {
		t.Errorf("read-only: got %q, %v", failed, err)
	}

	// The chain of logs ends where tracking was disabled.
	must(t, w.Host, "VDI.disable_cbt", w.session, w.ref(w.disk))
	w.refuses(unrelated(), b, w.disk)
	must(t, w.Host, "VDI.enable_cbt", w.session, w.ref(w.disk))
	w.refuses(unrelated(), b, w.disk)
	w.refuses(unrelated(), b, snapshot(t, w.Host, w.disk))
	w.changed(a, b)
}

// The newer VDI must not be attached; the older one may be, and a VBD that was only
// created is no hindrance.
func TestChangedBlocksInUse(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	from, to := snapshot(t, w.Host, w.disk), snapshot(t, w.Host, w.disk)
	must(t, w.Host, "VBD.plug", w.session, createVBD(t, w.Host, w.session, from))
	vbd := createVBD(t, w.Host, w.session, to)
	w.changed(from, to)

	must(t, w.Host, "VBD.plug", w.session, vbd)
	w.refuses([]string{"VDI_IN_USE", w.ref(to), "list_changed_blocks"}, from, to)
	must(t, w.Host, "VBD.unplug", w.session, vbd)
	w.changed(from, to)
}

// The call waits while a VBD of the newer VDI is being plugged, and a plug waits for the
// call; another call on the same SR waits too.
func TestChangedBlocksWait(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	from, to := snapshot(t, w.Host, w.disk), snapshot(t, w.Host, w.disk)
	refs := []any{w.session, w.ref(from), w.ref(to)}
	vbd := createVBD(t, w.Host, w.session, to)

	w.ResetCalls()
	plugging, release := w.BlockWork("plug")
	results := make(chan []string, 3)
	call := func(method string, args ...any) {
		go func() {
			_, failed, err := try(t, w.Host, method, args...)
			if err != nil {
				failed = []string{err.Error()}
			}
			results <- append([]string{method}, failed...)
		}()
	}
	call("VBD.plug", w.session, vbd)
	<-plugging
	call("VDI.list_changed_blocks", refs...)
	w.arrived("VDI.list_changed_blocks")
	release()
	got := fmt.Sprint(<-results, <-results)
	plug, list := "[VBD.plug]", "[VDI.list_changed_blocks VDI_IN_USE "+w.ref(to)+" list_changed_blocks]"
	if got != fmt.Sprint(plug, " ", list) && got != fmt.Sprint(list, " ", plug) {
		t.Errorf("got %s, want a plug and then VDI_IN_USE", got)
	}
	must(t, w.Host, "VBD.unplug", w.session, vbd)

	w.ResetCalls()
	listing, release := w.BlockWork("list_changed_blocks")
	call("VDI.list_changed_blocks", refs...)
	<-listing
	call("VBD.plug", w.session, vbd)
	call("VDI.snapshot", w.session, w.ref(w.disk))
	w.arrived("VBD.plug")
	w.arrived("VDI.snapshot")
	release()
	if got := [][]string{<-results, <-results, <-results}; len(got[0])+len(got[1])+len(got[2]) != 3 {
		t.Errorf("got %q, want no failure", got)
	}
}

func TestChangedBlocksFaults(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	from, to := snapshot(t, w.Host, w.disk), snapshot(t, w.Host, w.disk)
	for _, text := range []string{"", "not base64", "AAAA"} {
		w.AnswerChangedBlocks(text)
		if got := mustString(t, w.Host, "VDI.list_changed_blocks", w.session, w.ref(from), w.ref(to)); got != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
	w.Fail("VDI.list_changed_blocks", "SR_BACKEND_FAILURE_459", "", "Inconsistent bitmaps", "")
	w.refuses([]string{"SR_BACKEND_FAILURE_459", "", "Inconsistent bitmaps", ""}, from, to)
	w.LoseReply("VDI.list_changed_blocks")
	mustDrop(t, w.Host, "VDI.list_changed_blocks", w.session, w.ref(from), w.ref(to))
	w.AnswerChangedBlocks("x")
	w.ClearFaults()
	w.changed(from, to)
}

func TestConfigureCBT(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	s := snapshot(t, w.Host, w.disk)
	enabled := func(uuid string) any { return must(t, w.Host, "VDI.get_cbt_enabled", w.session, w.ref(uuid)) }
	if enabled(w.disk) != true || enabled(s) != true {
		t.Errorf("got cbt_enabled %v and %v, want true", enabled(w.disk), enabled(s))
	}
	must(t, w.Host, "VDI.enable_cbt", w.session, w.ref(w.disk)) // again
	must(t, w.Host, "VDI.disable_cbt", w.session, w.ref(w.disk))
	if enabled(w.disk) != false || enabled(s) != true {
		t.Errorf("got cbt_enabled %v and %v, want false and true", enabled(w.disk), enabled(s))
	}
	mustFail(t, w.Host, []string{"OPERATION_NOT_ALLOWED", "VDI is a snapshot: " + w.ref(s)}, "VDI.enable_cbt", w.session, w.ref(s))
	linstor := w.ref(addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib, SR: w.AddSR("linstor")}))
	mustFail(t, w.Host, []string{"SR_OPERATION_NOT_SUPPORTED", mustString(t, w.Host, "VDI.get_SR", w.session, linstor)}, "VDI.enable_cbt", w.session, linstor)
	metadata := w.ref(addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib, Type: "metadata"}))
	mustFail(t, w.Host, []string{"VDI_INCOMPATIBLE_TYPE", metadata, "metadata"}, "VDI.enable_cbt", w.session, metadata)
	if _, failed, err := try(t, w.Host, "VDI.enable_cbt", w.session, w.ref(addVDI(t, w.Host, VDISpec{}))); err != nil || failed[0] != "SR_BACKEND_FAILURE_457" {
		t.Errorf("raw: got %q, %v", failed, err)
	}
}

// After VDI.data_destroy the log of a snapshot is still there, and its data is not.
func TestDataDestroyOfChain(t *testing.T) {
	w := newCBTWorld(t, 2*mib)
	from := snapshot(t, w.Host, w.disk)
	write(t, w.Host, w.disk, w.random, 512, 0)
	to := snapshot(t, w.Host, w.disk)
	mustFail(t, w.Host, []string{"OPERATION_NOT_ALLOWED", "VDI is not a snapshot: " + w.ref(w.disk)}, "VDI.data_destroy", w.session, w.ref(w.disk))
	vbd := createVBD(t, w.Host, w.session, from)
	mustFail(t, w.Host, []string{"VDI_IN_USE", w.ref(from), "data_destroy"}, "VDI.data_destroy", w.session, w.ref(from))
	if len(w.Chain(from)) != 2 {
		t.Error("the data is gone although data_destroy failed")
	}
	must(t, w.Host, "VBD.destroy", w.session, vbd)
	must(t, w.Host, "VDI.data_destroy", w.session, w.ref(from))
	if got := must(t, w.Host, "VDI.get_type", w.session, w.ref(from)); got != "cbt_metadata" || len(w.Chain(from)) != 0 {
		t.Errorf("got type %v and chain %q", got, w.Chain(from))
	}
	if err := w.CollectGarbage(); err != nil {
		t.Fatal(err)
	}
	if got := w.changed(from, to); !bytes.Equal(got, []byte{0x80, 0, 0, 0}) {
		t.Errorf("got %x, want 80000000", got)
	}
	if err := w.WriteVDI(from, make([]byte, 512), 0); err == nil {
		t.Error("writing to a VDI without data succeeded")
	}
	untracked := addVDI(t, w.Host, VDISpec{VHD: true, Size: 2 * mib})
	s := snapshot(t, w.Host, untracked)
	mustFail(t, w.Host, []string{"VDI_NO_CBT_METADATA", w.ref(s)}, "VDI.data_destroy", w.session, w.ref(s))
}
