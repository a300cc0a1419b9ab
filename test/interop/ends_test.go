package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/nbd/client"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// TestEnds records what clients do when the service ends their connections in the middle of
// a copy: each client, each kind of end, in the clear and with TLS. Its lines
// "end: client/mode/kind of end: behaviour" become a table, see report.
//
// A client that goes on must have a complete copy. No client may hang or die of an unhandled
// exception where another end of the connection would avoid it.
func TestEnds(t *testing.T) {
	if os.Getenv("INTEROP_XO") != "1" {
		t.Skip("INTEROP_XO=1 is not set: it takes long, and installs packages from the npm registry (make interop-ends)")
	}
	clients := endClients(t)
	content := randomBytes(3, endsDiskSize)
	for _, kind := range endKinds {
		t.Run(kind.name, func(t *testing.T) {
			for _, c := range clients {
				for _, secure := range []bool{false, true} {
					runMode := map[bool]string{false: "clear", true: "TLS"}[secure]
					t.Run(c.name+"/"+runMode, func(t *testing.T) {
						got := "n/a"
						if kind.command(c) != nil {
							w := newWorldOf(t, kind.hostConfig(t), append(kind.settings, `rate_limit_vdi = "40 MiB"`, `linger = "10s"`)...)
							vdi := w.addVDI(t, content)
							x := newExchange(t, w, mode{secure: secure}, vdi, content)
							r := &endRun{exchange: x, vdi: vdi, out: x.file("disk")}
							got = r.behaviour(kind, c)
							if want := kind.wants(c); want != "" && !strings.HasPrefix(got, want) {
								t.Errorf("got %q, want %q; the service said:\n%s", got, want, w.service.log())
							}
						}
						t.Logf("end: %s/%s/%s: %s", c.name, runMode, kind.name, got)
					})
				}
			}
		})
	}
}

// endsDiskSize is larger than what any of the clients asks for at one time.
const endsDiskSize = 128 << 20

// The behaviours of clients, which a message may follow.
const (
	goesOn = "goes on"
	failed = "fails"
	died   = "the process dies"
	hung   = "hangs"
)

// endKind is a way in which connections end.
type endKind struct {
	name     string
	settings []string             // of the service
	devices  bool                 // it needs devices that can be unplugged
	before   func(r *endRun)      // called before the client starts; may be nil
	end      func(r *endRun)      // called in the middle of the copy; may be nil
	idle     bool                 // the client pauses in the middle, until the end has come
	goOn     func(endClient) bool // the clients that have to go on
	// harms are the names of the clients that may hang or die: nothing can be done for them.
	harms []string
}

func all(endClient) bool                    { return true }
func none(endClient) bool                   { return false }
func reconnecting(c endClient) bool         { return c.reconnects }
func afterAnyError(c endClient) bool        { return c.reconnects && c.retriesErrors }
func (k *endKind) mayHarm(c endClient) bool { return slices.Contains(k.harms, c.name) }

// command returns the client's command for the copy, nil if the client cannot do it.
func (k *endKind) command(c endClient) copying {
	if k.idle {
		return c.paused
	}
	return c.copy
}

// hostConfig returns the configuration of the simulated host.
func (k *endKind) hostConfig(t *testing.T) xapitest.Config {
	if !k.devices {
		return xapitest.Config{Style: xapitest.StyleSM}
	}
	requires.LoopDevices(t)
	return xapitest.Config{Style: xapitest.StyleNBD, Loop: true}
}

// wants returns how the behaviour must begin, "" if it may be anything but harm.
func (k *endKind) wants(c endClient) string {
	if k.goOn(c) {
		return goesOn
	}
	return ""
}

