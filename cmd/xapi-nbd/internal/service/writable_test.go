package service

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// mayWrite lets clients write.
func mayWrite(c *config.Config) { c.AllowWrite = true }

// wantRefusal requires that err is a refusal with this reply and text.
func wantRefusal(t *testing.T, err error, reply wire.OptionReply, text string) {
	t.Helper()
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Reply != reply || !strings.Contains(refused.Text, text) {
		t.Errorf("got %v, want %v with %q", err, reply, text)
	}
}

// A client writes through the service, with and without TLS: the image has its bytes, and
// status, log and statistics tell about it.
func TestServiceWrites(t *testing.T) {
	for _, secure := range []bool{false, true} {
		w := newWorld(t, xapitest.Config{})
		content := random(1, 1<<20)
		vdi := w.AddVDI(content, xapitest.VDISpec{})
		s := w.inside(func(c *config.Config) { mayWrite(c); c.Metrics = "unix:" + w.dir + "/metrics" })
		name := w.Export(vdi) + "&mode=rw"
		conn, err := w.open(s.at(0), name, secure)
		if err != nil {
			t.Fatal(err)
		}
		flags := conn.Info().Flags
		if want := wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendWriteZeroes | wire.FlagCanMultiConn; flags&want != want || flags&wire.FlagReadOnly != 0 {
			t.Errorf("transmission flags: got %v", flags)
		}
		second, err := w.open(s.at(0), name, secure)
		if err != nil {
			t.Fatal(err)
		}
		data := random(2, writtenBytes)
		if err := conn.Write(t.Context(), data[:200_192], 1024, false); err != nil {
			t.Error(err)
		}
		if err := second.Write(t.Context(), data[200_192:], 1024+200_192, true); err != nil {
			t.Error(err)
		}
		copy(content[1024:], data)
		if err := conn.WriteZeroes(t.Context(), 600_064, 100_352, client.ZeroOptions{}); err != nil {
			t.Error(err)
		}
		clear(content[600_064:][:100_352])
		if err := conn.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		got := make([]byte, len(content))
		if _, err := second.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the other connection reads something else: %v", err)
		}
		w.wantWriting(t, s, vdi)
		conn.Close()
		second.Close()
		w.waitNoVBDs()
		if image, err := os.ReadFile(w.host.ImagePath(vdi)); err != nil || !bytes.Equal(image, content) {
			t.Errorf("the image does not have what was written: %v", err)
		}
		if text := s.logged(); !strings.Contains(text, "writes flushed") || strings.Contains(text, "incomplete") {
			t.Errorf("log:\n%s", text)
		}
	}
}

// waitNoVBDs waits until the service has detached everything.
func (w *world) waitNoVBDs() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if err := w.host.Wait(ctx, func(vbds []xapitest.VBD) bool { return len(vbds) == 0 }); err != nil {
		w.t.Fatalf("VBDs left: %+v", w.host.VBDs())
	}
}

// writtenBytes is how many bytes TestServiceWrites writes: whole sectors.
const writtenBytes = 300_032

// wantWriting requires that status and statistics show two connections that have written
// writtenBytes.
func (w *world) wantWriting(t *testing.T, s *insideService, vdi string) {
	t.Helper()
	r := s.Status(t.Context())
	if len(r.Attachments) != 1 || r.Attachments[0].Mode != "rw" {
		t.Errorf("status: got attachments %+v, want one with mode rw", r.Attachments)
	}
	written := int64(0)
	for _, c := range r.Connections {
		written += c.Written
		if c.VDI != vdi || c.Position == 0 {
			t.Errorf("status: got connection %+v, want it to be in the middle of the VDI", c)
		}
	}
	if written != writtenBytes {
		t.Errorf("status: %d bytes written, want %d", written, writtenBytes)
	}
	if text := control.Screen(&r, nil); !strings.Contains(text, "for writing") {
		t.Errorf("the screen does not tell that the disk is written:\n%s", text)
	}
	if totals := s.server.Totals(); totals.Written != writtenBytes || totals.Bytes <= totals.Written {
		t.Errorf("totals: got %d bytes, %d of them written", totals.Bytes, totals.Written)
	}
}

