package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// attachWritable attaches the VDI of the fixture for writing.
func (f *fixture) attachWritable(s *xapi.Session) *vdi.WritableDisk {
	f.t.Helper()
	d, err := f.manager.AttachWritable(f.t.Context(), s, f.vdi)
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

// wantRule requires that err is an *ExclusiveError with the rule.
func wantRule(t *testing.T, err error, rule string) {
	t.Helper()
	var broken *vdi.ExclusiveError
	if !errors.As(err, &broken) || broken.Rule != rule {
		t.Errorf("got %v, want rule %s", err, rule)
	}
}

// logText collects the lines of a log. It is safe for concurrent use.
type logText struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// logsTo makes a manager log to l.
func logsTo(l *logText) func(*vdi.Config) {
	return func(c *vdi.Config) { c.Logger = slog.New(slog.NewTextHandler(l, nil)) }
}

// TestAttachWritable: a client reads its own writes, the image has them, and the attachment
// leaves nothing.
func TestAttachWritable(t *testing.T) {
	var log logText
	f := newFixture(t, logsTo(&log), lingers)
	d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	if v := f.host.VBDs(); len(v) != 1 || v[0].Mode != "RW" || !v[0].CurrentlyAttached {
		t.Errorf("VBDs: got %+v, want one that is attached with mode RW", v)
	}
	if s := f.manager.Status(); len(s) != 1 || !s[0].Write {
		t.Errorf("status: got %+v, want it to say that the VDI is written", s)
	}
	data := bytes.Repeat([]byte("written "), 1000)
	if n, err := d.WriteAt(data, 4097); n != len(data) || err != nil {
		t.Errorf("WriteAt: got %d, %v", n, err)
	}
	copy(f.content[4097:], data)
	if err := d.WriteZeroes(65536, 4096, true, false); err != nil {
		t.Errorf("WriteZeroes: %v", err)
	}
	clear(f.content[65536:][:4096])
	if err := d.WriteFUA(data[:512], 0); err != nil {
		t.Errorf("WriteFUA: %v", err)
	}
	copy(f.content, data[:512])
	if err := d.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
	if data, n := d.DataRun(0, d.Size()); !data || n != d.Size() {
		t.Errorf("a disk that is written claims a hole: %v, %d", data, n)
	}
	f.wantContent(d.Disk)
	d.CloseWithError(nil)
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
	if image, err := os.ReadFile(f.host.ImagePath(f.vdi)); err != nil || !bytes.Equal(image, f.content) {
		t.Errorf("the image does not have what was written: %v", err)
	}
	if text := log.String(); !strings.Contains(text, "writes flushed") || strings.Contains(text, "incomplete") {
		t.Errorf("the log says:\n%s", text)
	}
}

// A change outside of the VDI fails, also if the device is larger.
func TestWriteOutside(t *testing.T) {
	f := newFixture(t)
	f.host.SetVirtualSize(f.vdi, 1<<20-4096)
	d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	for _, r := range [][2]int64{{1<<20 - 4096, 512}, {1<<20 - 4608, 1024}, {-512, 512}, {1 << 62, 512}} {
		if n, err := d.WriteAt(make([]byte, r[1]), r[0]); err == nil {
			t.Errorf("%d bytes at %d: got %d without an error", r[1], r[0], n)
		}
		if err := d.WriteZeroes(r[0], r[1], false, false); err == nil {
			t.Errorf("zeroes, %d bytes at %d: no error", r[1], r[0])
		}
	}
	d.Close()
	f.closeManager()
	f.wantClean()
}

// The connections of one session share the attachment. Everybody else is refused until it is
// gone, at once and by name of the rule, and none of them makes a VBD.
func TestWritableIsExclusive(t *testing.T) {
	f := newFixture(t, lingers)
	mine, other := f.session(xapitest.RoleVMAdmin), f.session(xapitest.RoleVMAdmin)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	first := f.attachWritable(mine)
	again := f.client.Bind(mine.Ref()) // as for another connection
	second := f.attachWritable(again)
	if n := f.count("VBD.create"); n != 1 {
		t.Errorf("VBD.create: got %d calls, want 1", n)
	}
	if _, err := first.WriteAt([]byte("mine"), 8); err != nil {
		t.Error(err)
	}
	got := make([]byte, 4)
	if _, err := second.ReadAt(got, 8); err != nil || string(got) != "mine" {
		t.Errorf("on the other connection: got %q, %v", got, err)
	}
	_, err := f.manager.AttachWritable(ctx, other, f.vdi)
	wantRule(t, err, "being_written")
	for _, s := range []*xapi.Session{mine, other} {
		_, err = f.manager.Attach(ctx, s, f.vdi)
		wantRule(t, err, "being_written")
	}
	// The end of one connection does not end the other, however it ends.
	first.CloseWithError(errConnectionLost)
	if _, err := second.WriteAt([]byte("still"), 8); err != nil {
		t.Error(err)
	}
	_, err = f.manager.AttachWritable(ctx, other, f.vdi)
	wantRule(t, err, "being_written")
	// The last one was lost too, and yet the attachment does not linger.
	second.CloseWithError(errConnectionLost)
	third, err := f.manager.AttachWritable(ctx, other, f.vdi)
	if err != nil {
		t.Fatalf("after the end of the first session: %v", err)
	}
	third.Close()
	f.wait("the VBD to go", noVBDs)
	f.closeManager()
	f.wantClean()
}

// A request for writing is refused while a client reads, and does not wait for it.
func TestWritableIsRefusedToReaders(t *testing.T) {
	f := newFixture(t, lingers)
	s := f.session(xapitest.RoleVMAdmin)
	reader := f.attach(s)
	_, err := f.manager.AttachWritable(t.Context(), s, f.vdi)
	wantRule(t, err, "being_read")
	f.wantContent(reader)
	leave(reader)
	d := f.attachWritable(s) // waits for the detach
	d.Close()
	f.closeManager()
	f.wantClean()
}

// hazards are all that must keep a VDI from being written, with the rule by which it is seen.
var hazards = []struct {
	name, rule string
	make       func(f *fixture)
}{
	{"VM runs", "attached", func(f *fixture) { f.startVM() }},
	{"another tool in the control domain", "attached", func(f *fixture) {
		uuid, err := f.host.AddForeignVBD(f.vdi, nil)
		if err == nil {
			err = f.host.PlugForeign(uuid)
		}
		if err != nil {
			f.t.Fatal(err)
		}
	}},
	{"snapshot", "snapshot", func(f *fixture) { f.must(f.host.MarkSnapshot(f.vdi)) }},
	{"read-only", "read_only", func(f *fixture) { f.change(func(s *xapitest.VDISpec) { s.ReadOnly = true }) }},
	{"sharable", "sharable", func(f *fixture) { f.change(func(s *xapitest.VDISpec) { s.Sharable = true }) }},
	{"type", "type", func(f *fixture) { f.change(func(s *xapitest.VDISpec) { s.Type = "crashdump" }) }},
	{"operation", "operation", func(f *fixture) {
		end, err := f.host.HoldVDIOperation(f.vdi, "snapshot")
		f.must(err)
		f.t.Cleanup(end)
	}},
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) change(change func(*xapitest.VDISpec)) {
	f.t.Helper()
	f.must(f.host.ChangeVDI(f.vdi, change))
}

// startVM starts a VM that has the VDI as its disk: xapi does not mind that the control
// domain is writing it.
func (f *fixture) startVM() {
	f.t.Helper()
	vm, err := f.host.AddVM("guest", f.vdi)
	f.must(err)
	f.must(f.host.StartVM(vm))
}

// Nothing is plugged if the VDI must not be written from the start.
func TestGuardBeforeTheVBD(t *testing.T) {
	for _, h := range hazards {
		t.Run(h.name, func(t *testing.T) {
			f := newFixture(t)
			h.make(f)
			before := f.count("VBD.create")
			_, err := f.manager.AttachWritable(t.Context(), f.session(xapitest.RoleVMAdmin), f.vdi)
			wantRule(t, err, h.rule)
			if n := f.count("VBD.create") - before; n != 0 {
				t.Errorf("VBD.create: got %d calls, want none", n)
			}
			f.closeManager()
			f.wantClean()
		})
	}
}

// TestGuardAfterThePlug: changes during the plug are noticed after it, before anything can be
// written.
func TestGuardAfterThePlug(t *testing.T) {
	for _, h := range hazards {
		t.Run(h.name, func(t *testing.T) {
			f := newFixture(t)
			release := f.block("VBD.plug")
			failed := make(chan error, 1)
			s := f.session(xapitest.RoleVMAdmin)
			go func() {
				d, err := f.manager.AttachWritable(t.Context(), s, f.vdi)
				if err == nil {
					d.Close()
				}
				failed <- err
			}()
			f.wait("the plug", f.called("VBD.plug", 1))
			h.make(f)
			release()
			wantRule(t, <-failed, h.rule)
			f.wait("our VBD to go", func(vbds []xapitest.VBD) bool {
				for _, v := range vbds {
					if !v.Foreign {
						return false
					}
				}
				return true
			})
			f.closeManager()
			f.wantClean()
		})
	}
}

// TestGuardWhileAttached: changes while the VDI is written are noticed within a second or so.
// From then on nothing is written, and the log has one line about it.
func TestGuardWhileAttached(t *testing.T) {
	for _, h := range hazards {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			var log logText
			f := newFixture(t, logsTo(&log))
			d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
			if _, err := d.WriteAt([]byte("before"), 0); err != nil {
				t.Error(err)
			}
			h.make(f)
			wantEnd(t, d.Disk)
			wantRule(t, context.Cause(d.Lifetime()), h.rule)
			image, err := os.ReadFile(f.host.ImagePath(f.vdi))
			f.must(err)
			_, err = d.WriteAt([]byte("after"), 0)
			wantRule(t, err, h.rule)
			wantRule(t, d.WriteFUA([]byte("after"), 0), h.rule)
			wantRule(t, d.WriteZeroes(0, 512, false, false), h.rule)
			wantRule(t, d.Flush(), h.rule)
			now, err := os.ReadFile(f.host.ImagePath(f.vdi))
			f.must(err)
			if !bytes.Equal(image, now) {
				t.Error("the image was changed after the guard had ended the attachment")
			}
			d.CloseWithError(context.Cause(d.Lifetime()))
			f.closeManager()
			f.wantClean()
			text := log.String()
			if n := strings.Count(text, "not ours alone any more"); n != 1 || !strings.Contains(text, "rule="+h.rule) {
				t.Errorf("%d lines, want one with the rule:\n%s", n, text)
			}
			if !strings.Contains(text, "incomplete write") || !strings.Contains(text, "bytes=6") {
				t.Errorf("the log does not tell the incomplete write:\n%s", text)
			}
		})
	}
}

