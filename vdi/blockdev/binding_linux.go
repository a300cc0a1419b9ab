package blockdev

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// ErrReplaced means that the device is not the one that was opened any more: it was
// unplugged, and its node may lead to another disk.
var ErrReplaced = errors.New("the device is not the one that was opened")

// Roots are the folders whose files describe the binding of an NBD device of the kernel.
// Empty fields mean the folders of a real host.
type Roots struct {
	// Sys has block/nbdN/pid, which changes with every binding; default /sys.
	Sys string
	// NBD has a file N for each binding, kept by xapi's helper; default
	// /var/run/nonpersistent/nbd.
	NBD string
}

func (r Roots) withDefaults() Roots {
	return Roots{Sys: cmp.Or(r.Sys, defaultSys), NBD: cmp.Or(r.NBD, defaultNBD)}
}

// The folders of a real host.
const (
	defaultSys = "/sys"
	defaultNBD = "/var/run/nonpersistent/nbd"
)

// binding is the binding of a /dev/nbdN when it was opened. There are few such nodes and
// all tools share them: after an unplug by another client of xapi a node can be bound to
// another disk, and a descriptor that is still open then reads that disk.
//
// Both files are kept open, so that check takes two short system calls without a path
// lookup. For an open descriptor a removed file stays removed, even if its name exists
// again.
type binding struct {
	pid     *os.File // block/nbdN/pid: removed when the device is disconnected and closed everywhere
	pidText []byte
	record  *os.File // file of xapi's helper: unlinked or rewritten at a disconnect
	state   unix.Stat_t
	noted   Record // the parsed content of record
}

// Record is the content and the identity of the file in which xapi's helper records a
// binding of a /dev/nbdN. The records of two bindings differ even for the same image.
type Record struct {
	// Path is the path of the socket that serves the image; "" if the file does not have
	// it. Its last element is the key of the image.
	Path       string
	dev, ino   uint64
	size       int64
	mtim, ctim unix.Timespec
}

// ReadRecord returns the record of the device at path. ok is false when it is not
// called nbdN, or when there is no record, because nothing is bound.
func ReadRecord(path string, roots Roots) (r Record, ok bool, err error) {
	n, ok := nbdNumber(path)
	if !ok {
		return Record{}, false, nil
	}
	f, err := openIfThere(recordPath(n, roots.withDefaults()))
	if f == nil || err != nil {
		return Record{}, false, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Record{}, false, os.NewSyscallError("fstat", err)
	}
	return newRecord(f, st), true, nil
}

func newRecord(f *os.File, st unix.Stat_t) Record {
	var content struct {
		Path string `json:"path"`
	}
	// A record that cannot be parsed still identifies the binding.
	_ = json.NewDecoder(io.NewSectionReader(f, 0, maxRecord)).Decode(&content)
	return Record{Path: content.Path, dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtim: st.Mtim, ctim: st.Ctim}
}

var nbdName = regexp.MustCompile(`^nbd([0-9]+)$`)

// newBinding returns nil for a device that cannot be bound again under an open descriptor:
// blktap and Xen's frontends cannot be removed while they are open, or fail all reads
// afterwards.
func newBinding(path string, roots Roots) (*binding, error) {
	n, ok := nbdNumber(path)
	if !ok {
		return nil, nil
	}
	b := &binding{}
	err := b.open(n, roots)
	if err == nil && b.pid == nil && b.record == nil {
		err = fmt.Errorf("%w: neither %s nor %s exists", errUnbound, pidPath(n, roots), recordPath(n, roots))
	}
	if err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// nbdNumber finds the N of nbdN in a path or in the target of its symbolic links.
func nbdNumber(path string) (string, bool) {
	names := []string{path}
	if target, err := filepath.EvalSymlinks(path); err == nil {
		names = append(names, target)
	}
	for _, name := range names {
		if m := nbdName.FindStringSubmatch(filepath.Base(name)); m != nil {
			return m[1], true
		}
	}
	return "", false
}

// errUnbound means that neither file describes the binding of an NBD device.
var errUnbound = errors.New("nothing tells what the NBD device is bound to")

func pidPath(n string, r Roots) string    { return filepath.Join(r.Sys, "block", "nbd"+n, "pid") }
func recordPath(n string, r Roots) string { return filepath.Join(r.NBD, n) }

func (b *binding) open(n string, roots Roots) (err error) {
	if b.pid, err = openIfThere(pidPath(n, roots)); err != nil {
		return err
	}
	if b.pid != nil {
		var text [pidLen]byte
		n, _ := b.pid.ReadAt(text[:], 0) // reads nothing if the file was just removed
		if n == 0 {
			return fmt.Errorf("%w: %s is empty", errUnbound, b.pid.Name())
		}
		b.pidText = bytes.Clone(text[:n])
	}
	if b.record, err = openIfThere(recordPath(n, roots)); err != nil || b.record == nil {
		return err
	}
	if err := unix.Fstat(int(b.record.Fd()), &b.state); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	b.noted = newRecord(b.record, b.state)
	return nil
}

// maxRecord is larger than a record, which has two short strings.
const maxRecord = 64 << 10

// pidLen is longer than the text of a pid.
const pidLen = 32

func openIfThere(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// check returns ErrReplaced if the binding has changed. It is called after every read, so
// it neither opens files nor allocates memory.
func (b *binding) check() error {
	if b.pid != nil {
		var text [pidLen]byte
		// A read error means that the file was removed; the text is then empty.
		if n, _ := unix.Pread(int(b.pid.Fd()), text[:], 0); !bytes.Equal(text[:max(n, 0)], b.pidText) {
			return fmt.Errorf("%w: %s has changed", ErrReplaced, b.pid.Name())
		}
	}
	if b.record == nil {
		return nil
	}
	var now unix.Stat_t
	if err := unix.Fstat(int(b.record.Fd()), &now); err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, os.NewSyscallError("fstat", err))
	}
	if now.Nlink == 0 || now.Size != b.state.Size || now.Mtim != b.state.Mtim || now.Ctim != b.state.Ctim {
		return fmt.Errorf("%w: %s has changed", ErrReplaced, b.record.Name())
	}
	return nil
}

func (b *binding) close() {
	for _, f := range []*os.File{b.pid, b.record} {
		if f != nil {
			f.Close()
		}
	}
}
