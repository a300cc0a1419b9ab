package vdi_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/vdi"
	"xapi-nbd/vdi/changes"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

const blockSize = 2 << 20

// chainFixture is a fixture whose VDI is a snapshot with a chain of VHD images: of 8
// blocks, 0 and 3 were written before it, 5 after it.
type chainFixture struct {
	*fixture
	live string // the VDI that was snapshotted
}

func newChainFixture(t *testing.T, change ...func(*vdi.Config)) *chainFixture {
	t.Helper()
	f := &chainFixture{fixture: newFixture(t, change...)}
	f.live = f.addVDI(xapitest.VDISpec{Size: 8 * blockSize, VHD: true})
	f.write(0, 3)
	f.vdi = f.snapshot()
	f.write(5)
	f.content = make([]byte, 8*blockSize)
	copy(f.content, blockContent(0))
	copy(f.content[3*blockSize:], blockContent(3))
	return f
}

// blockContent is 4 KiB that a test writes at the begin of a block.
func blockContent(block int) []byte { return bytes.Repeat([]byte{0xd0 | byte(block)}, 4096) }

func (f *chainFixture) write(blocks ...int) {
	f.t.Helper()
	for _, b := range blocks {
		do(f.t, f.host.WriteVDI(f.live, blockContent(b), int64(b)*blockSize))
	}
}

func (f *chainFixture) snapshot() (uuid string) {
	f.t.Helper()
	uuid, err := f.host.SnapshotVDI(f.live)
	do(f.t, err)
	return uuid
}

// data returns the blocks that may have data.
func data(t *testing.T, d *vdi.Disk) (blocks []int) {
	t.Helper()
	for off := int64(0); off < d.Size(); {
		isData, n := d.DataRun(off, d.Size()-off)
		if n <= 0 || off+n > d.Size() {
			t.Fatalf("at %d: a run of %d bytes", off, n)
		}
		for b := off / blockSize; isData && b*blockSize < off+n; b++ {
			blocks = append(blocks, int(b))
		}
		off += n
	}
	return blocks
}

// status returns the Blocks in the status of the only attachment.
func (f *fixture) status() vdi.Blocks {
	f.t.Helper()
	all := f.manager.Status()
	if len(all) != 1 {
		f.t.Fatalf("%d attachments, want 1", len(all))
	}
	return all[0].Blocks
}

// TestBlocks reads a snapshot whose blocks are known: those without data are not read.
func TestBlocks(t *testing.T) {
	f := newChainFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	if got := data(t, d); !equal(got, 0, 3) {
		t.Errorf("got the blocks %d, want 0 and 3", got)
	}
	if got := f.status(); got != (vdi.Blocks{Known: true, Data: 2 * blockSize}) {
		t.Errorf("status: got %+v", got)
	}
	if got := f.manager.BlocksCounts(); got[""] != 1 || len(got) != 1+len(vdi.BlocksReasons) {
		t.Errorf("counts: got %v", got)
	}
	f.wantContent(d)

	// The content of the device where there is no data is ignored.
	device, err := os.OpenFile(f.host.ImagePath(f.vdi), os.O_WRONLY, 0)
	do(t, err)
	_, err = device.WriteAt(bytes.Repeat([]byte{1}, 8*blockSize), 0)
	do(t, errors.Join(err, device.Close()))
	got := make([]byte, 3*blockSize)
	n, err := d.ReadAt(got, blockSize)
	if n != len(got) || err != nil || bytes.Count(got[:2*blockSize], []byte{0}) != 2*blockSize || bytes.Count(got[2*blockSize:], []byte{1}) != blockSize {
		t.Errorf("got %d bytes and %v, want two blocks of zeroes and one of the device", n, err)
	}
	leave(d)
	f.closeManager()
}

func equal(got []int, want ...int) bool { return slices.Equal(got, want) }

