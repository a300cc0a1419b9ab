package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// imageKind says what is served.
type imageKind string

const (
	fileImage  imageKind = "file"  // random bytes in a file
	loopImage  imageKind = "loop"  // the same file as a block device
	zerosImage imageKind = "zeros" // mostly zeroes, but written ones
	smallImage imageKind = "small" // a quarter of the file's size
	diskImage  imageKind = "disk"  // random bytes in a file that is not in memory, see cache.go
)

// Of the image of zeroes each piece of zeroPiece bytes has a chance of
// zeroShare to be zeroes. They lie as chance has it: what lies in a row
// suits nobody in particular.
const (
	zeroPiece = 64 * kib
	zeroShare = 0.9
)

// shmDir is a file system in memory.
const shmDir = "/dev/shm"

// workFolder makes a folder for images: in memory if that has room for the
// images, the copies of them that are compared, and the page cache of the loop
// device, so that storage is not what is measured. The caller removes it.
func workFolder(size int64) (dir, where string, err error) {
	parent, where := os.TempDir(), "a temporary folder, memory having no room"
	if freeMemory() > 6*size && freeSpace(shmDir) > 4*size {
		parent, where = shmDir, "memory (tmpfs)"
	}
	dir, err = os.MkdirTemp(parent, "nbd-bench-")
	return dir, where, err
}

func freeSpace(dir string) int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0
	}
	return int64(st.Bavail) * int64(st.Bsize)
}

// images makes each image when it is first asked for.
type images struct {
	dir   string
	size  int64
	paths map[imageKind]string
	loop  *loopDevice
}

// path returns where an image is, and makes it if need be.
func (m *images) path(ctx context.Context, kind imageKind) (string, error) {
	if path, ok := m.paths[kind]; ok {
		return path, nil
	}
	path := filepath.Join(m.dir, string(kind)+".img")
	var err error
	switch kind {
	case loopImage:
		path, err = m.makeLoop(ctx)
	case smallImage:
		err = writeRandom(ctx, path, m.size/4)
	case zerosImage:
		err = writeZeros(ctx, path, m.size)
	default:
		err = writeRandom(ctx, path, m.size)
	}
	if err != nil {
		return "", fmt.Errorf("making the image %q: %w", kind, err)
	}
	m.paths[kind] = path
	return path, nil
}

// plain is the file that has the same bytes as an image.
func (m *images) plain(ctx context.Context, kind imageKind) (string, error) {
	if kind == loopImage {
		kind = fileImage
	}
	return m.path(ctx, kind)
}

func (m *images) makeLoop(ctx context.Context) (string, error) {
	file, err := m.path(ctx, fileImage)
	if err != nil {
		return "", err
	}
	if m.loop, err = newLoop(file); err != nil {
		return "", err
	}
	return m.loop.path, nil
}

// close lets go of the loop device; the kernel takes it down once the servers
// are gone. The files go with their folder.
func (m *images) close() {
	if m.loop != nil {
		m.loop.close()
	}
}

// The images are the same on every run.
func randomBytes() io.Reader { return rand.NewChaCha8([32]byte{1}) }

func writeRandom(ctx context.Context, path string, size int64) error {
	src := randomBytes()
	return writePieces(ctx, path, size, mib, func(p []byte) error {
		_, err := io.ReadFull(src, p)
		return err
	})
}

func writeZeros(ctx context.Context, path string, size int64) error {
	src, chance := randomBytes(), rand.New(rand.NewPCG(1, 2))
	return writePieces(ctx, path, size, zeroPiece, func(p []byte) error {
		if chance.Float64() < zeroShare {
			clear(p)
			return nil
		}
		_, err := io.ReadFull(src, p)
		return err
	})
}

// writePieces writes a file piece by piece, and to the disk if it is on one:
// what is dirty cannot leave the page cache.
func writePieces(ctx context.Context, path string, size, piece int64, fill func([]byte) error) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if closed := f.Close(); err == nil {
			err = closed
		}
	}()
	p := make([]byte, piece)
	for off := int64(0); off < size; off += piece {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := p[:min(piece, size-off)]
		if err := fill(p); err != nil {
			return err
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return f.Sync()
}

// sameContent compares two files byte by byte.
func sameContent(got, want string) error {
	g, err := os.Open(got)
	if err != nil {
		return err
	}
	defer g.Close()
	w, err := os.Open(want)
	if err != nil {
		return err
	}
	defer w.Close()
	a, b := make([]byte, mib), make([]byte, mib)
	for off := int64(0); ; {
		n, errGot := io.ReadFull(g, a)
		m, errWant := io.ReadFull(w, b)
		if n != m {
			return fmt.Errorf("lengths differ: %d bytes and %d", off+int64(n), off+int64(m))
		}
		if !bytes.Equal(a[:n], b[:m]) {
			i := 0
			for a[i] == b[i] {
				i++
			}
			return fmt.Errorf("byte %d differs: 0x%02x, want 0x%02x", off+int64(i), a[i], b[i])
		}
		off += int64(n)
		switch {
		case errGot == io.EOF || errGot == io.ErrUnexpectedEOF:
			return nil
		case errGot != nil:
			return errGot
		case errWant != nil:
			return errWant
		}
	}
}
