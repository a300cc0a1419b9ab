package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"xapi-nbd/cmd/internal/sampledisk"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

const (
	demoDiskSize = sampledisk.SampleSize
	// demoBlock is the size of the blocks that xapi tracks.
	demoBlock = 64 << 10
)

// makeDisk makes a disk with changed block tracking, and its first snapshot.
func (w *world) makeDisk() (err error) {
	w.vdi, err = w.host.AddVDI(xapitest.VDISpec{Size: demoDiskSize, VHD: true, NameLabel: "sample disk"})
	if err != nil {
		return err
	}
	content := make(memoryDisk, demoDiskSize)
	if err := sampledisk.Write(content, demoDiskSize, sampledisk.Sample()); err != nil {
		return err
	}
	zeroes := make([]byte, demoBlock)
	for off := 0; off < demoDiskSize; off += demoBlock {
		if block := content[off : off+demoBlock]; !bytes.Equal(block, zeroes) {
			if err := w.host.WriteVDI(w.vdi, block, int64(off)); err != nil {
				return err
			}
		}
	}
	if err := w.host.EnableCBT(w.vdi); err != nil {
		return err
	}
	w.first, err = w.host.SnapshotVDI(w.vdi)
	return err
}

// memoryDisk is a disk in memory.
type memoryDisk []byte

// WriteAt implements io.WriterAt.
func (d memoryDisk) WriteAt(p []byte, off int64) (int, error) { return copy(d[off:], p), nil }

// changeDisk writes to the disk as a VM does, and makes the second snapshot.
func (w *world) changeDisk() (err error) {
	for _, block := range []int64{40, 41, 100, 900} {
		changed := bytes.Repeat([]byte("changed\n"), demoBlock/8)
		if err := w.host.WriteVDI(w.vdi, changed, block*demoBlock); err != nil {
			return err
		}
	}
	if w.second, err = w.host.SnapshotVDI(w.vdi); err != nil {
		return err
	}
	w.say("\nA VM writes four blocks of 64 KiB. A second snapshot:")
	w.say("  snapshot %s", w.second)
	return nil
}

func (w *world) copyPath() string { return filepath.Join(w.dir, "copy.img") }

// fullCopy copies the blocks of the first snapshot that have data.
func (w *world) fullCopy(ctx context.Context) error {
	read, err := w.copyBlocks(ctx, w.first, wire.BaseAllocation, os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	w.say("A full copy: %d of %d bytes read, the others are in blocks without data.", read, demoDiskSize)
	return w.compare(w.first)
}

// increment brings the copy of the first snapshot up to date with the second one.
func (w *world) increment(ctx context.Context) error {
	read, err := w.copyBlocks(ctx, w.second, service.UnchangedBlocks+w.first, 0)
	if err != nil {
		return err
	}
	w.say("An increment into the same copy: %d of %d bytes read, the others are unchanged.", read, demoDiskSize)
	return w.compare(w.second)
}

// copyBlocks copies to the file the blocks that a metadata context selects, and returns how
// many bytes it has read. The VBD has been removed when it returns.
func (w *world) copyBlocks(ctx context.Context, vdi, metaContext string, flags int) (read int64, err error) {
	conn, err := w.connect(ctx, vdi, metaContext)
	if err != nil {
		return 0, err
	}
	f, err := os.OpenFile(w.copyPath(), os.O_RDWR|flags, 0o600)
	if err == nil {
		bar := newProgress(w.err, conn.Size())
		read, err = copyExtents(ctx, f, conn, metaContext, bar)
		err = errors.Join(err, bar.Close(), f.Close())
	}
	if err := errors.Join(err, conn.Close()); err != nil {
		return 0, err
	}
	return read, w.waitRemoved(ctx)
}

// copyExtents reads the extents that may have data or have changed. NBD_STATE_ZERO is the
// bit of those that read as zeroes, in base:allocation and in x-xapi:unchanged. Bit 0 is
// "unchanged" in the latter only: a hole of base:allocation alone says nothing of the
// content. f is a full copy of the base, or empty.
func copyExtents(ctx context.Context, f *os.File, conn *client.Conn, metaContext string, progress io.Writer) (read int64, err error) {
	if !slices.Contains(conn.MetaContexts(), metaContext) {
		return 0, fmt.Errorf("the service does not tell %s", metaContext)
	}
	if err := f.Truncate(conn.Size()); err != nil {
		return 0, err
	}
	off := int64(0)
	for e, err := range conn.Extents(ctx, metaContext, 0, conn.Size()) {
		if err != nil {
			return read, err
		}
		n := int64(e.Length)
		switch {
		case e.Status&wire.StateZero != 0:
			err = copyRange(f, io.LimitReader(zeroReader{}, n), off, progress)
		case e.Status != 0 && metaContext != wire.BaseAllocation: // unchanged
			_, err = io.CopyN(progress, zeroReader{}, n)
		default:
			read += n
			err = copyRange(f, io.NewSectionReader(conn, off, n), off, progress)
		}
		if err != nil {
			return read, err
		}
		off += n
	}
	return read, nil
}

// copyRange writes r to f at off.
func copyRange(f *os.File, r io.Reader, off int64, progress io.Writer) error {
	_, err := io.CopyBuffer(io.MultiWriter(io.NewOffsetWriter(f, off), progress), r, make([]byte, 2<<20))
	return err
}

// zeroReader reads zeroes without end.
type zeroReader struct{}

// Read implements io.Reader.
func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// newProgress is a progress bar on a terminal and silence elsewhere.
func newProgress(w io.Writer, size int64) *progressbar.ProgressBar {
	f, ok := w.(*os.File)
	visible := ok && term.IsTerminal(int(f.Fd()))
	return progressbar.NewOptions64(size,
		progressbar.OptionSetWriter(w), progressbar.OptionSetVisibility(visible),
		progressbar.OptionSetDescription("  copying"), progressbar.OptionSetWidth(30),
		progressbar.OptionShowBytes(true), progressbar.OptionShowTotalBytes(true), progressbar.OptionUseIECUnits(true),
		progressbar.OptionOnCompletion(func() {
			if visible {
				fmt.Fprintln(w)
			}
		}))
}

// compare prints the checksums of the copy and of a VDI without VBDs, and fails unless
// they match.
func (w *world) compare(vdi string) error {
	want, err := fileSum(w.host.ImagePath(vdi))
	if err != nil {
		return err
	}
	got, err := fileSum(w.copyPath())
	if err != nil {
		return err
	}
	w.say("Checksums (SHA-256):")
	w.say("  on the host  %s", want)
	w.say("  copy         %s", got)
	if got != want {
		return errors.New("the checksums differ")
	}
	w.say("They match.")
	return nil
}

// fileSum returns the SHA-256 of a file, in hex.
func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
