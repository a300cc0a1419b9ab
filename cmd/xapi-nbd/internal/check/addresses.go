package check

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
)

// addresses checks that each address, also that of metrics, is free or belongs to the
// running service.
func (c *checker) addresses(ctx context.Context) {
	addrs := c.cfg.ListenAddrs()
	if c.cfg.Metrics != config.MetricsOff {
		addrs = append(slices.Clone(addrs), c.cfg.Metrics)
	}
	for _, addr := range addrs {
		network, address, err := listenaddr.Split(addr)
		switch {
		case err != nil: // reported with the configuration
		case network == "unix":
			c.unixAddress(ctx, address)
		default:
			c.tcpAddress(ctx, address)
		}
	}
}

func (c *checker) unixAddress(ctx context.Context, path string) {
	const subject = "address"
	const remedy = "Choose another path with listen, or stop the program that listens there."
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := unix.Access(filepath.Dir(path), unix.W_OK|unix.X_OK); err != nil {
			c.problem(subject, "Make the folder, or choose another path with listen.", "unix:%s cannot be made: %v", path, err)
			return
		}
		c.ok(subject, "unix:%s is free", path)
		return
	case err != nil:
		c.problem(subject, remedy, "%v", err)
		return
	case st.Mode().Type() != os.ModeSocket:
		c.problem(subject, "Move it away, or choose another path with listen.", "%s exists and is no socket", path)
		return
	}
	switch pid, err := proc.SocketOwner(ctx, path); {
	case err != nil:
		c.ok(subject, "unix:%s is free; the socket there belongs to a process that has ended", path)
	case pid == c.service || isSystemd(pid):
		c.ok(subject, "unix:%s is listened on by %s", path, c.holder(pid))
	default:
		c.problem(subject, remedy, "unix:%s is listened on by %s", path, c.holder(pid))
	}
}

func (c *checker) tcpAddress(ctx context.Context, address string) {
	const subject = "address"
	_, text, _ := net.SplitHostPort(address) // the configuration has been checked
	port, _ := strconv.Atoi(text)
	if port == 0 {
		c.warning(subject, "Set a port: VDI.get_nbd_info gives clients port 10809.", "%s: the system chooses a free port at each start", address)
		return
	}
	err := listenaddr.Probe(ctx, address)
	switch {
	case err == nil:
		c.ok(subject, "%s is free", address)
	case errors.Is(err, unix.EADDRINUSE):
		c.addressInUse(address, port)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		c.problem(subject, "Correct listen, or give the address to an interface: the service waits for it.", "%s is no address of this host", address)
	default:
		c.problem(subject, "Choose another address with listen or port.", "%s: %v", address, err)
	}
}

func (c *checker) addressInUse(address string, port int) {
	const subject = "address"
	pids := proc.PortHolders(port)
	if c.service != 0 && slices.Contains(pids, c.service) {
		c.ok(subject, "%s is listened on by %s", address, c.holder(c.service))
		return
	}
	if len(pids) > 0 && isSystemd(pids[0]) {
		c.ok(subject, "%s is listened on by %s", address, c.holder(pids[0]))
		return
	}
	holders := "another process"
	if len(pids) > 0 {
		names := make([]string, len(pids))
		for i, pid := range pids {
			names[i] = c.holder(pid)
		}
		holders = strings.Join(names, ", ")
	}
	c.problem(subject, "Stop it (systemctl stop UNIT), or choose another address with listen or port.",
		"%s is in use by %s", address, holders)
}

// holder describes a process that listens, for a text.
func (c *checker) holder(pid int) string {
	switch {
	case pid == c.service:
		return "the running service"
	case isSystemd(pid):
		return "systemd, for the service"
	}
	return fmt.Sprintf("process %d (%s)", pid, proc.Name(pid))
}

// isSystemd reports whether a process is systemd, which may listen for the service.
func isSystemd(pid int) bool { return pid == 1 && proc.Name(pid) == "systemd" }