// Writing is off unless the setting allows it, and a reload changes that.
func TestAllowWrite(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(nil)
	_, err := w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "allow_write")
	if n := len(w.host.Events()); n != 0 {
		t.Errorf("%d events of VBDs, want none", n)
	}
	s.reloadWith(mayWrite)
	conn, err := w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	if err != nil {
		t.Fatalf("after the reload: %v", err)
	}
	// Who writes goes on when it is not allowed any more.
	s.reloadWith(func(c *config.Config) { c.AllowWrite = false })
	if err := conn.Write(t.Context(), make([]byte, 512), 0, false); err != nil {
		t.Error(err)
	}
	conn.Close()
	_, err = w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "allow_write")
}

// A read-only export cannot be written, also where writing is allowed.
func TestReadOnlyStaysReadOnly(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(mayWrite)
	for _, mode := range []string{"", "&mode=ro"} {
		conn, err := w.open(s.at(0), w.Export(vdi)+mode, false)
		if err != nil {
			t.Fatal(err)
		}
		if conn.Info().Flags&wire.FlagReadOnly == 0 {
			t.Errorf("%q: the export is not read-only", mode)
		}
		if vbds := w.host.VBDs(); len(vbds) != 1 || vbds[0].Mode != "RO" {
			t.Errorf("%q: got VBDs %+v, want one with mode RO", mode, vbds)
		}
		conn.Close()
	}
}

// Other sessions and readers are refused by name of the rule, and so is a disk that must not
// be written.
func TestWritingIsRefused(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	s := w.inside(mayWrite)
	conn, err := w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "rule being_written")
	_, err = w.open(s.at(0), w.Export(vdi), false)
	wantRefusal(t, err, wire.RepErrPolicy, "rule being_written")
	conn.Close()
	w.waitNoVBDs()

	reader, err := w.open(s.at(0), w.Export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "rule being_read")
	reader.Close()

	ref := w.host.NewSession(xapitest.RoleVMOperator)
	_, err = w.open(s.at(0), w.host.ExportName(vdi, ref)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "missing permission vbd.create")

	snapshot := w.AddVDI(random(1, 1<<19), xapitest.VDISpec{})
	if err := w.host.MarkSnapshot(snapshot); err != nil {
		t.Fatal(err)
	}
	_, err = w.open(s.at(0), w.Export(snapshot)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "rule snapshot")
	if n := s.refusedByReason()[reasonExclusive]; n != 4 {
		t.Errorf("%d refusals counted under %s, want 4", n, reasonExclusive)
	}
}

// When a VM starts from a disk that is being written, the client gets EIO and the end of its
// connection.
func TestVMStartsWhileWriting(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	vm, err := w.host.AddVM("guest", vdi)
	if err != nil {
		t.Fatal(err)
	}
	s := w.inside(mayWrite)
	conn, err := w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	if err != nil {
		t.Fatalf("while the VM is halted: %v", err)
	}
	if err := conn.Write(t.Context(), make([]byte, 4096), 0, false); err != nil {
		t.Error(err)
	}
	if err := w.host.StartVM(vm); err != nil {
		t.Fatalf("xapi does not mind that the disk is being written: %v", err)
	}
	<-conn.Done()
	if err := conn.Write(t.Context(), make([]byte, 4096), 0, false); err == nil {
		t.Error("a write succeeded after the end")
	}
	conn.Close()
	_, err = w.open(s.at(0), w.Export(vdi)+"&mode=rw", false)
	wantRefusal(t, err, wire.RepErrPolicy, "rule attached")
	for _, want := range []string{"not ours alone any more", "rule=attached", "incomplete write"} {
		if !strings.Contains(s.logged(), want) {
			t.Errorf("the log lacks %q:\n%s", want, s.logged())
		}
	}
}

// Of a disk that is written nobody is told holes or changes.
func TestContextsOfAWritableDisk(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi, err := w.host.AddVDI(xapitest.VDISpec{VHD: true, Size: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := w.inside(mayWrite)
	base := DirtyBitmap + "11111111-2222-3333-4444-555555555555"
	at := s.at(0)
	c, err := client.Dial(t.Context(), at.network, at.addr, &client.Config{MetaContexts: []string{wire.BaseAllocation, base}})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(t.Context(), w.Export(vdi)+"&mode=rw")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, name := range conn.MetaContexts() {
		if name != wire.BaseAllocation {
			t.Errorf("context %s was granted", name)
		}
	}
	extents, err := conn.BlockStatus(t.Context(), wire.BaseAllocation, 0, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		if e.Status != 0 {
			t.Errorf("got extent %+v, want data only", e)
		}
	}
}
