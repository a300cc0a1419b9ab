package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// imageKind is the image that is served.
type imageKind string

const (
	fileImage  imageKind = "file"  // random bytes in a file
	loopImage  imageKind = "loop"  // the same file as a block device
	zerosImage imageKind = "zeros" // mostly zeroes, but written ones
	smallImage imageKind = "small" // a quarter of the file's size
	diskImage  imageKind = "disk"  // random bytes in a file on a disk

	targetImage     imageKind = "file-target" // a file to be written
	targetLoopImage imageKind = "loop-target" // the same file as a block device
)

// Of zerosImage each piece of zeroPiece bytes is zero with a probability of zeroShare.
// The pieces are random so that their order favours no server.
const (
	zeroPiece = 64 * kib
	zeroShare = 0.9
)

// shmDir is a file system in memory.
const shmDir = "/dev/shm"

// workFolder makes a folder for images, in memory if there is room for the images and the
// page cache of the loop device, so that storage is not measured. It also returns a
// description of the place. The caller removes the folder.
func workFolder(size int64) (dir, where string, err error) {
	parent, where := os.TempDir(), "a temporary folder, because memory has no room"
	if freeMemory() > 5*size && freeSpace(shmDir) > 3*size {
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

// images makes each image on first use.
type images struct {
	dir     string
	diskDir string // the folder for diskImage, not in memory
	size    int64
	paths   map[imageKind]string
	loop    *loopDevice
	target  *loopDevice // of targetImage
}

// path returns the path of an image. It makes the image if there is none.
func (m *images) path(ctx context.Context, kind imageKind) (string, error) {
	if path, ok := m.paths[kind]; ok {
		return path, nil
	}
	path := filepath.Join(m.dir, string(kind)+".img")
	var err error
	switch kind {
	case loopImage:
		m.loop, path, err = m.makeLoop(ctx, fileImage, "--read-only")
	case targetLoopImage:
		m.target, path, err = m.makeLoop(ctx, targetImage)
	case diskImage:
		path, err = m.makeDisk(ctx)
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

// plain returns the path of a file with the same bytes as an image.
func (m *images) plain(ctx context.Context, kind imageKind) (string, error) {
	if kind == loopImage {
		kind = fileImage
	}
	return m.path(ctx, kind)
}

// makeLoop makes a loop device of an image.
func (m *images) makeLoop(ctx context.Context, of imageKind, args ...string) (loop *loopDevice, path string, err error) {
	file, err := m.path(ctx, of)
	if err != nil {
		return nil, "", err
	}
	if loop, err = newLoop(ctx, file, args...); err != nil {
		return nil, "", err
	}
	return loop, loop.path, nil
}

// makeDisk makes an image on a file system whose pages can be dropped from the page cache.
func (m *images) makeDisk(ctx context.Context) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.diskDir, &st); err != nil {
		return "", fmt.Errorf("-disk: %w", err)
	}
	kind := uint32(st.Type) // its size differs between architectures
	if kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC || freeSpace(m.diskDir) < 2*m.size {
		return "", errors.New("needs a folder on a disk, see -disk")
	}
	path := filepath.Join(m.diskDir, fmt.Sprintf("nbd-bench-%d.img", os.Getpid()))
	m.paths[diskImage] = path // to be removed in any case
	return path, writeRandom(ctx, path, m.size)
}

// close closes the loop devices, which the kernel removes once no server has them open, and
// removes the image on the disk. The caller removes the others with their folder.
func (m *images) close() error {
	for _, loop := range []*loopDevice{m.loop, m.target} {
		if loop != nil {
			loop.close()
		}
	}
	if path := m.paths[diskImage]; path != "" {
		return os.Remove(path)
	}
	return nil
}

// randomBytes returns the same bytes in every run.
func randomBytes() io.Reader { return rand.NewChaCha8([32]byte{1}) }

func writeRandom(ctx context.Context, path string, size int64) error {
	src := randomBytes()
	return writePieces(ctx, path, size, mib, func(p []byte) error {
		_, err := io.ReadFull(src, p)
		return err
	})
}

func writeZeros(ctx context.Context, path string, size int64) error {
	src, rng := randomBytes(), rand.New(rand.NewPCG(1, 2))
	return writePieces(ctx, path, size, zeroPiece, func(p []byte) error {
		if rng.Float64() < zeroShare {
			clear(p)
			return nil
		}
		_, err := io.ReadFull(src, p)
		return err
	})
}

// writePieces writes a file piece by piece, and syncs it: dirty pages cannot be dropped
// from the page cache.
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

// loopDevice is a loop device that the kernel removes when its last descriptor is closed, so it
// does not outlive the program.
type loopDevice struct {
	path string
	fd   int // keeps the device while no server has it open
}

// newLoop makes a loop device of a file, with further arguments of losetup. That takes root and
// a kernel that lets the program use loop devices.
func newLoop(ctx context.Context, image string, args ...string) (*loopDevice, error) {
	argv := append(args, "--find", "--show", image)
	out, err := exec.CommandContext(ctx, "losetup", argv...).CombinedOutput()
	path := strings.TrimSpace(string(out))
	if err != nil {
		return nil, fmt.Errorf("losetup: %w: %s", err, path)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	// A device that is open is detached when it is closed.
	if out, detachErr := exec.Command("losetup", "--detach", path).CombinedOutput(); detachErr != nil {
		err = errors.Join(err, fmt.Errorf("losetup --detach: %w: %s", detachErr, out))
	}
	return &loopDevice{path, fd}, err
}

// drop drops the device's pages from the page cache, so that every read waits for the
// device. The pages of the image below it stay, so the device is always as fast.
func (l *loopDevice) drop() error {
	return os.NewSyscallError("BLKFLSBUF", unix.IoctlSetInt(l.fd, unix.BLKFLSBUF, 0))
}

func (l *loopDevice) close() { _ = unix.Close(l.fd) }
