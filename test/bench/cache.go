package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cacheSizes are those of the case about the page cache: a disk that is larger
// than the memory of the server's cgroup, and a file that is not.
func cacheSizes(o options) (limit, disk, warm int64) {
	if o.quick {
		return 64 * mib, 128 * mib, 16 * mib
	}
	return 256 * mib, 1024 * mib, 100 * mib
}

// cache measures what the export of a disk does to the rest of the page cache:
// in a memory cgroup somebody reads a file until it is warm, then a server in the
// same cgroup serves a disk that does not fit in, and then it is seen how much of
// the file is still there. Every server has a cgroup and a page cache of its own.
func (b *bench) cache(ctx context.Context, c testCase) error {
	limit, diskSize, warmSize := cacheSizes(b.opts)
	warm, err := b.makeDisk(ctx, diskSize, warmSize)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.skip("%s: %v", c.name, err)
		return nil
	}
	all := b.installed(c.env)
	for round := 1; round <= b.opts.rounds; round++ {
		var line []string
		for i := range all {
			k := all[(i+round)%len(all)]
			got, err := b.cacheOnce(ctx, k, c.env, warm, limit)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, errNoCgroup) {
				b.skip("%s: %v", c.name, err)
				return nil
			}
			got.Case, got.Server, got.Round = c.name, k.name, round
			if err != nil {
				got.Failed = err.Error()
			}
			b.results.add(got)
			line = append(line, k.name+" "+inShort(got))
		}
		b.say("%s, round %d of %d: %s", c.name, round, b.opts.rounds, strings.Join(line, ", "))
	}
	return nil
}

var (
	errNoDisk   = errors.New("needs a folder on a disk, see -disk")
	errNoCgroup = errors.New("needs a memory cgroup")
)

// makeDisk makes the disk and the file to be kept warm, where the page cache is
// not all there is.
func (b *bench) makeDisk(ctx context.Context, diskSize, warmSize int64) (warm string, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(b.opts.disk, &st); err != nil {
		return "", fmt.Errorf("%w: %w", errNoDisk, err)
	}
	kind := uint32(st.Type) // its size differs between architectures
	if kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC || freeSpace(b.opts.disk) < 2*(diskSize+warmSize) {
		return "", errNoDisk
	}
	if b.diskDir, err = os.MkdirTemp(b.opts.disk, "nbd-bench-"); err != nil {
		return "", err
	}
	disk := filepath.Join(b.diskDir, "disk.img")
	if err := writeRandom(ctx, disk, diskSize); err != nil {
		return "", err
	}
	b.images.paths[diskImage] = disk
	warm = filepath.Join(b.diskDir, "warm")
	return warm, writeRandom(ctx, warm, warmSize)
}

// cacheOnce is one run of one server.
func (b *bench) cacheOnce(ctx context.Context, k kind, e env, warm string, limit int64) (got sample, err error) {
	disk, err := b.images.path(ctx, e.image)
	if err != nil {
		return got, err
	}
	group, err := newCgroup(limit)
	if err != nil {
		return got, fmt.Errorf("%w: %w", errNoCgroup, err)
	}
	defer func() { err = errors.Join(err, evict(disk), evict(warm), group.remove()) }()
	if err := errors.Join(evict(disk), evict(warm)); err != nil {
		return got, err
	}
	// Twice: what is read once is not yet worth keeping to the kernel.
	argv := inCgroup(group.dir, []string{"/bin/cat", warm, warm})
	if err := exec.CommandContext(ctx, argv[0], argv[1:]...).Run(); err != nil {
		return got, fmt.Errorf("%w: warming the file in %s: %w", errNoCgroup, group.dir, err)
	}
	switch before, err := resident(warm); {
	case err != nil:
		return got, err
	case before < 0.99:
		return got, fmt.Errorf("only %.2f of the file is warm", before)
	}
	s, err := b.start(ctx, k, e, group.dir)
	if err != nil {
		return got, err
	}
	defer s.stop()
	got, err = measured(s, func() (sample, error) { return b.copyAway(ctx, s, s.addr, copyShapes[0]) })
	if err != nil {
		return got, err
	}
	left, err := resident(warm)
	got.Resident = &left
	return got, err
}

// evict takes a file out of the page cache, where it must be clean.
func evict(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// resident is the share of a file that is in the page cache.
func resident(path string) (float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(m)
	page := os.Getpagesize()
	there := make([]byte, (len(m)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&there[0])))
	if errno != 0 {
		return 0, os.NewSyscallError("mincore", errno)
	}
	n := 0
	for _, p := range there {
		n += int(p & 1)
	}
	return float64(n) / float64(len(there)), nil
}
