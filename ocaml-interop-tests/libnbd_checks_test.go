package interop

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// libnbdChecks are the actions of the client in every mode that allows them.
var libnbdChecks = []struct {
	name  string
	only  func(mode) bool // nil: in every mode
	check func(t *testing.T, w *world)
}{
	{name: "facts", check: exportFacts},
	{name: "whole disk in pieces", check: wholeDisk},
	{name: "whole file with a hole", check: wholeFile},
	{name: "requests in flight", check: inFlight},
	{name: "reads past the end", check: readsPastTheEnd},
	{name: "read error", check: readError},
	{name: "writes refused", check: writesRefused},
	{name: "exports refused, then one opened", only: mode.isGo, check: refusedByName},
	{name: "export refused", only: func(m mode) bool { return !m.isGo() }, check: refusedByClosing},
	{name: "list", only: func(m mode) bool { return m.how == "go" }, check: listed},
	{name: "list refused", only: func(m mode) bool { return m.how == "go" }, check: listRefused},
	{name: "another CA", only: func(m mode) bool { return m.tls }, check: anotherCA},
	{name: "client without TLS", only: func(m mode) bool { return m.tls }, check: withoutTLS},
	{name: "client that demands TLS", only: func(m mode) bool { return m.how == "go" && !m.tls }, check: demandsTLS},
	{name: "client killed", check: clientKilled},
}

func TestLibnbd(t *testing.T) {
	peer := libnbdPeer(t)
	t.Run("libnbd in OCaml", func(t *testing.T) {
		for _, m := range modes {
			t.Run(m.name, func(t *testing.T) {
				for _, c := range libnbdChecks {
					if c.only == nil || c.only(m) {
						t.Run(c.name, func(t *testing.T) {
							t.Log(peer)
							c.check(t, serve(t, m))
						})
					}
				}
			})
		}
	})
}

func same(t *testing.T, want, got facts) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the client says (-want +got):\n%s", diff)
	}
}

func exportFacts(t *testing.T, w *world) {
	protocol := "newstyle"
	if w.mode.isGo() {
		protocol = "newstyle-fixed"
	}
	same(t, facts{
		"size": strconv.Itoa(diskSize), "read-only": "true", "multi-conn": "true", "protocol": protocol,
		"structured": strconv.FormatBool(w.mode.how == "go"), "tls": strconv.FormatBool(w.mode.tls),
	}, w.run(t, "facts", export))
}

// copyAll makes the client read an export in pieces, in random order, and compares every
// byte.
func copyAll(t *testing.T, w *world, export, piece string, want []byte) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	same(t, facts{"deepest": "8", "failed": "0"}, w.run(t, "copy", export, out, piece, "8"))
	sameBytes(t, out, want)
}

func sameBytes(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		t.Errorf("the client's copy has %d bytes, want %d; they differ from byte %d on", len(got), len(want), at)
	}
}

func wholeDisk(t *testing.T, w *world) {
	copyAll(t, w, export, "40961", nbdtest.Bytes(diskSize, 0, diskSeed))
}

// wholeFile reads whole blocks of the file, which libnbd requires, in reads long enough for
// holes and for splice.
func wholeFile(t *testing.T, w *world) { copyAll(t, w, "file", "200704", w.disks.file) }

// inFlight: the device answers no request until all have reached it.
func inFlight(t *testing.T, w *world) {
	const depth = 32
	arrived, release := w.disks.held.Hold()
	defer release()
	reached := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	go func() {
		defer release()
		for i := range depth {
			select {
			case <-arrived:
			case <-ctx.Done():
				reached <- fmt.Errorf("%d requests reached the device, want %d at once", i, depth)
				return
			}
		}
		reached <- nil
	}()
	out := filepath.Join(t.TempDir(), "out")
	same(t, facts{"deepest": strconv.Itoa(depth), "failed": "0"},
		w.run(t, "copy", "held", out, "32768", strconv.Itoa(depth)))
	if err := <-reached; err != nil {
		t.Error(err)
	}
	sameBytes(t, out, nbdtest.Bytes(diskSize, 0, diskSeed))
}

// good is the client's output for bytes of the disk that it has read.
func good(off int64, n int) string { return digest(nbdtest.Bytes(n, off, diskSeed)) }