var endKinds = []*endKind{
	{name: "stop", end: func(r *endRun) {
		r.w.service.stop()
		r.w.start(r.t, r.addr)
	}, goOn: reconnecting},
	{name: "disconnect", end: func(r *endRun) { r.status("--disconnect=" + r.vdi) }, goOn: reconnecting},
	{name: "drain", end: func(r *endRun) { r.status("--drain") }, goOn: all},
	{name: "session logged out", settings: []string{`session_recheck = "1s"`}, end: func(r *endRun) {
		_, ref, _ := strings.Cut(r.name, "session_id=")
		r.w.host.ExpireSession(ref)
	}, goOn: none},
	{name: "device lost", devices: true, end: func(r *endRun) {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		if err := r.w.host.UnplugVBD(ctx, r.w.host.VBDs()[0].UUID); err != nil {
			r.t.Error(err)
		}
	}, goOn: afterAnyError},
	{name: "idle_timeout", settings: []string{`idle_timeout = "2s"`}, end: (*endRun).untilClosed, idle: true, goOn: reconnecting},
	{name: "max_connections", settings: []string{"max_connections = 1"}, before: (*endRun).takePlace, goOn: none},
	{name: "crash (kill -9)", end: func(r *endRun) {
		r.w.service.kill()
		r.w.start(r.t, r.addr)
	}, goOn: none, harms: []string{xo35, xo36}},
}

// endRun is one copy by one client, whose connections end.
type endRun struct {
	*exchange
	vdi, out string
}

// patience is how long a client may take after the end until it counts as hanging. Clients
// that are refused try again for some time.
const patience = time.Minute

// behaviour runs the client and returns what it did.
func (r *endRun) behaviour(kind *endKind, c endClient) string {
	if kind.before != nil {
		kind.before(r)
	}
	cmd := kind.command(c)(r.exchange, r.out)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	input, err := r.start(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if kind.end != nil {
		r.untilMiddle(ended, &out)
		kind.end(r)
	}
	input()
	select {
	case err = <-ended:
	case <-time.After(patience):
		_ = killGroup(cmd)
		<-ended
		if !kind.mayHarm(c) {
			r.t.Errorf("hangs, but need not:\n%s", &out)
		}
		return hung
	}
	if err == nil {
		r.wantFile(r.out, r.content)
		return goesOn
	}
	if unhandled.Match(out.Bytes()) {
		if !kind.mayHarm(c) {
			r.t.Errorf("dies, but need not:\n%s", &out)
		}
		return died + ": " + r.message(out.String())
	}
	return failed + ": " + r.message(out.String())
}

// start starts a command. The function that it returns ends the input of the command.
func (r *endRun) start(cmd *exec.Cmd) (endInput func(), err error) {
	given := cmd.Stdin
	cmd.Stdin = nil
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if given != nil {
		var text bytes.Buffer
		if _, err := text.ReadFrom(given); err != nil {
			return nil, err
		}
		if _, err := input.Write(text.Bytes()); err != nil {
			return nil, err
		}
	}
	return func() { input.Close() }, nil
}

// untilMiddle waits until the client has read a part of the disk. It must not end before.
func (r *endRun) untilMiddle(ended <-chan error, out fmt.Stringer) {
	r.t.Helper()
	eventually(r.t, func() (bool, string) {
		select {
		case err := <-ended:
			r.t.Fatalf("the client ended before the middle: %v\n%s", err, out)
		default:
		}
		var report struct {
			Connections []struct {
				Bytes int64 `json:"bytes"`
			} `json:"connections"`
		}
		text := r.status("--json")
		if err := json.Unmarshal([]byte(text), &report); err != nil {
			r.t.Fatal(err)
		}
		var sum int64
		for _, c := range report.Connections {
			sum += c.Bytes
		}
		return sum >= endsDiskSize/8, "not in the middle: " + text
	})
}

// untilClosed waits until the service has closed the connections of a client that pauses.
func (r *endRun) untilClosed() {
	r.t.Helper()
	connections := strings.Count(r.w.service.log(), `msg="transmission begins"`)
	left := len(r.w.service.open("socket:")) - connections
	eventually(r.t, func() (bool, string) {
		sockets := len(r.w.service.open("socket:"))
		return sockets <= left, fmt.Sprintf("sockets of the service: %d, want %d", sockets, left)
	})
}

// takePlace holds a connection until the end of the test.
func (r *endRun) takePlace() {
	r.t.Helper()
	c, err := client.Dial(r.t.Context(), "tcp", r.addr, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	conn, err := c.Go(r.t.Context(), r.name)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
}

// status runs xapi-nbd status with the service's control socket.
func (r *endRun) status(args ...string) string {
	r.t.Helper()
	path, err := program()
	if err != nil {
		r.t.Fatal(err)
	}
	out, err := exec.Command(path, append([]string{"status", "--state-dir=" + r.w.stateDir(), "--config=" + os.DevNull}, args...)...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("status %q: %v\n%s", args, err, out)
	}
	return string(out)
}
