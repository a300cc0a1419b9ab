package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestRefusals: refused clients get the documented replies and texts.
func TestRefusals(t *testing.T) {
	const noSuch = "11111111-2222-3333-4444-555555555555"
	tests := []struct {
		name   string
		export func(w *world, vdi string) string
		reply  wire.OptionReply
		text   string
	}{
		{"no session", func(_ *world, vdi string) string { return "/" + vdi }, wire.RepErrInvalid, "session_id"},
		{"no uuid", func(w *world, _ string) string { return w.host.ExportName("disk1", w.session(xapitest.RoleVMAdmin)) }, wire.RepErrInvalid, "uuid"},
		{"empty name", func(*world, string) string { return "" }, wire.RepErrInvalid, ""},
		{"two sessions", func(w *world, vdi string) string {
			return w.export(vdi) + "&session_id=" + w.session(xapitest.RoleRoot)
		}, wire.RepErrInvalid, "session_id"},
		{"other mode", func(w *world, vdi string) string { return w.export(vdi) + "&mode=write" }, wire.RepErrInvalid, "mode is neither ro nor rw"},
		{"two modes", func(w *world, vdi string) string { return w.export(vdi) + "&mode=ro&mode=rw" }, wire.RepErrInvalid, "more than one mode"},
		{"writing", func(w *world, vdi string) string { return w.export(vdi) + "&mode=rw" }, wire.RepErrPolicy, "allow_write is false"},
		{"control character", func(w *world, vdi string) string { return w.export(vdi) + "\n" }, wire.RepErrInvalid, ""},
		{"dead session", func(w *world, vdi string) string {
			ref := w.session(xapitest.RoleVMAdmin)
			w.host.ExpireSession(ref)
			return w.host.ExportName(vdi, ref)
		}, wire.RepErrPolicy, "session rejected by xapi (SESSION_INVALID)"},
		{"unknown session", func(w *world, vdi string) string { return w.host.ExportName(vdi, "OpaqueRef:NULL") }, wire.RepErrPolicy, "session rejected"},
		{"role", func(w *world, vdi string) string {
			return w.host.ExportName(vdi, w.session(xapitest.RoleReadOnly))
		}, wire.RepErrPolicy, "missing permission vbd.create"},
		{"no such VDI", func(w *world, _ string) string { return w.export(noSuch) }, wire.RepErrUnknown, "no such VDI"},
		{"VDI in use", func(w *world, vdi string) string {
			w.host.Fail("VBD.plug", "VDI_IN_USE", "OpaqueRef:some-vdi", "destroy")
			return w.export(vdi)
		}, wire.RepErrUnknown, `VDI_IN_USE ["OpaqueRef:some-vdi" "destroy"]`},
		{"xapi error with a session in it", func(w *world, vdi string) string {
			w.host.Fail("VBD.plug", "SESSION_INVALID", w.session(xapitest.RoleVMAdmin))
			return w.export(vdi)
		}, wire.RepErrPolicy, "session rejected"},
		{"xapi hangs up", func(w *world, vdi string) string {
			w.host.DropConnection("session.get_record")
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi unreachable"},
		{"xapi answers with an HTTP error", func(w *world, vdi string) string {
			w.host.FailHTTP("session.get_record")
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi's answer cannot be understood"},
		{"xapi is booting", func(w *world, vdi string) string {
			w.host.Fail("session.get_record", "HOST_STILL_BOOTING")
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi not reachable yet"},
		{"xapi is booting when it is asked for the VDI", func(w *world, vdi string) string {
			w.host.Fail("VDI.get_by_uuid", "HOST_STILL_BOOTING")
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi not reachable yet"},
		{"the pool's master is away", func(w *world, vdi string) string {
			w.host.Fail("session.get_record", "HOST_MASTER_CANNOT_TALK_BACK", "10.0.0.1")
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi not reachable yet"},
		{"xapi's database is not up", func(w *world, vdi string) string {
			w.host.Fail("session.get_record", "INTERNAL_ERROR", `Db_exn.DBCache_NotFound("missing row", "session", "x")`)
			return w.export(vdi)
		}, wire.RepErrPolicy, "xapi not reachable yet"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			p := w.start()
			name := tt.export(w, vdi)
			c, err := w.dial(p, false)
			if err != nil {
				t.Fatal(err)
			}
			w.wantRefused(t, c, name, tt.reply, tt.text)
			// Option haggling goes on, and a good name is served.
			conn, err := c.Go(t.Context(), w.export(vdi))
			if err != nil {
				t.Fatalf("after the refusal: %v", err)
			}
			conn.Close()
			w.waitClean(p)

			if _, answer := w.exportName(p, tt.export(w, vdi)); len(answer) != 0 {
				t.Errorf("EXPORT_NAME: got %x, want the end of the connection", answer)
			}
			w.waitClean(p)
		})
	}
}

// wantRefused sends GO and checks reply and text, which must not contain the session.
func (w *world) wantRefused(t *testing.T, c *client.Client, name string, reply wire.OptionReply, text string) {
	t.Helper()
	_, err := c.Go(t.Context(), name)
	var refused *client.Error
	if !errors.As(err, &refused) {
		t.Fatalf("GO: got %v, want a refusal", err)
	}
	if refused.Reply != reply || !strings.Contains(refused.Text, text) {
		t.Errorf("GO: got %v %q, want %v with %q", refused.Reply, refused.Text, reply, text)
	}
	w.WantNoSecrets("the refusal", refused.Text)
}

// TestNothingIsPluggedWithoutAuthorization: clients without authorization cause no calls of xapi that
// change VBDs.
func TestNothingIsPluggedWithoutAuthorization(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	w.waitCalls("VBD.get_all_records_where", 1)
	w.waitClean(p) // now recovery at start is over
	w.host.ResetCalls()
	for _, ref := range []string{"OpaqueRef:dead", "garbage", "OpaqueRef:NULL"} {
		if _, err := w.open(p, w.host.ExportName(vdi, ref), false); err == nil {
			t.Fatalf("session %s was accepted", ref)
		}
	}
	for _, c := range w.host.Calls() {
		if strings.HasPrefix(c.Method, "VBD.") || strings.HasPrefix(c.Method, "VDI.") || strings.HasPrefix(c.Method, "VM.") {
			t.Errorf("%s was called for a session that xapi rejects", c.Method)
		}
	}
}

// TestPurposesUnknown: if xapi does not return the networks' purposes, every option is
// refused, with the cause.
func TestPurposesUnknown(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault func(h *xapitest.Host, method string)
		text  string
	}{
		{"booting", func(h *xapitest.Host, method string) { h.Fail(method, "HOST_STILL_BOOTING") }, "xapi not reachable yet"},
		{"no answer", (*xapitest.Host).DropConnection, "xapi unreachable"},
		{"HTTP error", (*xapitest.Host).FailHTTP, "xapi's answer cannot be understood"},
		{"API error", func(h *xapitest.Host, method string) { h.Fail(method, "INTERNAL_ERROR", "x") }, "xapi does not return the networks' NBD purposes: INTERNAL_ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			p := w.start()
			tt.fault(w.host, "network.get_all_records")
			w.wantReply(t, p, vdi, false, wire.RepErrPolicy, tt.text)
		})
	}
}

// TestPurposesDecideAboutTLS: the networks' purposes decide about TLS, for each connection.
func TestPurposesDecideAboutTLS(t *testing.T) {
	tests := []struct {
		purposes   []string
		clear      wire.OptionReply // of GO in the clear; 0: served
		clearText  string
		secure     wire.OptionReply // of STARTTLS; 0: served over TLS
		secureText string
	}{
		{[]string{"nbd"}, wire.RepErrTLSReqd, "STARTTLS", 0, ""},
		{[]string{"insecure_nbd"}, 0, "", 0, ""},
		{[]string{"nbd", "insecure_nbd"}, wire.RepErrPolicy, "contradictory", wire.RepErrPolicy, "contradictory"},
		{nil, wire.RepErrPolicy, "no network has an NBD purpose", wire.RepErrPolicy, "no network"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.purposes), func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			w.host.SetPurposes(w.network, tt.purposes...)
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			p := w.start()
			w.wantReply(t, p, vdi, false, tt.clear, tt.clearText)
			w.wantReply(t, p, vdi, true, tt.secure, tt.secureText)
			w.waitClean(p)
		})
	}
}

func (w *world) wantReply(t *testing.T, p *process, vdi string, secure bool, reply wire.OptionReply, text string) {
	t.Helper()
	conn, err := w.open(p, w.export(vdi), secure)
	if reply == 0 {
		if err != nil {
			t.Errorf("TLS %v: %v", secure, err)
			return
		}
		conn.Close()
		return
	}
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Reply != reply || !strings.Contains(refused.Text, text) {
		t.Errorf("TLS %v: got %v, want %v with %q", secure, err, reply, text)
	}
}

// TestTLSFlag: --tls overrides the networks' purposes.
func TestTLSFlag(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	w.host.SetPurposes(w.network)
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--tls=require")
	w.wantReply(t, p, vdi, false, wire.RepErrTLSReqd, "")
	w.wantReply(t, p, vdi, true, 0, "")
	w.waitClean(p)
	p.stop(patience)
	p = w.start("--tls=off")
	w.wantReply(t, p, vdi, false, 0, "")
	w.wantReply(t, p, vdi, true, wire.RepErrPolicy, "")
	w.waitClean(p)
}

// TestLimits: refusals name the limit, and its places are free again after the end of a
// connection.
func TestLimits(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	one := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	two := w.addVDI(random(2, 1<<20), xapitest.VDISpec{})
	p := w.start("--max-vbds=1", "--max-connections=2")
	first, err := w.open(p, w.export(one), false)
	if err != nil {
		t.Fatal(err)
	}
	w.wantReply(t, p, two, false, wire.RepErrPolicy, "max_vbds is 1")
	second, err := w.open(p, w.export(one), false) // shares the VBD
	if err != nil {
		t.Fatal(err)
	}
	w.wantReply(t, p, one, false, wire.RepErrPolicy, "max_connections is 2")
	if n := len(w.host.VBDs()); n != 1 {
		t.Errorf("VBDs of two connections to one VDI: got %d, want 1", n)
	}
	first.Close()
	second.Close()
	w.waitClean(p)
	w.wantReply(t, p, two, false, 0, "")
	w.waitClean(p)
}

// TestBeforeXapi: clients are refused with the reason until xapi answers, and then served.
func TestBeforeXapi(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	w.host.Booting(true)
	p := w.launch()
	p.addr = p.waitAddr()
	w.wantReply(t, p, vdi, false, wire.RepErrPolicy, "xapi not reachable yet")
	w.host.Booting(false)
	p.waitLine("ready to serve")
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
}

// TestAttachTimeoutAnswer: after attach_timeout the client is refused, and the plug is undone
// when it completes.
func TestAttachTimeoutAnswer(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--config=" + w.file("short.toml", `attach_timeout = "50ms"`))
	release := w.host.Block("VBD.plug")
	w.wantReply(t, p, vdi, false, wire.RepErrUnknown, "attach still in progress")
	release()
	w.waitClean(p)
}

// TestClientHangsUpDuringPlug: a client that hangs up during its plug leaves no VBD.
func TestClientHangsUpDuringPlug(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	release := w.host.Block("VBD.plug")
	conn, done := w.asyncExportName(p, w.export(vdi))
	w.waitCalls("VBD.plug", 1)
	conn.Close()
	p.waitLine("peer hung up")
	release()
	<-done
	w.waitClean(p)
}

func TestNoSecretInDebugLog(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--log-format=json")
	name := w.export(vdi)
	for _, n := range []string{name, strings.ReplaceAll(name, ":", "%3A"), name + "&x=1", name[1:], name + "\xff"} {
		if conn, err := w.open(p, n, false); err == nil {
			conn.Close()
		}
	}
	w.waitClean(p)
	p.stop(patience)
	if out := []byte(p.output()); !bytes.Contains(out, []byte("transmission ended")) || bytes.Contains(out, []byte("OpaqueRef")) {
		t.Errorf("a ref in the log, or no log at all:\n%s", out)
	}
}
