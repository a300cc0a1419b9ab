package nbdfile

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd/wire"
)

// maxExtents limits the extents that one call returns, and so the time that a fragmented
// file takes: each extent needs one or two system calls.
const maxExtents = 4096

// extenter finds the holes of a regular file.
type extenter struct{ d *device }

// Extents implements [nbd.Extenter] with the holes that the file system reports: ranges that
// read as zeroes without storage being read. Storage may be reserved for them. If the file
// system reports none, all of the file is data. At most 4096 extents are returned; the last
// one may end after off+n.
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
		// The file may be written to between two calls: join neighbours with the same
		// status.
		if last := len(extents) - 1; last >= 0 && extents[last].Status == status {
			extents[last].Length += uint64(end - at)
		} else {
			extents = append(extents, wire.Extent{Length: uint64(end - at), Status: status})
		}
		at = end
	}
	return extents, nil
}

// next returns where the hole or data at off ends, and whether it is a hole.
func (x extenter) next(off int64) (end int64, hole bool, err error) {
	file := x.d.shared
	if file.data.Load() == nil {
		x.searchFirst()
	}
	if end, found := file.dataAt(off); found {
		return min(end, x.d.size), false, nil
	}
	known := file.data.Load()
	if end, hole, err = x.seek(off); err == nil && !hole {
		file.remember(known, span{off, end})
	}
	return end, hole, err
}

// searchFirst looks for data at the beginning: most files have no holes, which one call shows.
func (x extenter) searchFirst() {
	file := x.d.shared
	file.searching.Lock()
	defer file.searching.Unlock()
	if file.data.Load() != nil {
		return
	}
	if end, hole, err := x.seek(0); err == nil && !hole {
		file.remember(nil, span{0, end})
	} else {
		file.data.CompareAndSwap(nil, &[]span{})
	}
}

// seek is next without the cache: it asks the file system each time. The file offset, which it
// changes, is not used by any other call.
func (x extenter) seek(off int64) (end int64, hole bool, err error) {
	switch end, err = unix.Seek(x.d.fd, off, unix.SEEK_DATA); {
	case errors.Is(err, unix.ENXIO): // no more data
		end, err = unix.Seek(x.d.fd, 0, io.SeekEnd)
		if err == nil && end <= off {
			return x.d.size, false, nil // the file has become shorter; reading fails
		}
	case errors.Is(err, unix.EINVAL) || unsupported(err):
		return x.d.size, false, nil
	}
	if end = min(end, x.d.size); err != nil || end > off {
		return end, true, err
	}
	end, err = unix.Seek(x.d.fd, off, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) || err == nil && end <= off {
		// It has become a hole, or the file shorter, since the first call. Calling one
		// byte data is correct in either case.
		end, err = off+1, nil
	}
	return min(end, x.d.size), false, err
}
