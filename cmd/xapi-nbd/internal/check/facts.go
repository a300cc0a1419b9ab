package check

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/proc"
)

// Facts describe the machine and this process, without the files that the settings name.
// [Observe] collects them; tests make their own.
type Facts struct {
	Now          time.Time
	UID          int      // of this process
	Owner        int      // the uid that the state folder has to belong to
	Hostname     string   // "" if it is not known
	Addresses    []string // where clients may reach this host
	UnitCertfile string
	Unit         string // the text of the service's unit and its drop-ins
	FreeSpace    func(dir string) (bytes uint64, err error)
	OpenFiles    func(pid int) (uint64, error)
	PipeSize     int // bytes of the largest pipe that this process may have, up to wantedPipe
	Kernel       string
	Splice       error // of a trial splice(2), nil if it works
	Nowait       error // of a trial preadv2(2) with RWF_NOWAIT, nil if it works
}

// Observe returns the facts of this machine.
func Observe() Facts {
	f := Facts{
		Now: time.Now(), UID: os.Geteuid(), Owner: os.Geteuid(), UnitCertfile: unitCertfile,
		Unit:      unitText(unitDirs),
		FreeSpace: freeSpace, OpenFiles: proc.OpenFileLimit,
	}
	f.Hostname, _ = os.Hostname()
	f.Addresses = reachableAddresses()
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		f.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	f.PipeSize, f.Splice, f.Nowait = probeKernel()
	return f
}

// reachableAddresses returns the addresses of the interfaces, without loopback and
// link-local ones.
func reachableAddresses() (addresses []string) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			addresses = append(addresses, ip.IP.String())
		}
	}
	return addresses
}

func freeSpace(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, os.NewSyscallError("statfs", err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// wantedPipe is the size of the pipes that package nbd asks for, in bytes. Half of it is
// enough.
const wantedPipe = 2 << 20

// probeKernel tries the system calls that transfers use, on this program's own file. pipe is
// the largest size of a pipe that the kernel allows, up to wantedPipe, in bytes.
func probeKernel() (pipe int, splice, nowait error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		err = os.NewSyscallError("pipe2", err)
		return 0, err, err
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	for size := wantedPipe; size > 0 && pipe == 0; size /= 2 {
		if n, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, size); err == nil {
			pipe = n
		}
	}
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return pipe, err, err
	}
	defer f.Close()
	var off int64
	if _, err := unix.Splice(int(f.Fd()), &off, fds[1], nil, 4096, unix.SPLICE_F_NONBLOCK); err != nil {
		splice = os.NewSyscallError("splice", err)
	}
	_, err = unix.Preadv2(int(f.Fd()), [][]byte{make([]byte, 1)}, 0, unix.RWF_NOWAIT)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		// Other errors concern the file: it is not in the page cache, or its file system
		// does not support the flag.
		nowait = os.NewSyscallError("preadv2 RWF_NOWAIT", err)
	}
	return pipe, splice, nowait
}

// Descriptors besides those of negotiated connections: connections that negotiate
// and as many that wait to (the defaults of nbd.Server), connections that have ended
// and whose peers are still listened to, three per VBD (device and its marks), and the
// rest. Connections whose export is being opened may be as many as negotiated ones.
const (
	handshakeFiles = 2 * 512
	hangingUpFiles = 256
	filesPerVBD    = 3
	otherFiles     = 64
)

// limits compares the limits of open files and pipes with the need.
func (c *checker) limits() {
	const subject = "open files"
	need := uint64(2*max(c.cfg.MaxConnections, 0) + handshakeFiles + hangingUpFiles + filesPerVBD*max(c.cfg.MaxVBDs, 0) + otherFiles)
	whose := "this process"
	if c.service != 0 {
		whose = "the running service"
	}
	switch limit, err := c.facts.OpenFiles(c.service); {
	case err != nil:
		c.warning(subject, "Run it as root.", "the limit of %s cannot be read: %v", whose, err)
	case limit < need:
		c.problem(subject, fmt.Sprintf("Set LimitNOFILE=%d in the unit (systemctl edit xapi-nbd), or lower max_connections.", need),
			"%s may have %d, and max_connections and max_vbds take %d", whose, limit, need)
	default:
		c.ok(subject, "%s may have %d, %d are enough", whose, limit, need)
	}
	c.pipes()
}

func (c *checker) pipes() {
	const subject = "pipes"
	if c.facts.PipeSize < wantedPipe/2 {
		c.warning(subject, "sysctl fs.pipe-max-size=1048576, or leave CAP_SYS_RESOURCE to the unit.",
			"of %d KiB at most: long reads in the clear take more processor time", c.facts.PipeSize>>10)
		return
	}
	c.ok(subject, "of %d KiB", c.facts.PipeSize>>10)
}

// kernel looks at the version, and at the results of probeKernel.
func (c *checker) kernel() {
	const subject = "kernel"
	var major, minor int
	if n, _ := fmt.Sscanf(c.facts.Kernel, "%d.%d", &major, &minor); n == 2 && (major < 4 || major == 4 && minor < 19) {
		c.warning(subject, "XenServer 8 and XCP-ng 8.3 have 4.19. It may work with older ones; nobody has tried.", "%s is older than 4.19", c.facts.Kernel)
		return
	}
	var missing []string
	for _, err := range []error{c.facts.Splice, c.facts.Nowait} {
		if err != nil {
			missing = append(missing, err.Error())
		}
	}
	if len(missing) > 0 {
		c.warning(subject, "Nothing has to be done: the service does without, and takes more processor time.",
			"%s lacks: %s", c.facts.Kernel, strings.Join(missing, "; "))
		return
	}
	c.ok(subject, "%s, with splice and RWF_NOWAIT", c.facts.Kernel)
}
