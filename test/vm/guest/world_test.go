package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/xapi/xapitest"
)

// world is a simulated host with real devices, for the service.
type world struct {
	t    *testing.T
	dir  string
	host *xapitest.Host
	refs []string // sessions, which no log may contain
}

// newWorld starts a host; maker makes its devices.
func newWorld(t *testing.T, style xapitest.DeviceStyle, maker xapitest.DeviceMaker) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "w") // t.TempDir is too long for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir}
	if w.host, err = xapitest.Start(xapitest.Config{Dir: filepath.Join(dir, "host"), Style: style, Maker: maker}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.host.Close(); err != nil {
			t.Error(err)
		}
	})
	w.host.AddNetwork("insecure_nbd")
	return w
}

// session makes a client's session.
func (w *world) session() (ref string) {
	ref = w.host.NewSession(xapitest.RoleVMAdmin)
	w.refs = append(w.refs, ref)
	return ref
}

// addVDI adds a disk with that content.
func (w *world) addVDI(data []byte, sectorSize int) (uuid string) {
	w.t.Helper()
	f, err := os.CreateTemp(w.dir, "image")
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		w.t.Fatal(err)
	}
	uuid, err = w.host.AddVDI(xapitest.VDISpec{Image: f.Name(), SectorSize: sectorSize})
	if err != nil {
		w.t.Fatal(err)
	}
	return uuid
}

// service is a running xapi-nbd.
type service struct {
	*process
	addr string
}

var listening = regexp.MustCompile(`listening on ([^\s",]+)`)

// start runs the service on the real /dev, with more flags, and returns when it has met the host.
func (w *world) start(more ...string) *service {
	w.t.Helper()
	var p *process
	w.t.Cleanup(func() { // after the one of launch
		for _, ref := range w.refs {
			if p != nil && strings.Contains(p.output(), strings.TrimPrefix(ref, "OpaqueRef:")) {
				w.t.Error("the log contains a session ref")
			}
		}
	})
	p = launch(w.t, "xapi-nbd", append([]string{
		"serve", "--listen=127.0.0.1:0", "--xapi-socket=" + w.host.Socket(),
		"--inventory=" + w.host.Inventory(), "--state-dir=" + filepath.Join(w.dir, "state"), "--log-level=debug", "--log-format=text",
	}, more...)...)
	addr := listening.FindStringSubmatch(p.waitLine("listening on "))[1]
	p.waitLine("ready to serve")
	return &service{p, addr}
}

// open opens a VDI with our client, and with metadata contexts.
func (w *world) open(t *testing.T, s *service, vdi string, contexts ...string) *client.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client, err := client.Dial(ctx, "tcp", s.addr, &client.Config{MetaContexts: contexts})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := client.Go(ctx, w.host.ExportName(vdi, w.session()))
	if err != nil {
		t.Fatal(errors.Join(err, client.Abort()))
	}
	return conn
}

// pullByAll copies a VDI with one client after the other, and wants its data and
// afterwards nothing left of its device, as gone sees it.
func (w *world) pullByAll(t *testing.T, s *service, vdi string, data []byte, gone func(*testing.T)) {
	for _, client := range []string{"nbd-tool", "nbdcopy", "qemu-img"} {
		t.Run(client, func(t *testing.T) {
			wantSame(t, "pulled", w.pull(t, s, vdi, client), data)
			w.waitClean(t, s)
			gone(t)
		})
	}
}

// pull copies a VDI with one of the clients and returns the data.
func (w *world) pull(t *testing.T, s *service, vdi, client string) []byte {
	t.Helper()
	session := w.session()
	uri := "nbd://" + s.addr + "/" + strings.Replace(w.host.ExportName(vdi, session), "?", "%3F", 1)
	out := filepath.Join(w.dir, "pulled")
	defer os.Remove(out)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var cmd *exec.Cmd
	switch client {
	case "nbd-tool":
		cmd = exec.CommandContext(ctx, program(t, client), "copy", "--uri-file", "-", out)
		cmd.Stdin = strings.NewReader(uri + "\n")
	case "nbdcopy":
		cmd = exec.CommandContext(ctx, client, uri, out)
	case "qemu-img":
		cmd = exec.CommandContext(ctx, client, "convert", "-f", "raw", "-O", "raw", uri, out)
	default:
		t.Fatalf("unknown client %s", client)
	}
	mustSucceed(t, cmd, session)
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// waitClean waits until nothing is left of any VBD: in the host, in the journal,
// among the descriptors of the service.
func (w *world) waitClean(t *testing.T, s *service) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		t.Fatalf("VBDs left: %+v", w.host.VBDs())
	}
	// The entry goes right after the VBD, of which the host hears nothing.
	if err := waitFor(ctx, "an empty journal", func() (bool, error) {
		data, err := os.ReadFile(filepath.Join(w.dir, "state", "VBDs_to_clean_up"))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return len(data) == 0, err
	}); err != nil {
		t.Error(err)
	}
	if open := s.openDevices(); len(open) != 0 {
		t.Errorf("devices still open: %q", open)
	}
}

// openDevices are the block devices that the service has open.
func (s *service) openDevices() (open []string) {
	dir := fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil // it has ended
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		st, err := os.Stat(path)
		if err == nil && st.Mode().Type() == fs.ModeDevice {
			name, _ := os.Readlink(path)
			open = append(open, name)
		}
	}
	return open
}
