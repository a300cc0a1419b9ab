package interop

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// xoClientPackage is Xen Orchestra's client.
var xoClientPackage = npmPackage{
	name: "@vates/nbd-client", version: "3.6.0", script: "xo.mjs",
	needs: []string{"promise-toolbox@0.21.0", "@vates/async-each@1.0.3", "@vates/read-chunk@1.2.1", "@xen-orchestra/log@0.7.2"},
}

// xoConnections is the number of connections of one copy, all to one VDI.
const xoConnections = 4

// xoSize is no multiple of the 2 MiB that the client reads at a time.
const xoSize = diskSize + 512

// TestXO tests Xen Orchestra's client. It needs packages of the npm registry, so it runs only
// with INTEROP_XO=1 (make interop-xo). It is skipped if the registry fails, even with STRICT=1.
func TestXO(t *testing.T) {
	p := xoClient{xoClientPackage.install(t), 20}
	logNode(t)
	peer := peer{
		name: "Xen Orchestra",
		does: map[string]action{
			wholeDisk:   copies(p.pull("pull")),
			randomReads: copies(p.pull("shuffled")),
			abruptDeath: dies(p.pull("pull")),
		},
		cannot: map[string]string{pastTheEnd: knowsTheEnd},
		lacks: map[mode]string{
			{secure: false, old: false}: "asks with EXPORT_NAME only",
			{secure: true, old: false}:  "asks with EXPORT_NAME only",
		},
	}
	w := newWorld(t)
	content := randomBytes(2, xoSize)
	vdi := w.addVDI(t, content)
	t.Run(peer.name, func(t *testing.T) {
		for _, secure := range []bool{false, true} {
			for _, old := range []bool{false, true} {
				peer.runMode(t, w, mode{secure, old}, vdi, content)
			}
		}
		// Only in the clear, where the client also runs nbdinfo.
		t.Run("clear, both", func(t *testing.T) {
			t.Run("getMap", func(t *testing.T) {
				requires.Tool(t, "nbdinfo")
				w.exchange(newExchange(t, w, mode{}, vdi, content), p.getMap)
			})
		})
	})
	t.Run(peer.name+", upgrades", func(t *testing.T) {
		for _, secure := range []bool{false, true} {
			m := mode{secure: secure, old: true}
			t.Run(m.String(), func(t *testing.T) {
				w := newWorld(t)
				x := newExchange(t, w, m, w.addVDI(t, content), content)
				pullDuringUpgrades(x, p.pull("pull"))
			})
		}
	})
	t.Run(peer.name+", reconnecting", func(t *testing.T) {
		// A lost client may return late on a slow machine.
		w := newWorld(t, `linger = "2m"`)
		vdi := w.addVDI(t, content)
		m := mode{secure: true, old: true}
		t.Run(m.String(), func(t *testing.T) {
			t.Logf("n/a: %s, reconnecting/%v/a connection lost within a reply: version %s forgets the read whose bytes it is taking, and waits for ever",
				peer.name, m, xoClientPackage.version)
			for _, tt := range []struct {
				name string
				then atLimit
			}{{"one connection lost", cutOne}, {"all connections lost", cutAll}} {
				t.Run(tt.name, func(t *testing.T) {
					log, _ := w.exchange(newExchange(t, w, m, vdi, content), p.reconnects(tt.then))
					m.wantOptions(t, log)
				})
			}
		})
	})
}

func logNode(t *testing.T) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "node", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("peer: Node.js %s", versionNumber.FindString(string(out)))
}

// xoClient is an installed client.
type xoClient struct {
	dir  string
	wait int // before it reconnects, in milliseconds
}

// call runs the script.
func (p xoClient) call(x *exchange, name, out string) *exec.Cmd {
	host, port := x.hostPort()
	number, err := strconv.Atoi(port)
	if err != nil {
		x.t.Fatal(err)
	}
	// The result of VDI.get_nbd_info: with a certificate the client uses TLS.
	settings := map[string]any{"address": host, "port": number, "exportname": x.name}
	if x.secure {
		settings["cert"] = x.w.certificate
	}
	input, err := json.Marshal(map[string]any{
		"what": name, "settings": settings, "out": out, "connections": xoConnections, "waitBeforeReconnect": p.wait,
	})
	if err != nil {
		x.t.Fatal(err)
	}
	cmd := x.command("node", filepath.Join(p.dir, "xo.mjs"))
	cmd.Stdin = bytes.NewReader(append(input, '\n'))
	return cmd
}

func (p xoClient) pull(name string) copying {
	return func(x *exchange, out string) *exec.Cmd { return p.call(x, name, out) }
}

// The client runs nbdinfo for its map while it is connected.
func (p xoClient) getMap(x *exchange) {
	out := x.run(p.call(x, "map", ""))
	var got struct {
		Size    int
		Extents json.RawMessage
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		x.t.Fatalf("%v in %s", err, out)
	}
	if got.Size != len(x.content) {
		x.t.Errorf("size: got %d, want %d", got.Size, len(x.content))
	}
	x.wantMap(string(got.Extents))
}

// reconnects breaks connections during a copy, with unanswered requests in flight: the client
// reconnects and gets the rest, all from the same VBD.
func (p xoClient) reconnects(then atLimit) action {
	return func(x *exchange) {
		r := x.join(&relay{})
		out := x.file("disk")
		cmd := p.call(x, "paused", out)
		input := cmd.Stdin
		cmd.Stdin = nil
		stdin, err := cmd.StdinPipe()
		if err != nil {
			x.t.Fatal(err)
		}
		// The end of its input makes it go on.
		stdout := &watcher{text: "middle\n", seen: func() {
			r.arm(then)
			stdin.Close()
		}}
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = stdout, &stderr
		if err := cmd.Start(); err != nil {
			x.t.Fatal(err)
		}
		_, err = io.Copy(stdin, input)
		if err := errors.Join(err, cmd.Wait()); err != nil {
			x.t.Fatalf("node: %v\n%s%s", err, &stdout.got, &stderr)
		}
		x.wantFile(out, x.content)
		want := map[atLimit]int{cutOne: xoConnections + 1, cutAll: 2 * xoConnections}[then]
		if got := r.count(); got != want {
			x.t.Errorf("connections: got %d, want %d, those that came back included", got, want)
		}
		created := 0
		for _, e := range x.w.host.Events() {
			if e.Change == "created" {
				created++
			}
		}
		if created != 1 {
			x.t.Errorf("VBDs: got %d, want 1", created)
		}
	}
}

// watcher calls seen once, when a text has been written to it.
type watcher struct {
	text string
	seen func()
	got  bytes.Buffer
}

func (w *watcher) Write(b []byte) (int, error) {
	before := strings.Contains(w.got.String(), w.text)
	n, err := w.got.Write(b)
	if !before && strings.Contains(w.got.String(), w.text) {
		w.seen()
	}
	return n, err
}
