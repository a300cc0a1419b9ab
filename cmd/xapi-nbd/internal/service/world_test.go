package service

import (
	"errors"
	"os"
	"strings"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/servicetest"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// patience bounds every wait of these tests. No step is expected to take that long.
const patience = servicetest.Timeout

var (
	random     = servicetest.Random
	eventually = servicetest.Eventually
	lacking    = servicetest.Lacking
)

// world is a simulated host for one service.
type world struct {
	*servicetest.World
	t    *testing.T
	dir  string
	host *xapitest.Host
}

func newWorld(t *testing.T, cfg xapitest.Config) *world {
	t.Helper()
	w := servicetest.NewWorld(t, cfg)
	return &world{World: w, t: t, dir: w.Dir, host: w.Host}
}

// endpoint is an address of a service.
type endpoint struct{ network, addr string }

// dial connects and greets, with TLS or without.
func (w *world) dial(at endpoint, secure bool) (*client.Client, error) {
	return w.Dial(at.network, at.addr, secure, client.Config{})
}

// open opens an export, with TLS or without.
func (w *world) open(at endpoint, name string, secure bool) (*client.Conn, error) {
	return w.Open(at.network, at.addr, name, secure, client.Config{})
}

func (w *world) openUnix(addr, export string) (*client.Conn, error) {
	return w.open(endpoint{"unix", strings.TrimPrefix(addr, "unix:")}, export, false)
}

// wantReply opens an export, and requires a refusal with this reply and text; 0 is none.
func (w *world) wantReply(t *testing.T, at endpoint, vdi string, secure bool, reply wire.OptionReply, text string) {
	t.Helper()
	conn, err := w.open(at, w.Export(vdi), secure)
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

// reference returns the text of docs/REFERENCE.md.
func reference(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/REFERENCE.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
