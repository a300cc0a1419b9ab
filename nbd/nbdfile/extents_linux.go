package nbdfile

import (
	"errors"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd/wire"
)

// maxExtents bounds the answer to one question, and with it the time that a
// file in many pieces takes: each extent is a system call or two.
const maxExtents = 4096

// extenter knows the holes of a regular file.
type extenter struct {
	d *device
	// data is the last range that was found to be data throughout, of a file that
	// is only read; nil: remember nothing. Asking takes some file systems as long
	// as the range is, and to call a range data that has become a hole is true
	// enough.
	data *atomic.Pointer[span]
}

// span is a range of a file.
type span struct{ begin, end int64 }

// Extents implements [nbd.Extenter] with what the file system says of holes,
// whose storage may be reserved: a hole here is a range that reads as zeroes
// without storage being asked. Where it does not say everything is data. At
// most 4096 extents are returned; the last is not cut at off+n.
func (x extenter) Extents(off, n int64) ([]wire.Extent, error) {
	if err := x.d.inside(off, n); err != nil {
		return nil, err
	}
	var extents []wire.Extent
	for at := off; at < off+n && len(extents) < maxExtents; {
		end, hole, err := x.next(at)
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		var status uint64
		if hole {
			status = wire.StateHole | wire.StateZero
		}
		// Somebody may write between two looks: equal neighbours are one.
		if last := len(extents) - 1; last >= 0 && extents[last].Status == status {
			extents[last].Length += uint64(end - at)
		} else {
			extents = append(extents, wire.Extent{Length: uint64(end - at), Status: status})
		}
		at = end
	}
	return extents, nil
}

// next looks where what begins at off ends, and whether it is a hole. Seeking
// to an absolute offset disturbs nobody: all others read and write with one.
func (x extenter) next(off int64) (end int64, hole bool, err error) {
	if x.data == nil {
		return x.seek(off)
	}
	known := x.data.Load()
	if known == nil {
		// Most files have no hole at all, which one look at their begin tells.
		known = &span{}
		if end, hole, err := x.seek(0); err == nil && !hole {
			known.end = end
		}
		x.data.Store(known)
	}
	if known.begin <= off && off < known.end {
		return known.end, false, nil
	}
	if end, hole, err = x.seek(off); err == nil && !hole {
		x.data.Store(&span{off, end})
	}
	return end, hole, err
}

// seek is next without memory.
func (x extenter) seek(off int64) (end int64, hole bool, err error) {
	switch end, err = unix.Seek(x.d.fd, off, unix.SEEK_DATA); {
	case errors.Is(err, unix.ENXIO): // no more data
		end, err = unix.Seek(x.d.fd, 0, io.SeekEnd)
		if err == nil && end <= off {
			return x.d.size, false, nil // cut off by somebody; reading tells
		}
	case errors.Is(err, unix.EINVAL) || unsupported(err):
		return x.d.size, false, nil
	}
	if end = min(end, x.d.size); err != nil || end > off {
		return end, true, err
	}
	end, err = unix.Seek(x.d.fd, off, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) || err == nil && end <= off {
		// Became a hole, or was cut off, since the first look. Calling one
		// byte data is true enough, and gets on.
		end, err = off+1, nil
	}
	return min(end, x.d.size), false, err
}
