package copying

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdfile"
	"xapi-nbd/nbd/wire"
)

// fileEnd is a file or a block device.
type fileEnd struct {
	path string
	dev  nbd.Device
	w    io.WriterAt // nil if it is only read
	// look makes Zero read first, and zero only bytes that are not zero: the kernel would write
	// zeroes, for which thin storage behind the device would be allocated.
	look   bool
	opened os.FileInfo // of the file; nil if it is not known
}

// OpenFile opens a regular file or a block device as an end. Its size does not change any
// more. The caller closes it.
func OpenFile(path string, readOnly bool) (End, error) {
	d, err := nbdfile.Open(path, nbdfile.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	return newFileEnd(path, d), nil
}

// OpenFileExclusively is OpenFile for reading and writing, with a lock: see
// [nbdfile.Options].Exclusive.
func OpenFileExclusively(path string) (End, error) {
	d, err := nbdfile.Open(path, nbdfile.Options{Exclusive: true})
	if err != nil {
		return nil, err
	}
	return newFileEnd(path, d), nil
}

func newFileEnd(path string, d nbd.Device) *fileEnd {
	w, _ := d.(io.WriterAt)
	f := &fileEnd{path: path, dev: d, w: w, look: w != nil && !canDiscard(d)}
	if file := f.file(); file != nil {
		f.opened, _ = file.Stat()
	}
	return f
}

// file returns the open file, nil if the device has none.
func (f *fileEnd) file() *os.File {
	if backed, ok := f.dev.(nbd.FileBacked); ok {
		return backed.File()
	}
	return nil
}

// Check implements [checker]: the file still has its size, and if it was written to, its path.
func (f *fileEnd) Check() error {
	if f.opened == nil {
		return nil
	}
	size, err := f.file().Seek(0, io.SeekEnd) // also that of a block device
	switch {
	case err != nil:
		return err
	case size != f.Size():
		return fmt.Errorf("%s: its size has changed from %d to %d bytes meanwhile", f.path, f.Size(), size)
	case f.w == nil:
		return nil
	}
	now, err := os.Stat(f.path)
	if err == nil && !os.SameFile(now, f.opened) {
		err = fmt.Errorf("%s: it was replaced by another file meanwhile", f.path)
	}
	return err
}

// Modified reports whether a regular file was written to since it was opened.
func (f *fileEnd) Modified() bool {
	if f.opened == nil || !f.opened.Mode().IsRegular() {
		return false
	}
	now, err := f.file().Stat()
	return err == nil && !now.ModTime().Equal(f.opened.ModTime())
}

// canDiscard reports whether zeroing frees storage, as far as that is known: that is so for
// regular files, and for block devices of which the kernel says so.
func canDiscard(d nbd.Device) bool {
	backed, ok := d.(nbd.FileBacked)
	if !ok {
		return true
	}
	st, err := backed.File().Stat()
	if err != nil || st.Mode().IsRegular() {
		return true
	}
	number := st.Sys().(*syscall.Stat_t).Rdev
	folder := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number))
	for _, queue := range []string{"/queue", "/../queue"} { // that of a partition is its disk's
		if text, err := os.ReadFile(folder + queue + "/discard_max_bytes"); err == nil {
			return strings.TrimSpace(string(text)) != "0"
		}
	}
	return false
}

func (f *fileEnd) Name() string  { return f.path }
func (f *fileEnd) Size() int64   { return f.dev.Size() }
func (f *fileEnd) Unit() int64   { return 1 } // reads and writes go through the page cache
func (f *fileEnd) Lanes() int    { return 1 }
func (f *fileEnd) Losses() int64 { return 0 }
func (f *fileEnd) Close() error  { return f.dev.Close() }

func (f *fileEnd) Extents() extents.Asker {
	e, ok := f.dev.(nbd.Extenter)
	if !ok {
		return nil
	}
	return func(ctx context.Context, off, n int64) ([]wire.Extent, error) {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		return e.Extents(off, n)
	}
}

func (f *fileEnd) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	n, err := f.dev.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: it has become shorter than the %d bytes that it had: %w", f.path, f.Size(), io.ErrUnexpectedEOF)
	}
	return err
}

func (f *fileEnd) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	_, err := f.w.WriteAt(p, off)
	return err
}

// Zero zeroes a range with a function of the file system or of the device if there is one,
// and else by writing.
func (f *fileEnd) Zero(ctx context.Context, off, n int64) error {
	if !f.look {
		return f.zero(ctx, off, n)
	}
	p := make([]byte, chunkSize)
	for end := off + n; off < end; off += chunkSize {
		p = p[:min(chunkSize, end-off)]
		if err := f.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if bytes.Equal(p, zeroes[:len(p)]) {
			continue
		}
		if err := f.zero(ctx, off, int64(len(p))); err != nil {
			return err
		}
	}
	return nil
}

func (f *fileEnd) zero(ctx context.Context, off, n int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if z, ok := f.dev.(nbd.ZeroWriter); ok {
		return z.WriteZeroes(off, n, false, false)
	}
	return writeZeroes(ctx, f, off, n)
}

// writeZeroes zeroes a range of an end by writing.
func writeZeroes(ctx context.Context, e End, off, n int64) error {
	for end := off + n; off < end; off += chunkSize {
		if err := e.WriteAt(ctx, zeroes[:min(chunkSize, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

func (f *fileEnd) Trim(ctx context.Context, off, n int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if t, ok := f.dev.(nbd.Trimmer); ok {
		return t.Trim(off, n)
	}
	return nil
}

func (f *fileEnd) CanTrim() bool {
	_, ok := f.dev.(nbd.Trimmer)
	return ok
}

func (f *fileEnd) CanFlush() bool { return true }

func (f *fileEnd) Flush(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if fl, ok := f.dev.(nbd.Flusher); ok {
		return fl.Flush()
	}
	return nil
}