// TestBlocksAreNotKnown has one reason for doubt in each row: all blocks count as data, the
// content is right, and the status has the reason.
func TestBlocksAreNotKnown(t *testing.T) {
	exists := filepath.Join(t.TempDir(), "allow")
	do(t, os.WriteFile(exists, nil, 0o600))
	tests := []struct {
		name   string
		reason string
		config func(*vdi.Config)
		spoil  func(f *chainFixture)
	}{
		{"written by a VM elsewhere", "writable", nil, func(f *chainFixture) { f.host.SetSMConfig(f.vdi, "host_OpaqueRef:other", "RW") }},
		{"writers beside readers are allowed", "unprotected", func(c *vdi.Config) { c.AllowMultipleAttach = exists }, nil},
		{"no link", "no_link", nil, func(f *chainFixture) {
			link := f.host.LinkPath(f.vdi)
			f.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
				if c.Method == "SR.get_record" {
					_ = os.Remove(link) // before the call and after it
				}
				return 0
			})
		}},
		{"sharable", "sharable", nil, func(f *chainFixture) {
			f.vdi = f.addVDI(xapitest.VDISpec{Size: 8 * blockSize, VHD: true, Sharable: true})
			clear(f.content)
		}},
		{"a raw image", "not_vhd", nil, func(f *chainFixture) {
			f.vdi = f.addVDI(xapitest.VDISpec{Size: 8 * blockSize})
			clear(f.content)
		}},
		{"a parent is missing", "image", nil, func(f *chainFixture) { do(f.t, os.Remove(f.host.Chain(f.vdi)[1])) }},
		{"an image is no VHD", "not_vhd", nil, func(f *chainFixture) {
			do(f.t, os.WriteFile(f.host.Chain(f.vdi)[0], []byte("QFI\xfb"), 0o600))
		}},
		{"the VDI is smaller than its image", "size", nil, func(f *chainFixture) {
			f.host.SetVirtualSize(f.vdi, 7*blockSize)
			f.content = f.content[:7*blockSize]
		}},
		{"the device is larger than the VDI", "size", nil, func(f *chainFixture) { do(f.t, f.host.ResizeDevice(f.vdi, 9*blockSize)) }},
		{"xapi does not name the SR", "xapi", nil, func(f *chainFixture) { f.host.FailAlways("SR.get_record", "INTERNAL_ERROR", "x") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var change []func(*vdi.Config)
			if tt.config != nil {
				change = append(change, tt.config)
			}
			f := newChainFixture(t, change...)
			if tt.spoil != nil {
				tt.spoil(f)
			}
			d := f.attach(f.session(xapitest.RoleVMAdmin))
			if isData, n := d.DataRun(0, d.Size()); !isData || n != d.Size() {
				t.Errorf("got a run of %d bytes, data: %t, want all of the disk as data", n, isData)
			}
			if got := f.status(); got != (vdi.Blocks{Reason: tt.reason}) {
				t.Errorf("status: got %+v, want the reason %q", got, tt.reason)
			}
			if got := f.manager.BlocksCounts(); got[tt.reason] != 1 {
				t.Errorf("counts: got %v", got)
			}
			f.wantContent(d)
			leave(d)
			f.closeManager()
		})
	}
}

// TestBlocksOfALiveDisk has a VM write the VDI on this host.
func TestBlocksOfALiveDisk(t *testing.T) {
	f := newChainFixture(t)
	f.host.SetSMConfig(f.live, "host_OpaqueRef:this", "RW")
	f.vdi = f.live
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	if isData, n := d.DataRun(0, d.Size()); !isData || n != d.Size() {
		t.Errorf("got a run of %d bytes, data: %t, want all of the disk as data", n, isData)
	}
	leave(d)
	f.closeManager()
}

