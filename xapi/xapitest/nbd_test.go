package xapitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// binding has the files of a bound nbd device.
type binding struct{ pid, path, exportName string }

// readBinding returns the zero binding if nothing is bound; half of one is an error.
func readBinding(t *testing.T, h *Host, n int) binding {
	t.Helper()
	pid, perr := os.ReadFile(filepath.Join(h.SysDir(), "block", fmt.Sprintf("nbd%d", n), "pid"))
	info, ierr := os.ReadFile(filepath.Join(h.NBDDir(), fmt.Sprint(n)))
	if os.IsNotExist(perr) && os.IsNotExist(ierr) {
		return binding{}
	}
	var members map[string]string
	if perr != nil || ierr != nil || json.Unmarshal(info, &members) != nil || len(members) != 2 {
		t.Fatalf("nbd%d: got pid %q, %v, info %q, %v", n, pid, perr, info, ierr)
	}
	if number, ok := strings.CutSuffix(string(pid), "\n"); !ok || strings.Trim(number, "0123456789") != "" {
		t.Errorf("nbd%d: got pid %q, want a number and a newline", n, pid)
	}
	return binding{string(pid), members["path"], members["exportname"]}
}

func plugOf(t *testing.T, h *Host, uuid string) (vbd VBD) {
	t.Helper()
	s := h.NewSession(RoleRoot)
	ref := createVBD(t, h, s, uuid)
	must(t, h, "VBD.plug", s, ref)
	for _, vbd = range h.VBDs() {
		if vbd.Ref == ref {
			return vbd
		}
	}
	t.Fatal("no such VBD")
	return vbd
}

