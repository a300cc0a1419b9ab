package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"xapi-nbd/xapi/xapitest"
)

// The images of the service's cases. The service exports them from a simulated host, whose
// loop devices it reads.
const (
	sparseImage    imageKind = "sparse"    // one block of 2 MiB of sparseEvery has data
	incrementImage imageKind = "increment" // a snapshot, in which pieces of 64 KiB differ from an older one
	tallImage      imageKind = "tall"      // almost 2 TiB in 4 VHD images with full tables
)

// allData is the name of the service for a disk of which it knows no blocks.
const allData = "ours, all data"

const (
	sparseEvery = 32 // blocks for each one with data
	sparseTimes = 64 // the size of the disk as a multiple of the size of other images
	changeEvery = 16 // MiB of other images for each MiB of an increment
	changePiece = 64 // KiB
	tallGiB     = 2040
	tallLayers  = 4
	attachments = 8 // of the case memory/attachments
)

func isService(image imageKind) bool {
	return image == sparseImage || image == incrementImage || image == tallImage
}

// sparseHost is a simulated host with one disk.
type sparseHost struct {
	*xapitest.Host
	dir       string
	vdi, base string // uuids; base is the older snapshot, if there is one
	others    []string
	needed    []span // that have data, or have changed
	export    string // its name, with a session
}

// span is n bytes at off.
type span struct{ off, n int64 }

// total is how many bytes are in the spans that begin before end.
func total(spans []span, end int64) (n int64) {
	for _, s := range spans {
		if s.off < end {
			n += s.n
		}
	}
	return n
}

// newSparseHost starts a host. Its folder has a short name, for the sake of its socket.
func newSparseHost() (*sparseHost, error) {
	dir, err := os.MkdirTemp(shmDir, "nbd-bench-")
	if err != nil {
		return nil, err
	}
	h := &sparseHost{dir: dir}
	if h.Host, err = xapitest.Start(xapitest.Config{Dir: dir, Loop: true}); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	h.AddNetwork("insecure_nbd")
	return h, nil
}

func (h *sparseHost) close() error { return errors.Join(h.Close(), os.RemoveAll(h.dir)) }

// use makes a VDI that of the export.
func (h *sparseHost) use(vdi string) {
	h.vdi, h.export = vdi, h.exportOf(vdi)
}

func (h *sparseHost) exportOf(vdi string) string {
	return h.ExportName(vdi, h.NewSession(xapitest.RoleVMAdmin))
}

// hostOf returns the host of an image; allData has one of its own, because one service at a
// time works on a host.
func (b *bench) hostOf(image imageKind, server string) (h *sparseHost, err error) {
	key := string(image)
	if server == allData {
		key += " " + server
	}
	if h := b.hosts[key]; h != nil {
		return h, nil
	}
	if h, err = newSparseHost(); err != nil {
		return nil, err
	}
	b.hosts[key] = h
	switch {
	case server == allData: // the same bytes, without a VHD image
		var known *sparseHost
		if known, err = b.hostOf(image, ours); err != nil {
			return nil, err
		}
		h.needed = known.needed
		var vdi string
		if vdi, err = h.AddVDI(xapitest.VDISpec{Image: known.ImagePath(known.vdi)}); err == nil {
			h.use(vdi)
		}
	case image == sparseImage:
		err = h.addSparse(b.opts.size)
	case image == incrementImage:
		err = h.addIncrement(b.opts.size)
	default:
		err = h.addTall()
	}
	return h, err
}

// writeSpans writes random bytes to a VDI, and returns them.
func (h *sparseHost) writeSpans(vdi string, count, n, every int64) (spans []span, err error) {
	src, p := randomBytes(), make([]byte, n)
	for i := range count {
		_, _ = src.Read(p) // never fails
		if err := h.WriteVDI(vdi, p, i*every); err != nil {
			return nil, err
		}
		spans = append(spans, span{i * every, n})
	}
	return spans, nil
}

// addSparse adds a disk of 64 times size with data in every 32nd block.
func (h *sparseHost) addSparse(size int64) error {
	vdi, err := h.AddVDI(xapitest.VDISpec{Size: sparseTimes * size, VHD: true})
	if err != nil {
		return err
	}
	h.use(vdi)
	h.needed, err = h.writeSpans(vdi, sparseTimes*size/(sparseEvery*bulkRead), bulkRead, sparseEvery*bulkRead)
	for range attachments - 1 {
		if err == nil {
			vdi, err = h.AddVDI(xapitest.VDISpec{Size: sparseTimes * size, VHD: true})
			h.others = append(h.others, vdi)
		}
	}
	return err
}