// TestBlocksStayKnown has the garbage collector work on the chain of an open disk: its
// content and its allocation stay the same.
func TestBlocksStayKnown(t *testing.T) {
	f := newChainFixture(t)
	d := f.attach(f.session(xapitest.RoleVMAdmin))
	if got := data(t, d); !equal(got, 0, 3) {
		t.Errorf("got the blocks %d, want 0 and 3", got)
	}
	do(t, f.host.DestroyVDI(f.live))
	do(t, f.host.CollectGarbage())
	if got := data(t, d); !equal(got, 0, 3) {
		t.Errorf("after the garbage collector: got the blocks %d, want 0 and 3", got)
	}
	f.wantContent(d)
	leave(d)
	f.closeManager()
}

// changedFixture has two snapshots with changed block tracking between them, f.base and
// f.vdi: 0 and 3 were written before both, 5 and 6 between them.
type changedFixture struct {
	*chainFixture
	base string
}

func newChangedFixture(t *testing.T, change ...func(*vdi.Config)) *changedFixture {
	t.Helper()
	f := &changedFixture{chainFixture: newChainFixture(t, change...)}
	do(t, f.host.EnableCBT(f.live))
	f.base = f.snapshot()
	f.write(5, 6)
	f.vdi = f.snapshot()
	return f
}

// dirty returns the 64 KiB blocks that have changed.
func dirty(m changes.Map, size int64) (blocks []int) {
	off := int64(0)
	for _, e := range m.Dirty(0, size) {
		for b := off / xapi.ChangedBlockSize; e.Status == changes.Dirty && b*xapi.ChangedBlockSize < off+e.Length; b++ {
			blocks = append(blocks, int(b))
		}
		off += e.Length
	}
	return blocks
}

func (f *changedFixture) attachSince(bases ...string) *vdi.Disk {
	f.t.Helper()
	d, err := f.manager.Attach(f.t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi, bases...)
	do(f.t, err)
	return d
}

func TestChanges(t *testing.T) {
	f := newChangedFixture(t)
	d := f.attachSince(f.base)
	m, ok := d.Changes(f.base)
	if !ok {
		t.Fatal("the changed blocks are not known")
	}
	if got := dirty(m, d.Size()); !equal(got, 5*32, 6*32) {
		t.Errorf("got the blocks %d, want 160 and 192", got)
	}
	want := []changes.Extent{
		{Length: 5 * blockSize, Status: changes.Unchanged}, {Length: 64 << 10}, {Length: blockSize - 64<<10, Status: changes.Unchanged},
		{Length: 64 << 10}, {Length: 2*blockSize - 64<<10, Status: changes.Unchanged},
	}
	if got := m.Unchanged(0, d.Size()); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if d.KnowsChanges(f.live) {
		t.Error("changed blocks since a VDI that was not asked for")
	}
	// A client that comes later gets the same, of the same base only.
	again, other, none := f.attachSince(f.base), f.attachSince(f.live), f.attachSince()
	if !again.KnowsChanges(f.base) || other.KnowsChanges(f.live) || !other.KnowsChanges(f.base) {
		t.Error("connections that share the attachment get different changed blocks")
	}
	if n := f.count("VDI.list_changed_blocks"); n != 1 {
		t.Errorf("%d calls of VDI.list_changed_blocks, want 1", n)
	}
	for _, d := range []*vdi.Disk{d, again, other, none} {
		leave(d)
	}
	f.closeManager()
}