// A client that ends without a disconnect leaves a line with the number of bytes.
func TestIncompleteWrite(t *testing.T) {
	for _, soft := range []bool{false, true} {
		var log logText
		f := newFixture(t, logsTo(&log))
		d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
		if _, err := d.WriteAt(make([]byte, 1536), 0); err != nil {
			t.Error(err)
		}
		var end error
		if !soft {
			end = errConnectionLost
		}
		d.CloseWithError(end)
		f.closeManager()
		f.wantClean()
		text := log.String()
		got := strings.Contains(text, "incomplete write: the connection ended without a disconnect") && strings.Contains(text, "bytes=1536")
		if got == soft {
			t.Errorf("disconnected %t, log:\n%s", soft, text)
		}
	}
}

// Another client unplugs a VBD that is being written, which xapi does not prevent where the
// device is called nbdN: the connections end, and nothing more is written to the device.
func TestForeignUnplugWhileWriting(t *testing.T) {
	f := newNBDFixture(t)
	d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	if _, err := d.WriteAt([]byte("before"), 0); err != nil {
		t.Error(err)
	}
	copy(f.content, "before")
	unplugged := make(chan error)
	go func() { unplugged <- f.host.UnplugVBD(t.Context(), f.host.VBDs()[0].UUID) }()
	wantEnd(t, d.Disk)
	for name, err := range map[string]error{
		"WriteFUA": d.WriteFUA([]byte("after"), 0), "Flush": d.Flush(), "Trim": d.Trim(0, 4096), "WriteZeroes": d.WriteZeroes(0, 4096, true, false),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	d.CloseWithError(context.Cause(d.Lifetime()))
	if err := <-unplugged; err != nil {
		t.Error(err)
	}
	image, err := os.ReadFile(f.host.ImagePath(f.vdi))
	if err != nil || !bytes.Equal(image, f.content) {
		t.Errorf("the image is not as before the unplug: %v", err)
	}
	f.closeManager()
	f.wantClean()
}

// A loop device is written past the page cache, in sectors of 4096 bytes too.
func TestWriteLoopDevice(t *testing.T) {
	f := newNBDFixture(t)
	f.content = pattern(1 << 20)
	f.vdi = f.addVDI(xapitest.VDISpec{Size: 1 << 20, SectorSize: 4096})
	d := f.attachWritable(f.session(xapitest.RoleVMAdmin))
	if minimum, _, _ := d.BlockSizes(); minimum != 4096 {
		t.Errorf("minimum block size: got %d, want 4096", minimum)
	}
	if _, err := d.WriteAt(f.content, 0); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt([]byte("x"), 5000); err != nil { // inside a sector
		t.Error(err)
	}
	f.content[5000] = 'x'
	f.wantContent(d.Disk)
	d.CloseWithError(nil)
	f.closeManager()
	f.wantClean()
	image, err := os.ReadFile(f.host.ImagePath(f.vdi))
	if err != nil || !bytes.Equal(image, f.content) {
		t.Errorf("the image does not have what was written: %v", err)
	}
}
