package main

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"xapi-nbd/internal/pagecache"
)

// cached copies a disk of which nothing is in the page cache, and measures the share of it
// that is there afterwards: pages that were taken from other files.
func (b *bench) cached(ctx context.Context, s *server) (sample, error) {
	disk := b.images.paths[diskImage]
	if err := evict(disk); err != nil {
		return sample{}, err
	}
	if before, err := resident(disk); err != nil || before > 0.01 {
		return sample{}, errors.Join(errors.New("the image cannot be dropped from the page cache"), err)
	}
	got, err := b.copyAway(ctx, s, s.addr, copyShapes[0])
	if err != nil {
		return got, err
	}
	left, err := resident(disk)
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
