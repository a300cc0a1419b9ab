package allocation

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"xapi-nbd/vdi/vhd"
)

// ErrUnknown is matched by every error of Read: it is not certain which blocks have data,
// so every block may have data. See [Reason].
var ErrUnknown = errors.New("the allocation is not known")

// unknownError is an ErrUnknown with its reason.
type unknownError struct {
	reason string
	err    error
}

func (e *unknownError) Error() string   { return e.err.Error() }
func (e *unknownError) Unwrap() []error { return []error{ErrUnknown, e.err} }

// unknown wraps err so that it matches ErrUnknown, unless it does so already.
func unknown(reason string, err error) error {
	if errors.Is(err, ErrUnknown) {
		return err
	}
	return &unknownError{reason, err}
}

// Reasons are all values that Reason returns, for metrics.
var Reasons = []string{"no_link", "not_vhd", "raw_parent", "encrypted", "too_many_images", "hidden", "size", "image", "changing", "timeout"}

// Reason is the kind of an error of Read, one of Reasons: "no_link", SM has no link to
// an image; "not_vhd", the image is of another format; "raw_parent"; "encrypted";
// "too_many_images"; "hidden", the link leads to a base copy; "size", the device and the image have
// different sizes; "image", an image is missing, damaged, unreadable or not supported;
// "changing", the images changed each time that they were read; "timeout".
func Reason(err error) string {
	var u *unknownError
	if errors.As(err, &u) {
		return u.reason
	}
	return "image"
}

// Source says where the images of a VDI are.
type Source struct {
	// Link is the symbolic link that SM keeps for a plugged VDI:
	// <device folder>/sm/phy/<SR uuid>/<VDI uuid>.
	Link string
	// Key is the name by which SM knows the VDI, mostly its uuid. The link must lead to
	// an image with that name.
	Key string
	// MapperDir is the folder of device-mapper, where LVM's images are:
	// <device folder>/mapper.
	MapperDir string
	// Size is the size of the VDI in bytes.
	Size int64
}

// readTimeout limits Read, because a client may be waiting for it.
const readTimeout = 2 * time.Second

// pauses are the pauses before a chain that could not be read is read again. They are about
// as long as a step of the garbage collector, and short because a client may be waiting.
var pauses = []time.Duration{5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 40 * time.Millisecond}

// Read reads which blocks of 2 MiB have data. It takes milliseconds, needs 16 MiB of
// reads for each 2 TiB and image at most, and returns after 2 s in any case; a read of
// a storage that hangs then goes on in the background, and closes the images when it
// has returned. The end of ctx ends the reading after the system call that is under way.
// In all other cases, the end of ctx too, the images are closed when Read returns. The
// error matches ErrUnknown. Read may be called concurrently; while 64 reads are in
// progress further ones wait.
func Read(ctx context.Context, src Source) (*vhd.BlockSet, error) {
	return readInTime(ctx, hostFiles{}, src, hostSlots)
}

// maxReads bounds the reads that are in progress, and so the threads that storage which
// hangs can take.
const maxReads = 64

// hostSlots holds a token for each read in progress on this host.
var hostSlots = make(chan struct{}, maxReads)

// readInTime is read that returns after readTimeout, even if a system call does not.
// slots bounds the reads in progress.
func readInTime(ctx context.Context, fsys fileSystem, src Source, slots chan struct{}) (*vhd.BlockSet, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	late := time.After(readTimeout)
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		cancel()
		return nil, unknown("timeout", fmt.Errorf("other reads of images do not end: %w", context.Cause(ctx)))
	}
	type result struct {
		set *vhd.BlockSet
		err error
	}
	done := make(chan result, 1)
	go func() { // ends when its last system call returns
		defer cancel()
		set, err := read(ctx, fsys, src)
		<-slots
		done <- result{set, err}
	}()
	select {
	case r := <-done:
		return r.set, r.err
	case <-late:
		return nil, unknown("timeout", errors.New("the images were not read in time"))
	}
}

// read reads the chain until it did not change meanwhile.
func read(ctx context.Context, fsys fileSystem, src Source) (*vhd.BlockSet, error) {
	for attempt := 0; ; attempt++ {
		set, err := readOnce(ctx, fsys, src)
		if err == nil {
			return set, nil
		}
		switch {
		case ctx.Err() != nil:
			return nil, unknown("timeout", err)
		case isPermanent(err) || attempt == len(pauses):
			return nil, unknown("image", err)
		}
		select {
		case <-time.After(pauses[attempt]):
		case <-ctx.Done():
			return nil, unknown("timeout", err)
		}
	}
}

// isPermanent reports whether the garbage collector cannot be the cause of an error. It
// can be that of a raw parent: when the storage of a deleted image is used for another one
// between two reads, the footer is of the one and the header of the other.
func isPermanent(err error) bool {
	switch Reason(err) {
	case "not_vhd", "encrypted", "too_many_images":
		return true
	default:
		return false
	}
}

// readOnce reads the chain once.
func readOnce(ctx context.Context, fsys fileSystem, src Source) (*vhd.BlockSet, error) {
	path, err := leafPath(fsys, src)
	if err != nil {
		return nil, err
	}
	c, err := openChain(fsys, path, src)
	defer c.close()
	if err != nil {
		return nil, err
	}
	set := vhd.NewBlockSet(src.Size)
	for _, l := range c {
		if err := l.image.AddBlocks(ctx, l.file, set); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Base(l.path), err)
		}
	}
	if err := c.recheck(fsys, src); err != nil {
		return nil, unknown("changing", err)
	}
	return set, nil
}

// leafPath follows SM's link by one step: the folder that it leads to is where the
// parents are, while the target may itself be a link to a device node.
func leafPath(fsys fileSystem, src Source) (string, error) {
	target, err := fsys.readLink(src.Link)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", unknown("no_link", errors.New("the storage manager has no link to an image of this VDI"))
	case err != nil:
		return "", unknown("no_link", err)
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(src.Link), target)
	}
	switch name := filepath.Base(target); name {
	case src.Key + ".vhd", "VHD-" + src.Key:
		return target, nil
	default:
		return "", unknown("not_vhd", fmt.Errorf("the storage manager's link leads to %s, no VHD image of this VDI", name))
	}
}

// checkLeaf checks that the first image is that of the VDI as it is plugged.
func checkLeaf(l layer, src Source) error {
	switch name := filepath.Base(l.path); {
	case l.image.IsHidden():
		return unknown("hidden", fmt.Errorf("%s is hidden, so it is no VDI's image", name))
	case l.image.Size() != src.Size:
		return unknown("size", fmt.Errorf("%s has %d bytes, the VDI has %d", name, l.image.Size(), src.Size))
	}
	return nil
}