func readsPastTheEnd(t *testing.T, w *world) {
	behind := fmt.Sprintf("%d:512", diskSize)
	across := fmt.Sprintf("%d:512", diskSize-511)
	last := fmt.Sprintf("%d:512", diskSize-512)
	const far = "9223372036854775296:512" // up to the largest offset that a client in OCaml can name
	same(t, facts{
		behind: "EINVAL", across: "EINVAL", far: "EINVAL",
		last: good(diskSize-512, 512), "0:100000": good(0, 100_000),
	}, w.run(t, "reads", export, behind, across, far, last, "0:100000"))
}

func readError(t *testing.T, w *world) {
	hit := fmt.Sprintf("%d:512", badSpot)
	across := fmt.Sprintf("%d:262144", badSpot-131072)
	before := fmt.Sprintf("%d:131072", badSpot-131072)
	after := fmt.Sprintf("%d:131072", badSpot+512)
	same(t, facts{
		hit: "EIO", across: "EIO", before: good(badSpot-131072, 131072), after: good(badSpot+512, 131072),
	}, w.run(t, "reads", "faulty", hit, across, before, after))
}

func writesRefused(t *testing.T, w *world) {
	same(t, facts{"write": "EPERM", "write zeroes": "EPERM", "trim": "EPERM"}, w.run(t, "writes", export))
}

// refusedByName: with GO the reason arrives, and option haggling goes on.
func refusedByName(t *testing.T, w *world) {
	said, failure := libnbdClient.run(t, "names", w.uri("", w.ca), "nothing", "secret", export)
	if failure != "" {
		t.Fatal(failure)
	}
	same(t, facts{"nothing": "ENOENT", "secret": "ENOTSUP", export: strconv.Itoa(diskSize)}, said)
}

// refusedByClosing: EXPORT_NAME has no other answer.
func refusedByClosing(t *testing.T, w *world) {
	for _, name := range []string{"nothing", "secret"} {
		said, failure := libnbdClient.run(t, "facts", w.mode.how, w.uri(name, w.ca))
		if !strings.Contains(failure, "server disconnected") || len(said) != 0 {
			t.Errorf("%s: got %v and the error %q, want a server that disconnects", name, said, failure)
		}
	}
	if got, want := fmt.Sprint(w.disks.Names()), "[nothing secret]"; got != want {
		t.Errorf("the server was asked for %s, want %s", got, want)
	}
}

func listed(t *testing.T, w *world) {
	exports := []nbd.Export{{Name: export, Description: "a disk, and its session"}, {Name: "ö"}, {Name: ""}}
	w.start(t, lister{w.disks, exports})
	said, failure := libnbdClient.run(t, "list", w.uri("", w.ca))
	if failure != "" {
		t.Fatal(failure)
	}
	same(t, facts{
		"listed": "3", "export 1": export + "|a disk, and its session", "export 2": "ö|", "export 3": "|",
	}, said)
}

func listRefused(t *testing.T, w *world) {
	said, failure := libnbdClient.run(t, "list", w.uri("", w.ca))
	if failure != "" {
		t.Fatal(failure)
	}
	same(t, facts{"listed": "ENOTSUP"}, said) // as libnbd puts NBD_REP_ERR_POLICY
}

// refusedOutright expects that the client fails with the reason.
func refusedOutright(t *testing.T, w *world, ca, how, why string) {
	t.Helper()
	said, failure := libnbdClient.run(t, "facts", how, w.uri(export, ca))
	if !strings.Contains(failure, why) || len(said) != 0 {
		t.Errorf("%s: got %v and the error %q, want one that speaks of %q", how, said, failure, why)
	}
	if names := w.disks.Names(); len(names) != 0 {
		t.Errorf("%s: the server was asked for %d exports, want none", how, len(names))
	}
}

// anotherCA: libnbd verifies the server because the URI has certificates.
func anotherCA(t *testing.T, w *world) {
	_, other := certificate(t)
	refusedOutright(t, w, other, w.mode.how, "certificate")
}

func withoutTLS(t *testing.T, w *world) {
	refusedOutright(t, w, "", w.mode.how, "TLS")
	refusedOutright(t, w, "", "export-name", "server disconnected")
}

func demandsTLS(t *testing.T, w *world) {
	_, ca := certificate(t)
	refusedOutright(t, w, ca, w.mode.how, "TLS")
}

// clientKilled: the client is killed while the device has requests.
func clientKilled(t *testing.T, w *world) {
	arrived, release := w.disks.held.Hold()
	defer release()
	cmd := exec.Command(libnbdClient.build(t), "copy", w.mode.how, w.uri("held", w.ca),
		filepath.Join(t.TempDir(), "out"), "65536", "4")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		select {
		case <-arrived:
		case <-time.After(timeout):
			t.Errorf("only %d requests reached the device", i)
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
}