// TestChangedBlocksBeforeTheAttachment: xapi refuses them for a VDI that is attached.
func TestChangedBlocksBeforeTheAttachment(t *testing.T) {
	log := &bytes.Buffer{} // read when the manager is closed
	f := newChangedFixture(t, func(c *vdi.Config) { c.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	d := f.attachSince()
	later := f.attachSince(f.base)
	if later.KnowsChanges(f.base) || f.count("VDI.list_changed_blocks") != 0 {
		t.Error("xapi was asked while the VDI was attached")
	}
	leave(d)
	leave(later)
	f.closeManager()
	for _, want := range []string{"changed blocks are not known", f.base, "end the other transfer"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
}

// TestChangedBlocksOfALingeringAttachment: it is detached, so that xapi can be asked.
func TestChangedBlocksOfALingeringAttachment(t *testing.T) {
	f := newChangedFixture(t, func(c *vdi.Config) { c.Linger = time.Hour })
	for range 2 { // the second time the base is known
		d := f.attachSince(f.base)
		if !d.KnowsChanges(f.base) {
			t.Error("the changed blocks are not known")
		}
		do(t, d.CloseWithError(errors.New("lost")))
	}
	if n := f.count("VDI.list_changed_blocks"); n != 1 {
		t.Errorf("%d calls of VDI.list_changed_blocks, want 1", n)
	}
	d := f.attachSince(f.live)
	leave(d)
	if n := f.count("VBD.plug"); n != 2 {
		t.Errorf("%d plugs, want 2: a lingering attachment that lacks a base is detached", n)
	}
	f.closeManager()
	f.wantClean()
}

// TestChangedBlocksAreNotKnown: the disk is attached with any answer of xapi.
func TestChangedBlocksAreNotKnown(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(f *changedFixture)
	}{
		{"unknown base", func(f *changedFixture) { f.base = "00000000-0000-0000-0000-000000000001" }},
		{"the base is the VDI itself", func(f *changedFixture) { f.base = f.vdi }},
		{"the base is on another SR", func(f *changedFixture) {
			f.base = f.addVDI(xapitest.VDISpec{Size: 8 * blockSize, VHD: true, SR: f.host.AddSR("nfs")})
		}},
		{"the base is younger", func(f *changedFixture) { f.base, f.vdi = f.vdi, f.base }},
		{"not tracked", func(f *changedFixture) { do(f.t, f.host.DisableCBT(f.live)); f.vdi = f.snapshot() }},
		{"attached by somebody else", func(f *changedFixture) {
			vbd, err := f.host.AddForeignVBD(f.vdi, nil)
			do(f.t, errors.Join(err, f.host.PlugForeign(vbd)))
		}},
		{"not base64", func(f *changedFixture) { f.host.AnswerChangedBlocks("!!!!") }},
		{"too long", func(f *changedFixture) { f.host.AnswerChangedBlocks(string(bytes.Repeat([]byte("AAAA"), 100))) }},
		{"too short", func(f *changedFixture) { f.host.AnswerChangedBlocks("AAAA") }},
		{"empty", func(f *changedFixture) { f.host.AnswerChangedBlocks("") }},
		{"an error of the storage", func(f *changedFixture) {
			f.host.FailAlways("VDI.list_changed_blocks", "SR_BACKEND_FAILURE_460", "", "x", "")
		}},
		{"the answer is lost", func(f *changedFixture) { f.host.LoseReply("VDI.list_changed_blocks") }},
		{"too slow", func(f *changedFixture) {
			vdi.SetChangedTimeout(f.t, 50*time.Millisecond)
			f.block("VDI.list_changed_blocks")
		}},
		{"no answer of the API", func(f *changedFixture) { f.host.FailHTTP("VDI.list_changed_blocks") }},
		{"the content is not frozen", func(f *changedFixture) { f.host.SetSMConfig(f.vdi, "host_OpaqueRef:other", "RW") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			log := &bytes.Buffer{} // read when the manager is closed
			f := newChangedFixture(t, func(c *vdi.Config) { c.Logger = slog.New(slog.NewTextHandler(log, nil)) })
			tt.spoil(f)
			d := f.attachSince(f.base)
			if _, known := d.Changes(f.base); known || d.KnowsChanges(f.base) {
				t.Error("changed blocks are known")
			}
			leave(d)
			f.closeManager()
			if !strings.Contains(log.String(), "changed blocks are not known") || !strings.Contains(log.String(), f.base) {
				t.Errorf("the log does not say why:\n%s", log)
			}
		})
	}
}
