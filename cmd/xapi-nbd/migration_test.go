package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// TestDocumentOfWarmMigration runs the commands of the document, while fio writes to the disk
// of the VM. At the end fio verifies the disk on the target.
func TestDocumentOfWarmMigration(t *testing.T) {
	fio := requires.Tool(t, "fio")
	m := newMigration(t, buildTool(t))
	disk := m.serveDisk()
	job := []string{"--name=guest", "--size=32m", "--bs=4k", "--rw=randwrite", "--randseed=7", "--verify=crc32c"}
	writer := exec.CommandContext(t.Context(), fio, append(job, "--ioengine=nbd", "--uri=nbd+unix:///?socket="+disk.socket, "--do_verify=0", "--rate_iops=200")...)
	var output bytes.Buffer
	writer.Dir, writer.Stdout, writer.Stderr = m.dir, &output, &output
	must(t, writer.Start())
	ended := make(chan error, 1)
	go func() { ended <- writer.Wait() }()
	m.source.host.OnCall(func(c xapitest.CallPoint) xapitest.Verdict {
		if c.Method == "VM.clean_shutdown" && !c.After { // the guest ends its programs
			_ = writer.Process.Signal(os.Interrupt)
			<-ended
		}
		return xapitest.Proceed
	})
	commands := documentedCommands(document(t, "examples/warm-migration.md"))
	if len(commands) != 5 {
		t.Fatalf("the document has %d commands", len(commands))
	}
	for _, c := range commands {
		disk.waitWritten(t)
		cmd := exec.CommandContext(t.Context(), "bash", "-c", c.line)
		cmd.Dir, cmd.Env = m.dir, m.env
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if out, err := cmd.Output(); err != nil || string(out) != c.output {
			t.Fatalf("%s: %v\n%sstandard error:\n%s\nfio: %s\nwant:\n%s", c.line, err, out, stderr.Bytes(), output.Bytes(), c.output)
		}
		m.source.waitClean(m.source.p)
		m.target.waitClean(m.target.p)
	}
	image := m.target.host.ImagePath(m.progress().Target)
	want, err := os.ReadFile(m.source.host.ImagePath(m.disk))
	must(t, err)
	wantFile(t, image, want)
	verify := exec.CommandContext(t.Context(), fio, append(job, "--ioengine=psync", "--filename="+image, "--verify_only", "--verify_state_load=1", "--output-format=json")...)
	verify.Dir = m.dir
	out, err := verify.CombinedOutput()
	var report struct {
		Jobs []struct {
			Read struct {
				Bytes int64 `json:"io_bytes"`
			}
		}
	}
	if err := errors.Join(err, json.Unmarshal(out, &report)); err != nil {
		t.Fatalf("fio does not find its data on the target: %v\n%s", err, out)
	}
	if got := report.Jobs[0].Read.Bytes; got != disk.written.Load() {
		t.Errorf("fio has verified %d bytes, and has written %d", got, disk.written.Load())
	}
}

// guestDisk is the disk of the VM as its guest sees it. It is an NBD export, for programs
// that are to write like a guest.
type guestDisk struct {
	*os.File // the content
	host     *xapitest.Host
	vm       string
	socket   string
	written  atomic.Int64 // bytes
}

// serveDisk serves the disk of the VM until the end of the test.
func (m *migration) serveDisk() *guestDisk {
	m.t.Helper()
	f, err := os.Open(m.source.host.ImagePath(m.disk))
	must(m.t, err)
	m.t.Cleanup(func() { f.Close() })
	d := &guestDisk{File: f, host: m.source.host, vm: m.vm, socket: filepath.Join(m.source.dir, "guest")}
	l, err := net.Listen("unix", d.socket)
	must(m.t, err)
	server := &nbd.Server{Exporter: nbd.ExporterFunc(func(context.Context, nbd.Peer, string) (nbd.Device, error) { return d, nil })}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(context.Background(), l)
	}()
	m.t.Cleanup(func() {
		_ = server.Shutdown(context.Background())
		<-served
	})
	return d
}

