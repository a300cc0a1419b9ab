package main

import (
	"testing"
	"time"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestHangingCallsRefuseInTime: if any call to xapi hangs, the client is refused after
// attach_timeout, and not after the timeout of the call.
func TestHangingCallsRefuseInTime(t *testing.T) {
	for method, want := range map[string]struct {
		reply wire.OptionReply
		text  string
	}{
		"session.get_record": {wire.RepErrPolicy, "xapi unreachable"},
		"session.get_uuid":   {wire.RepErrPolicy, "xapi unreachable"},
		"VDI.get_by_uuid":    {wire.RepErrUnknown, "attach still in progress"},
		"VDI.get_record":     {wire.RepErrUnknown, "attach still in progress"},
		"VBD.create":         {wire.RepErrUnknown, "attach still in progress"},
		"VBD.plug":           {wire.RepErrUnknown, "attach still in progress"},
		"VBD.get_record":     {wire.RepErrUnknown, "attach still in progress"},
	} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			p := w.start("--config=" + w.file("short.toml", `attach_timeout = "200ms"`))
			p.waitCalm(w)
			release := w.host.Block(method)
			defer release()
			begin := time.Now()
			w.wantReply(t, p, vdi, false, want.reply, want.text)
			// Far above the setting, far below the minute of a call.
			if took := time.Since(begin); took > 30*time.Second {
				t.Errorf("refused after %v", took)
			}
			release()
			w.waitClean(p)
		})
	}
}
