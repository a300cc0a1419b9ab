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

// user reports whether this process is root. To another user much looks wrong that
// is right for the service, and advice about it would do harm.
func (c *checker) user() bool {
	if c.facts.UID == 0 {
		return true
	}
	c.problem("user", "Run it as root, as the service runs.", "uid %d cannot see what the service sees; nothing was looked at", c.facts.UID)
	return false
}

// running looks for a service on the state folder: by its control socket, and
// by the lock, which is only looked at, never taken: a service that starts at
// this moment must get it.
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

// Below these the journal cannot be written any more, or not for long.
const (
	leastSpace  = 1 << 20
	enoughSpace = 16 << 20
)

func (c *checker) stateFolder() {
	const what = "state folder"
	dir := c.cfg.StateDir
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent := existingParent(dir)
		if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
			c.problem(what, "Make it by hand: install -d -m 0755 "+dir, "%s is missing and cannot be made in %s: %v", dir, parent, err)
			return
		}
		c.ok(what, "%s is made at the first start", dir)
		return
	case err != nil:
		c.problem(what, "Give the service's user access to it, or choose another with state_dir.", "%v", err)
		return
	case !st.IsDir():
		c.problem(what, "Move it away, or choose another with state_dir.", "%s is not a folder", dir)
		return
	}
	before := len(c.report.Findings)
	c.rights(dir, st)
	c.space(dir)
	if len(c.report.Findings) == before {
		c.ok(what, "%s", dir)
	}
}

// rights looks at owner and mode of the state folder.
func (c *checker) rights(dir string, st fs.FileInfo) {
	const what = "state folder"
	if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != c.facts.Owner {
		c.problem(what, fmt.Sprintf("chown %d %s", c.facts.Owner, dir), "%s belongs to uid %d, not to uid %d", dir, owner, c.facts.Owner)
	}
	if st.Mode().Perm()&0o022 != 0 {
		c.problem(what, "chmod go-w "+dir, "others may write to %s (mode %04o), and what is in the journal gets destroyed", dir, st.Mode().Perm())
	}
	if err := unix.Access(dir, unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
		c.problem(what, "Look at its mode, and whether its file system is mounted read-only.", "%s cannot be written to: %v", dir, err)
	}
}

func (c *checker) space(dir string) {
	const what = "state folder"
	free, err := c.facts.FreeSpace(dir)
	remedy := "Make room on the file system of " + dir + "."
	switch {
	case err != nil:
		c.problem(what, remedy, "%s: %v", dir, err)
	case free < leastSpace:
		c.problem(what, remedy, "%d KiB are free in %s: no VBD can be recorded, so none is plugged", free>>10, dir)
	case free < enoughSpace:
		c.warning(what, remedy, "only %d MiB are free in %s", free>>20, dir)
	}
}

// existingParent is the closest folder above dir that there is.
func existingParent(dir string) string {
	for {
		dir = filepath.Dir(filepath.Clean(dir))
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
	}
}

// pendingCreates looks at the calls of VBD.create that may still be executed, and
// reports whether there may be some. Without any it says nothing.
func (c *checker) pendingCreates() bool {
	const what = "journal"
	creates, err := vdi.ReadPendingCreates(c.cfg.StateDir)
	switch {
	case errors.Is(err, unix.ENOTDIR): // has been reported
	case err != nil:
		c.problem(what, "Make it readable, or move it away: VBDs of such calls are found by their tag, too.", "%v", err)
	case len(creates) == 0:
		return false
	case c.service != 0:
		c.ok(what, "%s, which the running service looks for", text.Count(len(creates), "unanswered call"))
	default:
		var vdis []string
		for _, create := range creates {
			vdis = append(vdis, "VDI "+create.VDI+" since "+create.Since.UTC().Format(time.RFC3339))
		}
		c.warning(what, "Start the service, which looks for their VBDs, or: xapi-nbd cleanup",
			"%s may still be executed by xapi: %s", text.Count(len(creates), "unanswered call"), strings.Join(vdis, ", "))
	}
	return true
}

// leftovers are VBDs of the journal, and those that carry this host's tag.
func (c *checker) leftovers(ctx context.Context) {
	pending := c.pendingCreates()
	const what = "journal"
	vbds, malformed, err := vdi.ReadJournal(c.cfg.StateDir)
	if err != nil && !errors.Is(err, unix.ENOTDIR) { // a state folder that is no folder has been reported
		c.problem(what, "Make it readable, or move it away and look for VBDs of the control domain by hand.", "%v", err)
		return
	}
	if malformed > 0 {
		c.warning(what, "Nothing has to be done: they go with the next VBD that is plugged.",
			"%s of %s no uuid and passed over", text.Count(malformed, "line")+isOrAre(malformed), vdi.JournalPath(c.cfg.StateDir))
	}
	vbds = slices.Compact(slices.Sorted(slices.Values(append(vbds, c.tagged(ctx)...))))
	switch {
	case c.service != 0:
		c.ok(what, "%s, which the running service sees to", text.Count(len(vbds), "VBD"))
	case len(vbds) > 0:
		c.warning(what, "Start the service, which removes them, or: xapi-nbd cleanup",
			"%s left behind: %s", text.Count(len(vbds), "VBD")+isOrAre(len(vbds)), strings.Join(vbds, " "))
	case malformed == 0 && !pending:
		c.ok(what, "nothing is left behind")
	}
}

func isOrAre(n int) string {
	if n == 1 {
		return " is"
	}
	return " are"
}

func (c *checker) deviceFolder() {
	const what = "device folder"
	const remedy = "Set device_dir to the folder that VBD.device is relative to, /dev on a real host."
	_, err := os.ReadDir(c.cfg.DeviceDir)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		c.problem(what, remedy, "%s is not a folder", c.cfg.DeviceDir)
	case err != nil:
		c.problem(what, remedy, "%v", err)
	default:
		c.ok(what, "%s", c.cfg.DeviceDir)
	}
}