func openDevice(t *testing.T, h *Host, vbd VBD) *os.File {
	t.Helper()
	f, err := os.Open(filepath.Join(h.DeviceDir(), vbd.Device))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestNBDFiles(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	uuid := addVDI(t, h, VDISpec{})
	other := addVDI(t, h, VDISpec{})
	seen := map[string]bool{}
	for range 2 {
		for n, uuid := range []string{uuid, other} {
			if got := readBinding(t, h, n); got != (binding{}) {
				t.Errorf("nbd%d before plug: got %+v", n, got)
			}
			vbd := plugOf(t, h, uuid)
			got := readBinding(t, h, n)
			if vbd.Device != nbdName(n) || got.exportName != uuid || filepath.Base(got.path) != uuid || seen[got.pid] {
				t.Errorf("%s: got %+v after pids %v, want a new one and the VDI %s", vbd.Device, got, seen, uuid)
			}
			seen[got.pid] = true
		}
		for _, vbd := range h.VBDs() {
			if vbd.CurrentlyAttached {
				if err := h.UnplugVBD(t.Context(), vbd.UUID); err != nil {
					t.Error(err)
				}
			}
		}
	}
	plugOf(t, h, uuid)
	dir := h.cfg.Dir
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if got := readBinding(t, h, 0); got != (binding{}) {
		t.Errorf("after Close: got %+v", got)
	}

	// The next start removes the files of a killed host.
	if err := os.WriteFile(filepath.Join(h.NBDDir(), "7"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h = start(t, Config{Style: StyleNBD, Dir: dir})
	if got := readBinding(t, h, 7); got != (binding{}) {
		t.Errorf("after the next start: got %+v", got)
	}
}

// unplugging starts an unplug and returns once the device is disconnected.
func unplugging(t *testing.T, h *Host, vbd VBD) (done chan error) {
	t.Helper()
	done = make(chan error, 1)
	go func() { done <- h.UnplugVBD(t.Context(), vbd.UUID) }()
	waitDisconnected(t, h, vbd)
	return done
}

// waitDisconnected waits for the symlink to go, which does so last.
func waitDisconnected(t *testing.T, h *Host, vbd VBD) {
	t.Helper()
	waitFor(t, h, func([]VBD) bool {
		_, err := os.Lstat(filepath.Join(h.DeviceDir(), vbd.Device))
		return os.IsNotExist(err)
	})
}

func TestNBDUnplugWhileOpen(t *testing.T) {
	for _, loop := range []bool{false, true} {
		t.Run(fmt.Sprintf("loop %t", loop), func(t *testing.T) {
			if loop {
				requireLoop(t)
			}
			h := start(t, Config{Style: StyleNBD, Loop: loop})
			vbd := plugOf(t, h, addVDI(t, h, VDISpec{}))
			f := openDevice(t, h, vbd)
			done := unplugging(t, h, vbd)
			if got := readBinding(t, h, 0); got != (binding{}) {
				t.Errorf("the binding while the unplug waits: got %+v", got)
			}
			if got := plugOf(t, h, addVDI(t, h, VDISpec{})).Device; got != "nbd1" {
				t.Errorf("another VBD meanwhile: got %s, want nbd1", got)
			}
			if !h.VBDs()[0].CurrentlyAttached || len(done) != 0 {
				t.Error("the unplug did not wait")
			}
			_ = f.Close()
			if err := <-done; err != nil || h.VBDs()[0].CurrentlyAttached {
				t.Errorf("once it is closed: got %v, attached %t", err, h.VBDs()[0].CurrentlyAttached)
			}
			if got := plugOf(t, h, addVDI(t, h, VDISpec{})).Device; got != "nbd0" {
				t.Errorf("another VBD afterwards: got %s, want nbd0", got)
			}
		})
	}
}

func TestNBDUnplugLimit(t *testing.T) {
	const limit = inUseTimeout + 50*time.Millisecond // longer than in other styles
	h := start(t, Config{Style: StyleNBD, NBDUnplugWait: limit})
	s := h.NewSession(RoleRoot)
	vbd := plugOf(t, h, addVDI(t, h, VDISpec{}))
	f := openDevice(t, h, vbd)
	for range 2 { // the second time there is nothing left to disconnect
		begin := time.Now()
		mustFail(t, h, []string{"INTERNAL_ERROR", fmt.Sprintf("Subprocess exited with unexpected code 1; stdout = [  ]; "+
			"stderr = [ nbd0 is still connected (opened by pid %d) ]", os.Getpid())}, "VBD.unplug", s, vbd.Ref)
		if took := time.Since(begin); took < limit {
			t.Errorf("took %v, want at least %v", took, limit)
		}
	}
	if !h.VBDs()[0].CurrentlyAttached {
		t.Error("the VBD is detached after a failed unplug")
	}
	if got := plugOf(t, h, addVDI(t, h, VDISpec{})).Device; got != "nbd1" {
		t.Errorf("another VBD: got %s, want nbd1", got)
	}
	_ = f.Close()
	must(t, h, "VBD.unplug", s, vbd.Ref)
}

func TestNBDUnplugEndsWithHost(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	vbd := plugOf(t, h, addVDI(t, h, VDISpec{}))
	openDevice(t, h, vbd)
	done := unplugging(t, h, vbd)
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil {
		t.Error("the unplug of an open device: got success")
	}
}

func TestNBDDevicesRunOut(t *testing.T) {
	h := start(t, Config{Style: StyleNBD})
	uuid := addVDI(t, h, VDISpec{})
	for range nbdDevices {
		plugOf(t, h, uuid)
	}
	s := h.NewSession(RoleRoot)
	mustFail(t, h, []string{"INTERNAL_ERROR", "Subprocess exited with unexpected code 1; stdout = [  ]; stderr = [ no free nbd device ]"},
		"VBD.plug", s, createVBD(t, h, s, uuid))
}

// imageOf makes an image of 1 MiB of c.
func imageOf(t *testing.T, c byte) (path string, content []byte) {
	t.Helper()
	content = bytes.Repeat([]byte{c}, 1<<20)
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func wantContent(t *testing.T, f *os.File, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got data that begins with %q, want %q", got[:1], want[:1])
	}
}

func TestRebind(t *testing.T) {
	requireLoop(t)
	ours, ourData := imageOf(t, 'a')
	theirs, theirData := imageOf(t, 'b')
	h := start(t, Config{Style: StyleNBD, Loop: true})
	their := addVDI(t, h, VDISpec{Image: theirs})
	vbd := plugOf(t, h, addVDI(t, h, VDISpec{Image: ours}))
	f := openDevice(t, h, vbd)
	wantContent(t, f, ourData) // and has it cached
	before := readBinding(t, h, 0)

	if err := h.Rebind(vbd.UUID, theirs); err != nil {
		t.Fatal(err)
	}
	after := readBinding(t, h, 0)
	if after.pid == before.pid || after.exportName != their || filepath.Base(after.path) != their {
		t.Errorf("got %+v after %+v, want another pid and the VDI %s", after, before, their)
	}
	wantContent(t, f, theirData)
	fresh := openDevice(t, h, vbd)
	wantContent(t, fresh, theirData)

	s := h.NewSession(RoleRoot)
	if got := must(t, h, "VBD.get_currently_attached", s, vbd.Ref); got != false {
		t.Errorf("currently_attached: got %v, want false", got)
	}
	mustFail(t, h, []string{"DEVICE_ALREADY_DETACHED", vbd.Ref}, "VBD.unplug", s, vbd.Ref)
	if got := readBinding(t, h, 0); got != after {
		t.Errorf("after our unplug: got %+v, want it left alone, %+v", got, after)
	}
	must(t, h, "VBD.destroy", s, vbd.Ref)
	if err := h.Rebind(vbd.UUID, theirs); err == nil {
		t.Error("rebinding a destroyed VBD: got no error")
	}
	_, _ = f.Close(), fresh.Close()
	if got := loopsWith(t, theirs); got != 1 || h.devices["nbd0"].loop.gone() {
		t.Errorf("before Close: got %d loop devices, want 1 that is not gone", got)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if got := loopsWith(t, ours, theirs); got != 0 {
		t.Errorf("after Close: got %d loop devices, want none", got)
	}
}

// loopsWith counts the loop devices of the machine that lead to these images.
func loopsWith(t *testing.T, images ...string) (n int) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, _ := os.ReadFile(file) // it may be gone
		for _, image := range images {
			if strings.HasPrefix(string(b), image) {
				n++
			}
		}
	}
	return n
}

// TestRebindTakenDown: a device that Rebind gave to another VDI is reused.
func TestRebindTakenDown(t *testing.T) {
	requireLoop(t)
	ours, _ := imageOf(t, 'a')
	theirs, theirData := imageOf(t, 'b')
	h := start(t, Config{Style: StyleNBD, Loop: true})
	uuid := addVDI(t, h, VDISpec{Image: ours})
	var open *os.File
	for n := range nbdDevices {
		vbd := plugOf(t, h, uuid)
		if vbd.Device != nbdName(n) {
			t.Fatalf("got %s, want nbd%d", vbd.Device, n)
		}
		if n == 0 {
			open = openDevice(t, h, vbd)
		}
		if err := h.Rebind(vbd.UUID, theirs); err != nil {
			t.Fatal(err)
		}
	}
	if got := plugOf(t, h, uuid).Device; got != "nbd1" {
		t.Errorf("with nbd0 open: got %s, want nbd1", got)
	}
	if got := readBinding(t, h, 0); got == (binding{}) {
		t.Error("nbd0 was taken down while it is open")
	}
	wantContent(t, open, theirData)
	_ = open.Close()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if got := loopsWith(t, ours, theirs); got != 0 {
		t.Errorf("after Close: got %d loop devices, want none", got)
	}
}

func TestRebindRefusals(t *testing.T) {
	requireLoop(t)
	image, _ := imageOf(t, 'b')
	h := start(t, Config{Style: StyleNBD, Loop: true})
	s := h.NewSession(RoleRoot)
	uuid := addVDI(t, h, VDISpec{})
	small := plugOf(t, h, addVDI(t, h, VDISpec{Size: 4096}))
	detached, err := h.AddForeignVBD(uuid, nil)
	if err != nil {
		t.Fatal(err)
	}
	st := vbdStruct(t, h, s, uuid)
	st["mode"] = "RW"
	writable := mustString(t, h, "VBD.create", s, st)
	must(t, h, "VBD.plug", s, writable)
	files := start(t, Config{Style: StyleNBD})
	other := start(t, Config{Loop: true})

	tests := []struct {
		name string
		h    *Host
		vbd  string
		want string
	}{
		{"unknown", h, "no such VBD", "no such VBD"},
		{"detached", h, detached, "not attached"},
		{"size", h, small.UUID, "the image has 1048576 bytes"},
		{"writable", h, mustString(t, h, "VBD.get_uuid", s, writable), "not read-only"},
		{"file", files, plugOf(t, files, addVDI(t, files, VDISpec{})).UUID, "neither"},
		{"style", other, plugOf(t, other, addVDI(t, other, VDISpec{})).UUID, "neither"},
	}
	before := [2]binding{readBinding(t, h, 0), readBinding(t, h, 1)}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.h.Rebind(tt.vbd, image); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if after := [2]binding{readBinding(t, h, 0), readBinding(t, h, 1)}; after != before {
		t.Errorf("got %+v, want nothing changed, %+v", after, before)
	}
}
