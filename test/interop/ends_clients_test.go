package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/test/requires"
)

// endClient is a client of TestEnds.
type endClient struct {
	name string
	copy copying
	// paused is a copy that stops in the middle until its input ends, nil if there is none.
	paused copying
	// reconnects is true if the client connects again after the end of a connection.
	reconnects bool
	// retriesErrors is true if it does so after an error reply too.
	retriesErrors bool
}

// The names of clients that have special entries in endKinds.
const (
	xo35 = "Xen Orchestra 3.5.0"
	xo36 = "Xen Orchestra 3.6.0"
)

// endClients returns the clients of TestEnds that can be run here.
func endClients(t *testing.T) []endClient {
	t.Helper()
	for _, p := range []peer{nbdcopy, nbdsh, qemuImg} {
		requires.Tool(t, p.programs[0])
		p.logVersion(t, nil)
	}
	return append(xoEndClients(t),
		endClient{name: "nbdcopy", copy: nbdcopyCopy},
		endClient{name: "libnbd (nbdsh)", copy: nbdshCopy, paused: nbdshPaused},
		endClient{name: "qemu-img", copy: qemuImgEnds("")},
		endClient{name: "qemu-img, reconnect-delay=20", copy: qemuImgEnds(",reconnect-delay=20"), reconnects: true},
		endClient{name: "nbd-tool", copy: nbdToolCopy},
	)
}

// xoEndClients returns both versions of Xen Orchestra's client, which end in different ways.
// The registry may have only the newer one. If the cache does not have the older one either,
// a script acts like it.
func xoEndClients(t *testing.T) []endClient {
	requireNode(t)
	latest := xoClientPackage.install(t)
	older := xoClientPackage
	older.version = "3.5.0"
	dir, err := older.tryInstall(t)
	if err != nil {
		t.Logf("a script acts like version %s: %v", older.version, err)
		dir = imitation(t, older)
	}
	return []endClient{xoEndClient(xo35, dir), xoEndClient(xo36, latest)}
}

func xoEndClient(name, dir string) endClient {
	p := xoClient{dir, 1000} // its default
	return endClient{name: name, copy: p.pull("pull"), paused: p.pull("paused"), reconnects: true, retriesErrors: true}
}

// imitation returns a folder with the script of testdata that acts like a version of Xen
// Orchestra's client.
func imitation(t *testing.T, p npmPackage) (dir string) {
	t.Helper()
	dir = t.TempDir()
	module := filepath.Join(dir, "node_modules", filepath.FromSlash(p.name))
	text, err := os.ReadFile(filepath.Join("testdata", "xo-imitation.mjs"))
	if err == nil {
		err = os.MkdirAll(module, 0o755)
	}
	for _, name := range []string{"index.mjs", "multi.mjs"} {
		if err == nil {
			err = os.WriteFile(filepath.Join(module, name), text, 0o644)
		}
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(module, "package.json"), []byte(`{"main": "./index.mjs"}`), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.addScript(t, dir)
	return dir
}

// qemuImgEnds copies with further options of the block driver nbd.
func qemuImgEnds(options string) copying {
	return func(x *exchange, out string) *exec.Cmd {
		host, port := x.hostPort()
		source := "driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + port + ",export=" + x.name + options
		args := []string{"convert", "--image-opts", "-O", "raw"}
		if x.secure {
			args = append(args, "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+x.w.trust)
			source += ",tls-creds=tls0"
		}
		return x.command("qemu-img", append(args, source, out)...)
	}
}

// nbdshPaused stops in the middle until its input ends.
func nbdshPaused(x *exchange, out string) *exec.Cmd {
	return x.script("", `
import sys
with open("`+out+`", "wb") as f:
    for o in range(0, h.get_size(), 262144):
        if o == h.get_size() // 2:
            sys.stdin.read()
        f.write(h.pread(262144, o))
h.shutdown()
`)
}

// nbdTool builds nbd-tool once and returns its path.
var nbdTool = sync.OnceValues(func() (string, error) { return build("nbd-tool") })

func nbdToolCopy(x *exchange, out string) *exec.Cmd {
	path, err := nbdTool()
	if err != nil {
		x.t.Fatal(err)
	}
	return x.command(path, "copy", "--retry-for=20s", x.uri(), out)
}

// unhandled matches what Node prints when it ends the process because nothing handles an
// event.
var unhandled = regexp.MustCompile(`(?m)^\s*throw er;|Unhandled 'error' event`)

// jsError matches a line of Node with an error.
var jsError = regexp.MustCompile(`(?m)^(?:\[?\w*(?:Error|Exception)\b.*)$`)

// message returns the line of a client's output that says why it failed, without names that
// differ from run to run.
func (r *endRun) message(output string) string {
	lines := strings.FieldsFunc(output, func(c rune) bool { return c == '\n' || c == '\r' })
	text := ""
	for _, line := range lines {
		if strings.TrimSpace(line) != "" {
			text = strings.TrimSpace(line)
		}
	}
	if found := jsError.FindString(output); found != "" {
		text = found
	}
	host, port := r.hostPort()
	for _, name := range []struct{ from, to string }{
		{r.uri(), "URI"}, {r.name, "EXPORT"}, {strings.ReplaceAll(r.name, "?", "%3F"), "EXPORT"}, {r.out, "FILE"}, {r.w.dir, "DIR"},
		{host + ":" + port, "ADDRESS"}, {r.vdi, "VDI"},
	} {
		text = strings.ReplaceAll(text, name.from, name.to)
	}
	return longNumber.ReplaceAllString(text, "N")
}

// longNumber matches offsets.
var longNumber = regexp.MustCompile(`[0-9]{5,}`)
