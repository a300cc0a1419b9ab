package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
)

// readOnlyDevice is a device that cannot be written.
type readOnlyDevice struct{ nbd.Device }

// TestMirrorRefusals: what cannot be mirrored is refused before a byte is written.
func TestMirrorRefusals(t *testing.T) {
	const size = 1 << 20
	before := content(size)
	file := func(n int) string { return writeFile(t, "disk", content(n)) }
	one, other, locked, link := file(size), file(size), file(size), filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(one, link); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Open(locked)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	ram := ramExport(t, nbdtest.NewRAM(before))
	readOnly := serveOne(t, func() nbd.Device { return readOnlyDevice{nbdtest.NewRAM(before)} })
	state := filepath.Join(t.TempDir(), "state")
	fresh := filepath.Join(t.TempDir(), "fresh")
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"same file", []string{one, one}, exitUsage, "is both PRIMARY and SECONDARY"},
		{"same file by a link", []string{one, link}, exitUsage, "is both PRIMARY and SECONDARY"},
		{"same export", []string{ram, ram}, exitUsage, "the same export is both"},
		{"smaller", []string{one, file(size - 512)}, exitFailed, "size"},
		{"larger export", []string{file(size - 512), ram}, exitFailed, "size"},
		{"read-only secondary", []string{one, readOnly}, exitFailed, "read-only"},
		{"read-only primary", []string{readOnly, one}, exitFailed, "read-only"},
		{"locked secondary", []string{one, locked}, exitFailed, "secondary: " + locked + " is in use by another process"},
		{"locked primary", []string{locked, one}, exitFailed, "primary: " + locked + " is in use by another process"},
		{"no primary", []string{"/no/such/file", one}, exitFailed, "/no/such/file"},
		{"no folder", []string{one, "/no/such/file"}, exitFailed, "secondary: "},
		{"folder", []string{one, t.TempDir()}, exitFailed, "neither a block device nor a regular file"},
		{"stream", []string{one, "-"}, exitUsage, "cannot be a stream"},
		{"address", []string{"--listen=192.0.2.1:1", "--state=" + state, one, fresh}, exitFailed, "192.0.2.1"},
		{"control socket", []string{"--listen=127.0.0.1:0", "--control=unix:/no/such/socket", one, fresh}, exitFailed, "--control: "},
		{"certificate", []string{"--certfile=" + other, one, fresh}, exitFailed, other},
		{"state is an end", []string{"--state=" + other, one, other}, exitUsage, "--state needs a file of its own"},
		{"one end", []string{one}, exitUsage, "want PRIMARY and SECONDARY"},
		{"three ends", []string{"--primary-uri-file=x", one, other}, exitUsage, "want PRIMARY and SECONDARY"},
		{"TCP control", []string{"--control=localhost:1", one, other}, exitUsage, "--control is unix:/path"},
		{"on-error", []string{"--on-error=panic", one, other}, exitUsage, "--on-error is detach or stop"},
		{"stall", []string{"--stall=0s", one, other}, exitUsage, "--stall must be above 0"},
		{"retry", []string{"--retry-for=-1s", one, other}, exitUsage, "--retry-for must be 0 or more"},
		{"connections", []string{"--connections=0", one, other}, exitUsage, "--connections is 1 to"},
		{"TLS without TLS", []string{"--tls-insecure", one, ram}, exitUsage, "need TLS"},
		{"two streams", []string{"--primary-uri-file=-", "--secondary-uri-file=-"}, exitUsage, "standard input"},
		{"TLS and none", []string{"--no-tls", "--certfile=x", one, other}, exitUsage, "exclude each other"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fail(t, tt.code, []string{tt.want}, append([]string{"mirror"}, tt.args...)...)
			for _, path := range []string{one, other, locked} {
				sameBytes(t, path, readFile(t, path), before)
			}
			for _, path := range []string{fresh, state} {
				if _, err := os.Stat(path); err == nil {
					t.Errorf("%s was made and is left", path)
				}
			}
		})
	}
}

// TestMirrorLocks: the files of a running mirror cannot be used by another one, and afterwards
// they can.
func TestMirrorLocks(t *testing.T) {
	disk := content(1 << 20)
	primary, secondary := writeFile(t, "primary", disk), writeFile(t, "secondary", disk)
	m := startMirror(t, disk, primary, secondary)
	fail(t, exitFailed, []string{"in use by another process"}, "mirror", primary, filepath.Join(t.TempDir(), "x"))
	fail(t, exitFailed, []string{"in use by another process"}, "mirror", writeFile(t, "y", disk), secondary)
	m.conn.Close()
	m.endIncomplete()
	m = startMirror(t, disk, primary, secondary)
	m.command("complete", "--stop")
	m.endComplete()
}

