package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// trackedDisk is a disk of 48 MiB of a VM, with changed block tracking and two snapshots.
type trackedDisk struct {
	*world
	p          *process
	base, now  string // uuids of the snapshots
	nbdTool    string
	old, fresh []byte // content of the snapshots
}

const trackedSize = 48 << 20

// newTrackedDisk has data in 6 blocks of 2 MiB at the first snapshot. Until the second one
// five pieces of 64 KiB change, one is zeroed, and a block gets data for the first time.
func newTrackedDisk(t *testing.T, cfg xapitest.Config) *trackedDisk {
	t.Helper()
	d := &trackedDisk{world: newWorld(t, cfg), nbdTool: filepath.Join(t.TempDir(), "nbd-tool")}
	tool(t, "go", "build", "-o", d.nbdTool, "xapi-nbd/cmd/nbd-tool")
	vdi, err := d.host.AddVDI(xapitest.VDISpec{Size: trackedSize, VHD: true})
	must(t, err)
	write := func(seed, at, n int) { must(t, d.host.WriteVDI(vdi, random(uint64(seed), n), int64(at))) }
	for i, block := range []int{0, 1, 7, 8, 15, 23} {
		write(i+1, block*2<<20, 2<<20)
	}
	must(t, d.host.EnableCBT(vdi))
	d.base, err = d.host.SnapshotVDI(vdi)
	must(t, err)
	for i, at := range []int{0, 3 << 20, 15 << 20, 31<<20 + 4096, 20 << 20} {
		write(i+10, at, 64<<10)
	}
	must(t, d.host.WriteVDI(vdi, make([]byte, 64<<10), 16<<20))
	d.now, err = d.host.SnapshotVDI(vdi)
	must(t, err)
	d.old, d.fresh = d.content(d.base), d.content(d.now)
	d.p = d.start()
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (d *trackedDisk) content(vdi string) []byte {
	d.t.Helper()
	b, err := os.ReadFile(d.host.ImagePath(vdi))
	must(d.t, err)
	return b
}

// extent is one element of the output of nbdinfo --json --map.
type extent struct {
	Offset, Length int64
	Type           uint64
}

func (d *trackedDisk) nbdMap(t *testing.T, vdi, context string, secure bool) (extents []extent) {
	t.Helper()
	must(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--map="+context, d.uri(d.p, d.export(vdi), secure))), &extents))
	d.waitClean(d.p)
	return extents
}

// wantMap checks a map: holes read as zeroes, and unchanged blocks as before. At most limit
// bytes are neither.
func (d *trackedDisk) wantMap(t *testing.T, extents []extent, limit int64, skips func(e extent) (skips bool, want []byte)) {
	t.Helper()
	at, moved := int64(0), int64(0)
	for _, e := range extents {
		if e.Offset != at {
			t.Fatalf("an extent begins at %d, want %d", e.Offset, at)
		}
		at += e.Length
		skipped, want := skips(e)
		if !skipped {
			moved += e.Length
		} else if !bytes.Equal(d.fresh[e.Offset:at], want) {
			t.Errorf("%+v: the disk has other content there", e)
		}
	}
	if at != trackedSize || moved > limit {
		t.Errorf("%d bytes of the map have to be read and %d are there, want at most %d of %d: %+v", moved, at, limit, trackedSize, extents)
	}
}

// TestIncrementalCopies makes a full and an incremental copy of a disk with each tool.
func TestIncrementalCopies(t *testing.T) {
	for _, name := range []string{"qemu-img", "nbdcopy", "nbdinfo"} {
		requires.Tool(t, name)
	}
	cfg := xapitest.Config{Style: xapitest.StyleNBD}
	if os.Getuid() == 0 {
		requires.LoopDevices(t)
		cfg.Loop = true
	}
	d := newTrackedDisk(t, cfg)
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "clear", true: "TLS"}[secure], func(t *testing.T) {
			zeroes := make([]byte, trackedSize)
			d.wantMap(t, d.nbdMap(t, d.now, "base:allocation", secure), 8*2<<20, func(e extent) (bool, []byte) {
				return e.Type == 3, zeroes[:e.Length]
			})
			d.wantMap(t, d.nbdMap(t, d.now, service.UnchangedBlocks+d.base, secure), 7*64<<10, func(e extent) (bool, []byte) {
				return e.Type == 1, d.old[e.Offset : e.Offset+e.Length]
			})
			d.wantMap(t, d.nbdMap(t, d.now, service.DirtyBitmap+d.base, secure), 7*64<<10, func(e extent) (bool, []byte) {
				return e.Type == 0, d.old[e.Offset : e.Offset+e.Length]
			})
			d.copyWithNBDTool(t, secure)
			d.copyWithQEMU(t, secure)
			out := filepath.Join(t.TempDir(), "copy")
			tool(t, "nbdcopy", d.uri(d.p, d.export(d.now), secure), out)
			wantFile(t, out, d.fresh)
			d.waitClean(d.p)
		})
	}
	if code := d.p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// copyWithNBDTool makes a raw copy and updates it.