// addIncrement adds a disk as large, and two snapshots of it. Between them a 16th of size is
// written in pieces of 64 KiB.
func (h *sparseHost) addIncrement(size int64) error {
	disk := sparseTimes * size
	vdi, err := h.AddVDI(xapitest.VDISpec{Size: disk, VHD: true})
	if err == nil {
		_, err = h.writeSpans(vdi, disk/(16*sparseEvery*bulkRead), bulkRead, 16*sparseEvery*bulkRead)
	}
	if err == nil {
		err = h.EnableCBT(vdi)
	}
	if err == nil {
		h.base, err = h.SnapshotVDI(vdi)
	}
	if err == nil {
		count := size / changeEvery / (changePiece * kib)
		h.needed, err = h.writeSpans(vdi, count, changePiece*kib, disk/count&^(changePiece*kib-1))
	}
	if err == nil {
		vdi, err = h.SnapshotVDI(vdi)
	}
	h.use(vdi)
	return err
}

// addTall adds a disk whose 4 images have full tables. Their block offsets are never used.
func (h *sparseHost) addTall() error {
	vdi, err := h.AddVDI(xapitest.VDISpec{Size: tallGiB << 30, VHD: true})
	for range tallLayers - 1 {
		if err == nil {
			_, err = h.SnapshotVDI(vdi)
		}
	}
	if err != nil {
		return err
	}
	h.use(vdi)
	const tableAt, entries = 2560, tallGiB << 30 / bulkRead
	table := make([]byte, entries*4)
	for i := range entries {
		binary.BigEndian.PutUint32(table[4*i:], uint32(1<<14+i*(bulkRead/512+1)))
	}
	for _, path := range h.Chain(vdi) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(table, tableAt)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until the service has detached the disk.
func (h *sparseHost) settle(ctx context.Context) error {
	return h.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 })
}

// device returns the block device of the disk while it is attached.
func (h *sparseHost) device() (string, error) {
	i := slices.IndexFunc(h.VBDs(), func(v xapitest.VBD) bool { return v.VDI == h.vdi && v.CurrentlyAttached })
	if i < 0 {
		return "", errors.New("the disk is not attached")
	}
	return os.Readlink(filepath.Join(h.DeviceDir(), h.VBDs()[i].Device))
}

// bytesRead returns how many bytes have been read from a block device.
func bytesRead(device string) (int64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "stat"))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text))
	if len(fields) < 3 {
		return 0, fmt.Errorf("%s has no counters: %q", device, text)
	}
	sectors, err := strconv.ParseInt(fields[2], 10, 64)
	return sectors * 512, err
}

// qcow2Of makes a loop device of a qcow2 image with the same content as a disk. That of an
// increment has a bitmap "base" of the changed blocks.
func (b *bench) qcow2Of(ctx context.Context, image imageKind) (path string, err error) {
	if l := b.qcow2[image]; l != nil {
		return l.path, nil
	}
	h, err := b.hostOf(image, ours)
	if err != nil {
		return "", err
	}
	file := filepath.Join(b.dir, string(image)+".qcow2")
	from := h.vdi
	if image == incrementImage {
		from = h.base
	}
	err = b.qemuImg(ctx, "convert", "-f", "raw", "-O", "qcow2", h.ImagePath(from), file)
	if err == nil && image == incrementImage {
		var commands strings.Builder
		for _, s := range h.needed {
			fmt.Fprintf(&commands, "write -P 90 %d %d\n", s.off, s.n)
		}
		if err = b.qemuImg(ctx, "bitmap", "--add", "-g", fmt.Sprint(changePiece*kib), file, "base"); err == nil {
			cmd := exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", file)
			cmd.Stdin = strings.NewReader(commands.String())
			if out, ioErr := cmd.CombinedOutput(); ioErr != nil {
				err = fmt.Errorf("qemu-io: %w: %.200s", ioErr, out)
			}
		}
	}
	if err == nil {
		err = padFile(file)
	}
	if err != nil {
		return "", err
	}
	if b.qcow2[image], err = newLoop(ctx, file, "--read-only"); err != nil {
		return "", err
	}
	return b.qcow2[image].path, nil
}

// padFile makes a file as long as a loop device can be, which has whole sectors.
func padFile(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Truncate(path, (fi.Size()+mib-1)/mib*mib)
}

// qemuImg runs qemu-img.
func (b *bench) qemuImg(ctx context.Context, args ...string) error {
	_, err := b.runClient(ctx, append([]string{b.programs["qemu-img"]}, args...)...)
	return err
}