// Size implements nbd.Device.
func (*guestDisk) Size() int64 { return migratedSize }

// Close implements nbd.Device. The disk stays, for other connections.
func (*guestDisk) Close() error { return nil }

// BlockSizes implements nbd.BlockSizer.
func (*guestDisk) BlockSizes() (minimum, preferred, maxPayload uint32) { return 512, 4096, 1 << 20 }

// WriteAt implements nbd.Writer.
func (d *guestDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.host.WriteVM(d.vm, 0, p, off); err != nil {
		return 0, err
	}
	d.written.Add(int64(len(p)))
	return len(p), nil
}

// waitWritten waits for another write.
func (d *guestDisk) waitWritten(t *testing.T) {
	t.Helper()
	before := d.written.Load()
	eventually(t, func() (missing string) {
		if d.written.Load() == before {
			return "the guest writes nothing"
		}
		return ""
	})
}

// TestWarmMigrationOfTwoDisks kills nbd-tool during the copy of the second disk.
func TestWarmMigrationOfTwoDisks(t *testing.T) {
	m := newMigration(t, buildTool(t))
	const size = 4 << 20
	var disks []string
	for range 2 {
		disk, err := m.source.host.AddVDI(xapitest.VDISpec{Size: size, VHD: true})
		must(t, err)
		disks = append(disks, disk)
	}
	vm, err := m.source.host.AddVM("db", disks...)
	must(t, err)
	must(t, m.source.host.StartVM(vm))
	for slot := range disks {
		must(t, m.source.host.WriteVM(vm, slot, random(uint64(slot), size), 0))
	}
	m.do("begin", vm, m.targetVM, m.sr)
	reached := m.target.gate.closeAfter(2*size + size/2) // the first disk is written, and read for --verify
	ended := m.begin("copy")
	<-reached
	m.killTool()
	m.target.gate.letPass()
	if r := <-ended; r.code == 0 || !strings.Contains(r.output, "disk 0: all copied") || !strings.Contains(r.output, "disk 1: the copy is incomplete") {
		t.Errorf("exit code %d\n%s", r.code, r.output)
	}
	for slot := range disks {
		must(t, m.source.host.WriteVM(vm, slot, random(uint64(slot)+10, 64<<10), 1<<20))
	}
	m.do("finish", "--compare")
	for slot, disk := range disks {
		want, err := os.ReadFile(m.source.host.ImagePath(disk))
		must(t, err)
		wantFile(t, m.target.host.ImagePath(m.diskProgress(strconv.Itoa(slot)).Target), want)
	}
	m.source.waitClean(m.source.p)
	m.target.waitClean(m.target.p)
	must(t, m.target.host.StopVM(m.targetVM))
}

// TestCancelWarmMigration: cancel removes all that begin and copy have made, and a VM that was started on the
// target between two commands is noticed.
func TestCancelWarmMigration(t *testing.T) {
	m := newMigration(t, buildTool(t))
	m.guest.run(t)
	m.do("begin", m.vm, m.targetVM, m.sr)
	m.do("begin", m.vm, m.targetVM, m.sr)
	m.do("copy")
	m.wantCopied()
	m.startTarget()
	must(t, m.target.host.StopVM(m.targetVM))
	m.wantReport([]string{"copy"}, <-m.begin("copy"), "The next copy is a full one")
	if err := m.target.host.StartVM(m.targetVM); err == nil {
		t.Error("the start of the VM on the target is not blocked again")
	}
	m.do("copy")
	m.wantCopied()
	p := m.progress()
	m.do("cancel")
	m.wantClean()
	for _, path := range []string{m.target.host.ImagePath(p.Target), m.source.host.ImagePath(p.Copied)} {
		if path != "" {
			t.Errorf("%s is left", path)
		}
	}
	must(t, m.target.host.StartVM(m.targetVM))
	if files, err := filepath.Glob(filepath.Join(m.dir, "vm.json*")); err != nil || strings.Join(files, " ") != filepath.Join(m.dir, "vm.json.lock") {
		t.Errorf("files left: %q (%v)", files, err)
	}
}
