package interop

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

var originalProgram = program{
	name:    "original",
	library: library{"nbd-unix", "nbd_unix.cmxa", "none; opam has it"},
	logs:    true,
}

// originalPeer is the log line with the name of the peer. Debian has no package of the
// library, so without it the test is skipped even with STRICT=1; the dialogues always run.
func originalPeer(t *testing.T) string {
	t.Helper()
	ocamlfind, err := exec.LookPath("ocamlfind")
	if err != nil {
		t.Skip("original library: NOT tested: there is no ocamlfind")
	}
	out, err := exec.Command(ocamlfind, "query", "-format", "%v", originalProgram.library.name).Output()
	if err != nil {
		t.Skip("original library: NOT tested: ocamlfind knows no nbd-unix, of which Debian has no package")
	}
	return "peer: nbd-unix " + strings.TrimSpace(string(out))
}

func TestOriginalLibrary(t *testing.T) {
	t.Run("original library", func(t *testing.T) {
		peer := originalPeer(t)
		t.Run("its client", func(t *testing.T) {
			for name, run := range map[string]func(*testing.T){"list": originalLists, "list refused": originalIsRefused, "whole disk": originalPulls} {
				t.Run(name, func(t *testing.T) {
					t.Log(peer)
					run(t)
				})
			}
		})
		t.Run("its server", func(t *testing.T) {
			for name, run := range map[string]func(*testing.T, string){"list": listsOriginal, "unknown export": unknownToOriginal, "whole disk": pullsOriginal} {
				t.Run(name, func(t *testing.T) {
					t.Log(peer)
					run(t, startOriginal(t))
				})
			}
		})
	})
}

// portOf starts our server for the original's client and returns its port.
func portOf(t *testing.T, lists, opened bool) string {
	t.Helper()
	s, _ := dialogueServer(t, nbd.NoTLS, lists, opened)
	nc := nbdtest.Serve(t, s)()
	nc.Close()
	return strconv.Itoa(nc.RemoteAddr().(*net.TCPAddr).Port)
}

func originalSays(t *testing.T, want facts, args ...string) {
	t.Helper()
	said, failure := originalProgram.run(t, args...)
	if diff := cmp.Diff(want, said); failure != "" || diff != "" {
		t.Errorf("the original's client failed with %q, and says (-want +got):\n%s", failure, diff)
	}
}

// Its list is in reverse order.
func originalLists(t *testing.T) {
	originalSays(t, facts{"export 1": "export2", "export 2": "export1"}, "list", portOf(t, true, false))
}

func originalIsRefused(t *testing.T) {
	originalSays(t, facts{"listed": "policy"}, "list", portOf(t, false, false))
}

func originalPulls(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	originalSays(t, facts{"size": fmt.Sprint(rowsSize), "read-only": "true"}, "copy", portOf(t, false, true), export, out)
	sameBytes(t, out, rows())
}

// startOriginal starts the original's server for the rest of the test, and
// returns its address.
func startOriginal(t *testing.T) (addr string) {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, rows(), 0o600); err != nil {
		t.Fatal(err)
	}
	said := originalProgram.start(t, "serve", export, disk).facts
	return net.JoinHostPort("127.0.0.1", said["port"])
}

func connectOriginal(t *testing.T, addr string) (context.Context, net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return ctx, nc
}

func listsOriginal(t *testing.T, addr string) {
	list, err := listOf(connectOriginal(t, addr))
	if diff := cmp.Diff([]client.Export{{Name: export}}, list); err != nil || diff != "" {
		t.Errorf("error %v, list (-want +got):\n%s", err, diff)
	}
}

func unknownToOriginal(t *testing.T, addr string) {
	ctx, nc := connectOriginal(t, addr)
	c, err := client.New(ctx, nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := c.Go(ctx, "another"); err == nil {
		conn.Close()
		t.Error("an export that does not exist was opened")
	}
}

func pullsOriginal(t *testing.T, addr string) {
	ctx, nc := connectOriginal(t, addr)
	conn, err := open(ctx, nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if info := conn.Info(); info.Size != rowsSize || info.Flags != wire.FlagHasFlags|wire.FlagReadOnly {
		t.Errorf("got %+v", info)
	}
	p := make([]byte, rowsSize)
	if err := conn.Read(ctx, p, 0); err != nil || !bytes.Equal(p, rows()) {
		t.Errorf("error %v or wrong bytes", err)
	}
}
