package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
)

// cacheSizes returns the sizes of the case about the page cache: the limit of the server's
// cgroup, a disk that is larger, and a file that is smaller.
func cacheSizes(quick bool) (limit, disk, warm int64) {
	if quick {
		return 64 * mib, 128 * mib, 16 * mib
	}
	return 256 * mib, 1024 * mib, 100 * mib
}

// cache measures how the export of a disk changes the page cache. In a memory cgroup a file
// is read until it is cached; then a server in that cgroup exports a disk that does not fit;
// then the pages of the file that are still cached are counted. Every run has its own
// cgroup.
func (b *bench) cache(ctx context.Context, c testCase) error {
	limit, diskSize, warmSize := cacheSizes(b.opts.quick)
	warm, err := b.makeDisk(ctx, diskSize, warmSize)
	if err != nil {
		b.skip("%s: %v", c.name, err)
		return nil
	}
	all := b.kinds(c.env)
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
			got = got.of(c, k.name, round, err)
			b.results = append(b.results, got)
			line = append(line, k.name+" "+got.summary())
		}
		b.say("%s, round %d of %d: %s", c.name, round, b.opts.rounds, strings.Join(line, ", "))
	}
	return nil
}

var errNoCgroup = errors.New("needs a memory cgroup")

// makeDisk makes the disk and the file on a file system that does not live in memory.
func (b *bench) makeDisk(ctx context.Context, diskSize, warmSize int64) (warm string, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(b.opts.disk, &st); err != nil {
		return "", fmt.Errorf("-disk: %w", err)
	}
	kind := uint32(st.Type) // its size differs between architectures
	if kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC || freeSpace(b.opts.disk) < 2*(diskSize+warmSize) {
		return "", errors.New("needs a folder on a disk, see -disk")
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
	disk := b.images.paths[e.image]
	group, err := newCgroup(limit)
	if err != nil {
		return got, fmt.Errorf("%w: %w", errNoCgroup, err)
	}
	defer func() { err = errors.Join(err, evict(disk), evict(warm), group.remove()) }()
	if err := errors.Join(evict(disk), evict(warm)); err != nil {
		return got, err
	}
	// Twice: the kernel does not yet keep pages that were read once.
	argv := inCgroup(group.dir, []string{"/bin/cat", warm, warm})
	if err := exec.CommandContext(ctx, argv[0], argv[1:]...).Run(); err != nil {
		return got, fmt.Errorf("%w: reading a file in %s: %w", errNoCgroup, group.dir, err)
	}
	switch before, err := resident(warm); {
	case err != nil:
		return got, err
	case before < 0.99:
		return got, fmt.Errorf("only %.2f of the file is cached", before)
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

// evict drops a clean file from the page cache.
func evict(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// resident returns the share of a file's pages that are in the page cache.
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
	var cached, pages int
	for off := int64(0); off < fi.Size(); off += int64(os.Getpagesize()) {
		in, err := pagecache.Resident(int(f.Fd()), off)
		if err != nil {
			return 0, err
		}
		if pages++; in {
			cached++
		}
	}
	return float64(cached) / float64(pages), nil
}