// TestMirrorServed: a file that clients of nbd-tool serve can write to is not mirrored, and they
// cannot open that of a mirror.
func TestMirrorServed(t *testing.T) {
	disk := content(1 << 20)
	file, other := writeFile(t, "file", disk), writeFile(t, "other", disk)
	addr := startServing(t, "serve", "--writable", "--listen=127.0.0.1:0", file).addr
	open := func() (*client.Conn, error) {
		c, err := client.Dial(t.Context(), "tcp", addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Go(t.Context(), "")
	}
	for _, ends := range [][]string{{file, other}, {other, file}} {
		m := startMirror(t, disk, ends...)
		if _, err := open(); err == nil {
			t.Error("a client has opened a file of a mirror")
		}
		m.conn.Close()
		m.endIncomplete()
	}
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, ends := range [][]string{{file, other}, {other, file}} {
		fail(t, exitFailed, []string{"in use by another process"}, append([]string{"mirror"}, ends...)...)
	}
}

// TestMirrorFileChanged: a mirror whose file is not at its path any more, or has another size, is not
// complete.
func TestMirrorFileChanged(t *testing.T) {
	disk := content(1 << 20)
	for name, change := range map[string]func(path string) error{
		"removed":  os.Remove,
		"replaced": func(path string) error { return os.Rename(writeFile(t, "other", disk), path) },
		"shorter":  func(path string) error { return os.Truncate(path, 1<<19) },
	} {
		for i, end := range []string{"primary", "secondary"} {
			t.Run(name+" "+end, func(t *testing.T) {
				paths := []string{writeFile(t, "p", disk), writeFile(t, "s", disk)}
				m := startMirror(t, disk, paths...)
				m.command("wait")
				if err := change(paths[i]); err != nil {
					t.Fatal(err)
				}
				for _, how := range []string{"--pivot", "--stop"} {
					fail(t, exitFailed, []string{paths[i]}, "ctl", m.ctl, "complete", how)
				}
				m.conn.Close()
				m.endIncomplete()
			})
		}
	}
}

// TestMirrorBlockDevice: a device that is opened exclusively, as by a mount, is refused, and that
// of a mirror cannot be opened exclusively.
func TestMirrorBlockDevice(t *testing.T) {
	requires.LoopDevices(t)
	disk := content(mirrorSize)
	image := writeFile(t, "image", make([]byte, len(disk)))
	device := requires.Loop(t, image)
	primary := writeFile(t, "primary", disk)
	fail(t, exitUsage, []string{"is both PRIMARY and SECONDARY"}, "mirror", image, device)
	holder, err := os.OpenFile(device, os.O_RDWR|os.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	fail(t, exitFailed, []string{device + " is in use by another process, or is mounted"}, "mirror", primary, device)
	holder.Close()
	m := startMirror(t, disk, primary, device)
	if f, err := os.OpenFile(device, os.O_RDONLY|os.O_EXCL, 0); err == nil {
		f.Close()
		t.Error("the device of a mirror could be opened exclusively")
	}
	m.writeSome(4)
	m.command("complete", "--stop", "--verify")
	m.endComplete()
	sameBytes(t, "secondary", readFile(t, device), m.disk)
}

// TestMirrorStaleSockets: the sockets of a mirror that was killed are replaced, those of one that
// runs are not.
func TestMirrorStaleSockets(t *testing.T) {
	dir := shortDir(t)
	disk := content(1 << 20)
	for _, name := range []string{"nbd", "ctl"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	args := []string{"mirror", "--listen=unix:" + dir + "/nbd", "--control=unix:" + dir + "/ctl", writeFile(t, "primary", disk)}
	s := startServing(t, append(args, filepath.Join(dir, "secondary"))...)
	st, err := os.Stat(dir + "/ctl")
	if err != nil || st.Mode().Perm() != 0o600 || st.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
		t.Errorf("control socket: got %v, %v, want mode 0600", st, err)
	}
	args[3] = writeFile(t, "primary", disk)
	fail(t, exitFailed, []string{"another process listens there"}, append(args, filepath.Join(dir, "other"))...)
	succeed(t, "ctl", dir+"/ctl", "complete", "--stop")
	if code, errOut := s.stop(); code != exitOK {
		t.Errorf("exit code %d: %s", code, errOut)
	}
}

// TestMirrorOfPlainServers: servers that offer no more than tapdisk's get no request that they
// cannot serve, and what they cannot promise is said.
func TestMirrorOfPlainServers(t *testing.T) {
	disk := content(1 << 20)
	primary, secondary := startPlainServer(t, disk), startPlainServer(t, make([]byte, len(disk)))
	m := startMirror(t, disk, primary.uri, secondary.uri)
	if s := m.conn.BlockSizes(); s.Min != 512 {
		t.Errorf("clients are offered blocks of %d bytes, want 512", s.Min)
	}
	m.write(512, 1024, 1)
	if err := m.conn.Flush(t.Context()); err == nil {
		t.Error("a flush has succeeded, of a disk that has none")
	}
	m.command("complete", "--stop", "--verify")
	_, _, errOut := m.end()
	for _, want := range []string{"only reading and writing", "so clients cannot", "may lose writes with its power"} {
		if !bytes.Contains([]byte(errOut), []byte(want)) {
			t.Errorf("no warning with %q in %q", want, errOut)
		}
	}
	sameBytes(t, "secondary", secondary.content(), m.disk)
	if primary.misused.Load() || secondary.misused.Load() {
		t.Error("a request was no multiple of a sector, or more than 8 were in flight")
	}
}
