package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"xapi-nbd/xapi/xapitest"
)

// The paths of the files about NBD devices on a host.
const (
	sysBlock    = "/sys/block"
	nbdRecords  = "/var/run/nonpersistent/nbd"
	bindTimeout = "60" // seconds, as xapi's helper has it
)

// KernelNBD attaches disks as current hosts do: the image is a VHD, an NBD server
// on a unix socket serves it, which is tapdisk there and qemu-nbd here, and xapi's
// helper has nbd-client bind an NBD device of the kernel to that, and keeps a
// record of it.
type KernelNBD struct {
	Dir string // for the sockets
	// Ioctl binds with the ioctls of old, as nbd-client did before there was
	// netlink for it; a process stays in the kernel then.
	Ioctl bool
}

// Make implements [xapitest.DeviceMaker]. The VHD is made of the raw image.
func (k *KernelNBD) Make(ctx context.Context, spec xapitest.DeviceSpec) (string, func(context.Context) error, error) {
	vhd := spec.Image + ".vhd"
	if err := makeVHD(ctx, spec.Image, vhd); err != nil {
		return "", nil, err
	}
	d := &nbdDisk{node: "/dev/" + spec.Name, socket: filepath.Join(k.Dir, spec.VDI), export: spec.VDI, ioctl: k.Ioctl}
	err := d.serve(ctx, vhd)
	if err == nil {
		err = d.bind(ctx, spec.SectorSize)
	}
	if err == nil {
		err = waitSize(ctx, d.node, spec.Image)
	}
	if err != nil {
		return "", nil, errors.Join(err, d.remove(context.WithoutCancel(ctx)))
	}
	return d.node, d.remove, nil
}

// makeVHD makes a dynamic VHD of a raw image, unless there is one. Without force_size the
// size would be rounded up to whole cylinders.
func makeVHD(ctx context.Context, raw, vhd string) error {
	if exists(vhd) {
		return nil
	}
	st, err := os.Stat(raw)
	if err != nil {
		return err
	}
	if _, err := run(ctx, "qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", vhd, strconv.FormatInt(st.Size(), 10)); err != nil {
		return err
	}
	_, err = run(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "vpc", raw, vhd)
	return err
}

// nbdDisk is a bound NBD device of the kernel and its server.
type nbdDisk struct {
	node           string
	socket, export string
	ioctl          bool
	server         *exec.Cmd // nil once it has ended
}

func (d *nbdDisk) pidFile() string { return filepath.Join(sysBlock, filepath.Base(d.node), "pid") }

func (d *nbdDisk) record() string {
	return filepath.Join(nbdRecords, strings.TrimPrefix(filepath.Base(d.node), "nbd"))
}

// serve starts the server of the image and waits until it listens.
func (d *nbdDisk) serve(ctx context.Context, vhd string) error {
	d.server = exec.Command("qemu-nbd", "--read-only", "--persistent", "--shared=0", "--format=vpc",
		"--export-name="+d.export, "--socket="+d.socket, vhd)
	var said bytes.Buffer
	d.server.Stderr = &said
	if err := d.server.Start(); err != nil {
		d.server = nil
		return err
	}
	err := waitFor(ctx, d.socket+" to be served", func() (bool, error) {
		conn, err := net.Dial("unix", d.socket)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
	if err != nil {
		d.stopServer()
		return fmt.Errorf("%w: qemu-nbd said %q", err, said.String())
	}
	return nil
}

// stopServer may be repeated.
func (d *nbdDisk) stopServer() {
	if d.server != nil {
		_ = d.server.Process.Kill()
		_ = d.server.Wait() // killed, it says
		d.server = nil
	}
}

// bind binds the device to the server, and writes the record.
func (d *nbdDisk) bind(ctx context.Context, sectorSize int) error {
	args := []string{"-unix", d.socket, d.node, "-timeout", bindTimeout, "-name", d.export, "-block-size", strconv.Itoa(sectorSize)}
	if d.ioctl {
		args = append(args, "-nonetlink")
	}
	if _, err := run(ctx, "nbd-client", args...); err != nil {
		return err
	}
	if err := waitFor(ctx, d.pidFile()+" to appear", func() (bool, error) { return exists(d.pidFile()), nil }); err != nil {
		return err
	}
	record, err := json.Marshal(map[string]string{"path": d.socket, "exportname": d.export})
	if err == nil {
		err = os.MkdirAll(nbdRecords, 0o755)
	}
	if err == nil {
		err = os.WriteFile(d.record(), record, 0o644)
	}
	return err
}

// remove lets the device go in the helper's order: the record, the connection,
// then the wait until the kernel has nothing of it any more, which an open
// descriptor delays.
func (d *nbdDisk) remove(ctx context.Context) error {
	if err := os.Remove(d.record()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if exists(d.pidFile()) {
		if _, err := run(ctx, "nbd-client", "-d", d.node); err != nil {
			return err
		}
		if err := waitGone(ctx, d.pidFile()); err != nil {
			return fmt.Errorf("%s is still connected: %w", d.node, err)
		}
	}
	d.stopServer()
	if err := os.Remove(d.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
