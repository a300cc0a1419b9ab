package service

import (
	"errors"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestReloadDuringHandshakes: a client that has not opened its export yet is held to the settings
// of a reload, also if NBD_OPT_INFO has opened it already.
func TestReloadDuringHandshakes(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.AddVDI(random(1, 1<<20), xapitest.VDISpec{})
	reading := w.Export(vdi)
	writing := reading + "&mode=rw"
	s := w.inside(func(c *config.Config) { c.TLS, c.AllowWrite = config.TLSOff, true })
	dial := func(inform string) *client.Client {
		c, err := w.dial(s.at(0), false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Abort() })
		if inform != "" {
			if _, err := c.Info(t.Context(), inform); err != nil {
				t.Fatal(err)
			}
		}
		return c
	}
	wantRefused := func(what string, c *client.Client, export, text string) {
		t.Helper()
		conn, err := c.Go(t.Context(), export)
		var refused *client.Error
		if !errors.As(err, &refused) || refused.Reply != wire.RepErrPolicy || !strings.Contains(refused.Text, text) {
			t.Errorf("%s: got %v, want a refusal with %q", what, err, text)
		}
		if err == nil {
			conn.Close()
		}
	}
	writer := dial(writing)
	s.reloadWith(func(c *config.Config) { c.AllowWrite = false })
	wantRefused("writing after INFO", writer, writing, "writing is not allowed")

	fresh, informed := dial(""), dial(reading)
	s.reloadWith(func(c *config.Config) { c.TLS = config.TLSRequire })
	const text = "TLS is required now"
	wantRefused("in the clear", fresh, reading, text)
	wantRefused("in the clear after INFO", informed, reading, text)
	if names, err := fresh.ListMetaContexts(t.Context(), reading); err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("list of contexts: got %q, %v, want a refusal with %q", names, err, text)
	}
}
