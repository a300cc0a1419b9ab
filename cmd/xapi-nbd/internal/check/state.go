package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
	"xapi-nbd/vdi"
)

// user reports whether this process is root. Another user lacks the rights to read much
// that the service can read, so the findings, and their remedies, would be wrong.
func (c *checker) user() bool {
	if c.facts.UID == 0 {
		return true
	}
	c.problem("user", "Run it as root, as the service runs.", "uid %d may not read the files of the service; nothing was checked", c.facts.UID)
	return false
}

// running looks for a service that uses the state folder, by its control socket and by its
// lock. It does not take the lock, which a service that starts at this moment must get.
func (c *checker) running(ctx context.Context) {
	control := filepath.Join(c.cfg.StateDir, control.SocketName)
	pid, err := proc.SocketOwner(ctx, control)
	if err == nil {
		c.service = pid
		c.ok("service", "running, process %d", pid)
		return
	}
	lock := vdi.LockPath(c.cfg.StateDir)
	if pid := proc.LockHolder(lock); pid != 0 {
		c.service = pid
		c.warning("service", "If it does not stop by itself: systemctl restart xapi-nbd",
			"process %d holds %s but does not answer on its control socket: %v", pid, lock, err)
		return
	}
	c.ok("service", "not running")
}

// Free bytes below which the journal cannot be written, or may soon not be.
const (
	leastSpace  = 1 << 20
	enoughSpace = 16 << 20
)

func (c *checker) stateFolder() {
	const subject = "state folder"
	dir := c.cfg.StateDir
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent := existingParent(dir)
		if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
			c.problem(subject, "Make it by hand: install -d -m 0755 "+dir, "%s is missing and cannot be made in %s: %v", dir, parent, err)
			return
		}
		c.ok(subject, "%s is made at the first start", dir)
		return
	case err != nil:
		c.problem(subject, "Give the service's user access to it, or choose another with state_dir.", "%v", err)
		return
	case !st.IsDir():
		c.problem(subject, "Move it away, or choose another with state_dir.", "%s is not a folder", dir)
		return
	}
	before := len(c.report.Findings)
	c.rights(dir, st)
	c.space(dir)
	if len(c.report.Findings) == before {
		c.ok(subject, "%s", dir)
	}
}

// rights checks owner and mode of the state folder.
func (c *checker) rights(dir string, st fs.FileInfo) {
	const subject = "state folder"
	if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != c.facts.Owner {
		c.problem(subject, fmt.Sprintf("chown %d %s", c.facts.Owner, dir), "%s belongs to uid %d, not to uid %d", dir, owner, c.facts.Owner)
	}
	if st.Mode().Perm()&0o022 != 0 {
		c.problem(subject, "chmod go-w "+dir, "others may write to %s (mode %04o), and VBDs in the journal get destroyed", dir, st.Mode().Perm())
	}
	if err := unix.Access(dir, unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
		c.problem(subject, "Look at its mode, and whether its file system is mounted read-only.", "%s cannot be written to: %v", dir, err)
	}
}

func (c *checker) space(dir string) {
	const subject = "state folder"
	free, err := c.facts.FreeSpace(dir)
	remedy := "Make room on the file system of " + dir + "."
	switch {
	case err != nil:
		c.problem(subject, remedy, "%s: %v", dir, err)
	case free < leastSpace:
		c.problem(subject, remedy, "%d KiB are free in %s: no VBD can be recorded, so none is plugged", free>>10, dir)
	case free < enoughSpace:
		c.warning(subject, remedy, "only %d MiB are free in %s", free>>20, dir)
	}
}

// existingParent returns the closest folder above dir that exists.
func existingParent(dir string) string {
	for {
		dir = filepath.Dir(filepath.Clean(dir))
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
	}
}

// pendingCreates adds a finding about the calls of VBD.create that xapi may still execute,
// if there are any. It reports whether there are, or may be.
func (c *checker) pendingCreates() bool {
	const subject = "journal"
	creates, err := vdi.ReadPendingCreates(c.cfg.StateDir)
	switch {
	case errors.Is(err, unix.ENOTDIR): // has been reported
	case err != nil:
		c.problem(subject, "Make it readable, or move it away: VBDs of such calls are found by their tag, too.", "%v", err)
	case len(creates) == 0:
		return false
	case c.service != 0:
		c.ok(subject, "%s, which the running service looks for", text.Count(len(creates), "unanswered call"))
	default:
		var vdis []string
		for _, create := range creates {
			vdis = append(vdis, "VDI "+create.VDI+" since "+create.Since.UTC().Format(time.RFC3339))
		}
		c.warning(subject, "Start the service, which looks for their VBDs, or: xapi-nbd cleanup",
			"%s may still be executed by xapi: %s", text.Count(len(creates), "unanswered call"), strings.Join(vdis, ", "))
	}
	return true
}

// leftovers adds a finding about the VBDs of the journal and those with this host's tag.
func (c *checker) leftovers(ctx context.Context) {
	pending := c.pendingCreates()
	const subject = "journal"
	vbds, malformed, err := vdi.ReadJournal(c.cfg.StateDir)
	if err != nil && !errors.Is(err, unix.ENOTDIR) { // ENOTDIR was reported with the state folder
		c.problem(subject, "Make it readable, or move it away and look for VBDs of the control domain by hand.", "%v", err)
		return
	}
	if malformed > 0 {
		c.warning(subject, "Nothing has to be done: they go with the next VBD that is plugged.",
			"%s of %s not a uuid and ignored", text.Count(malformed, "line")+isOrAre(malformed), vdi.JournalPath(c.cfg.StateDir))
	}
	vbds = slices.Compact(slices.Sorted(slices.Values(append(vbds, c.tagged(ctx)...))))
	switch {
	case c.service != 0:
		c.ok(subject, "%s, which the running service uses or removes", text.Count(len(vbds), "VBD"))
	case len(vbds) > 0:
		c.warning(subject, "Start the service, which removes them, or: xapi-nbd cleanup",
			"%s left behind: %s", text.Count(len(vbds), "VBD")+isOrAre(len(vbds)), strings.Join(vbds, " "))
	case malformed == 0 && !pending:
		c.ok(subject, "nothing is left behind")
	}
}

func isOrAre(n int) string {
	if n == 1 {
		return " is"
	}
	return " are"
}

func (c *checker) deviceFolder() {
	const subject = "device folder"
	const remedy = "Set device_dir to the folder that VBD.device is relative to, /dev on a real host."
	_, err := os.ReadDir(c.cfg.DeviceDir)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		c.problem(subject, remedy, "%s is not a folder", c.cfg.DeviceDir)
	case err != nil:
		c.problem(subject, remedy, "%v", err)
	default:
		c.ok(subject, "%s", c.cfg.DeviceDir)
	}
}