func (d *trackedDisk) copyWithNBDTool(t *testing.T, secure bool) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "copy")
	copyTo := func(vdi string, args ...string) {
		t.Helper()
		tool(t, d.nbdTool, append(append([]string{"copy", "--verify"}, args...), d.uri(d.p, d.export(vdi), secure), out)...)
		d.waitClean(d.p)
	}
	copyTo(d.base)
	wantFile(t, out, d.old)
	copyTo(d.now, "--changed-since", d.base)
	wantFile(t, out, d.fresh)
}

// copyWithQEMU makes a full qcow2 image, and an incremental one on top of it.
func (d *trackedDisk) copyWithQEMU(t *testing.T, secure bool) {
	t.Helper()
	dir := t.TempDir()
	full, increment, raw := filepath.Join(dir, "full.qcow2"), filepath.Join(dir, "increment.qcow2"), filepath.Join(dir, "raw")
	convert := func(vdi, more string, args ...string) {
		t.Helper()
		_, port, _ := net.SplitHostPort(d.p.addr)
		from := "driver=nbd,server.type=inet,server.host=localhost,server.port=" + port + ",export=" + d.export(vdi) + more
		command := []string{"convert"}
		if secure {
			from += ",tls-creds=tls0"
			command = append(command, "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+d.trust.ClientDir)
		}
		tool(t, "qemu-img", append(append(command, "--image-opts", from, "-O", "qcow2"), args...)...)
		d.waitClean(d.p)
	}
	convert(d.base, "", full)
	convert(d.now, ",x-dirty-bitmap="+service.UnchangedBlocks+d.base, "-B", full, "-F", "qcow2", increment)
	tool(t, "qemu-img", "convert", "-O", "raw", increment, raw)
	wantFile(t, raw, d.fresh)
	if st, err := os.Stat(increment); err != nil || st.Size() > 2<<20 {
		t.Errorf("the increment has %d bytes (%v), want little more than the 448 KiB that have changed", st.Size(), err)
	}
}

// TestHolesAreNotReadFromTheDevice reads a disk with holes by a client with simple replies
// and by one with structured ones, while the device shows other bytes there.
func TestHolesAreNotReadFromTheDevice(t *testing.T) {
	d := newTrackedDisk(t, xapitest.Config{})
	f, err := os.OpenFile(d.host.ImagePath(d.now), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{0xbd}, 2<<20), 6<<20)
	must(t, errors.Join(err, f.Close()))
	sizes := []int{512, 4 << 10, 48 << 10, 128 << 10, 256 << 10, 2 << 20}
	for _, how := range []struct{ secure, simple bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
		conn := d.openAs(d.p, how.secure, how.simple, d.export(d.now))
		for i := range 300 {
			n := sizes[i%len(sizes)]
			off := rand.Int64N(trackedSize-int64(n)) &^ 511
			got := make([]byte, n)
			must(t, conn.Read(t.Context(), got, off))
			if !bytes.Equal(got, d.fresh[off:off+int64(n)]) {
				t.Fatalf("%+v: %d bytes at %d are not those of the disk", how, n, off)
			}
		}
		must(t, conn.Close())
	}
	d.waitClean(d.p)
}

// TestContextsOfTheService: contexts are listed without attaching anything, and a context for
// which xapi returns no changed blocks is not granted.
func TestContextsOfTheService(t *testing.T) {
	d := newTrackedDisk(t, xapitest.Config{})
	c, err := d.dial(d.p, false)
	must(t, err)
	d.host.ResetCalls()
	name := d.export(d.now)
	for _, tt := range []struct{ queries, want []string }{
		{nil, []string{"base:allocation", service.DirtyBitmap, service.UnchangedBlocks}},
		{[]string{"qemu:"}, []string{service.DirtyBitmap}},
		{[]string{service.UnchangedBlocks + d.base, "x-xapi:other", service.UnchangedBlocks + "no-uuid"}, []string{service.UnchangedBlocks + d.base}},
	} {
		got, err := c.ListMetaContexts(t.Context(), name, tt.queries...)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %q (%v), want %q", tt.queries, got, err, tt.want)
		}
	}
	for _, call := range d.host.Calls() {
		if call.Method == "VBD.create" || call.Method == "VDI.list_changed_blocks" {
			t.Errorf("%s was called for a list", call.Method)
		}
	}
	if _, err := c.ListMetaContexts(t.Context(), d.host.ExportName(d.now, "OpaqueRef:none")); err == nil || !strings.Contains(err.Error(), "session rejected") {
		t.Errorf("without a session: got %v", err)
	}
	must(t, c.Abort())

	unknown := service.UnchangedBlocks + d.now
	conn := d.openAs(d.p, false, false, name, unknown, service.UnchangedBlocks+d.base)
	if got := conn.MetaContexts(); !slices.Equal(got, []string{service.UnchangedBlocks + d.base}) {
		t.Errorf("granted: %q", got)
	}
	d.p.waitLine(`changed blocks are not known`)
	must(t, conn.Close())
	d.waitClean(d.p)
}
