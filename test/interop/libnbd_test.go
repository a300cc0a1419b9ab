package interop

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
)

var nbdcopy = peer{
	name: "nbdcopy", programs: []string{"nbdcopy"},
	does: map[string]action{
		wholeDisk:   copies(nbdcopyCopy),
		abruptDeath: dies(nbdcopyCopy),
	},
	cannot: map[string]string{
		randomReads: "copies disks as a whole",
		pastTheEnd:  knowsTheEnd,
	},
	lacks: map[mode]string{{secure: true, old: true}: asksWithGO},
}

// Several connections to one VDI, which the service allows.
func nbdcopyCopy(x *exchange, out string) *exec.Cmd {
	return x.command("nbdcopy", "--connections=4", "--threads=4", x.uri(), out)
}

var nbdinfo = peer{
	name: "nbdinfo", programs: []string{"nbdinfo"},
	does: map[string]action{
		"size and flags": nbdinfoSize,
	},
	also: map[mode]map[string]action{ // a relay that plays an old server knows neither
		{secure: false}: {"map": nbdinfoMap, "list": nbdinfoList},
		{secure: true}:  {"map": nbdinfoMap, "list": nbdinfoList},
	},
	cannot: map[string]string{
		wholeDisk:   "reads no data",
		randomReads: "reads no data",
		pastTheEnd:  "reads no data",
		abruptDeath: "reads no data, so it has no middle",
	},
	lacks: map[mode]string{{secure: true, old: true}: asksWithGO},
}

func nbdinfoSize(x *exchange) {
	got := x.run(x.command("nbdinfo", x.uri()))
	wants := []string{fmt.Sprintf("export-size: %d ", diskSize), "is_read_only: true", "can_multi_conn: true"}
	if !x.old {
		wants = append(wants, "block_size_minimum: 512\n", "using structured packets")
	}
	if x.secure {
		wants = append(wants, "with TLS")
	}
	for _, want := range wants {
		if !strings.Contains(got, want) {
			x.t.Errorf("nbdinfo does not print %q:\n%s", want, got)
		}
	}
}

// extent is a line of nbdinfo's map.
type extent struct {
	Offset, Length int64
	Type           int
}

// wantMap fails the test unless the map has no gap and all of it is data.
func (x *exchange) wantMap(text string) {
	x.t.Helper()
	var extents []extent
	if err := json.Unmarshal([]byte(text), &extents); err != nil {
		x.t.Fatalf("%v in %s", err, text)
	}
	end := int64(0)
	for _, e := range extents {
		if e.Offset != end || e.Type != 0 {
			x.t.Errorf("got %+v behind %d, want data there", e, end)
		}
		end = e.Offset + e.Length
	}
	if end != int64(len(x.content)) {
		x.t.Errorf("the map ends at %d, want %d", end, len(x.content))
	}
}

func nbdinfoMap(x *exchange) {
	x.wantMap(x.run(x.command("nbdinfo", "--json", "--map", x.uri())))
}

// The service does not list exports, because their names contain sessions.
func nbdinfoList(x *exchange) {
	x.name = ""
	if out := x.refused(x.command("nbdinfo", "--list", x.uri())); !strings.Contains(out, "server replied with error to list request") {
		x.t.Errorf("nbdinfo --list was refused in another way:\n%s", out)
	}
}

var nbdsh = peer{
	name: "nbdsh", programs: []string{"nbdsh"},
	does: map[string]action{
		wholeDisk:   copies(nbdshCopy),
		randomReads: nbdshRandom,
		pastTheEnd:  nbdshPastTheEnd,
		abruptDeath: dies(nbdshCopy),
	},
	also: map[mode]map[string]action{
		{secure: false, old: true}: {"not fixed newstyle": nbdshNotFixed},
	},
	lacks: map[mode]string{{secure: true, old: true}: asksWithGO},
}

// script returns a command of nbdsh, which is Python with a handle h.
func (x *exchange) script(before, text string) *exec.Cmd {
	return x.command("nbdsh", "-c", "h.set_uri_allow_local_file(True)\n"+before, "-u", x.uri(), "-c", text)
}

// readAhead keeps eight reads in flight and writes their data in order.
const readAhead = `
def read(spans, out):
    with open(out, "wb") as f:
        flying = []
        def land():
            buf, cookie = flying.pop(0)
            while not h.aio_command_completed(cookie):
                h.poll(-1)
            f.write(buf.to_bytearray())
        for offset, length in spans:
            buf = nbd.Buffer(length)
            flying.append((buf, h.aio_pread(buf, offset)))
            if len(flying) == 8:
                land()
        while flying:
            land()
`

func nbdshCopy(x *exchange, out string) *exec.Cmd {
	return x.script("", readAhead+fmt.Sprintf("read([(o, 262144) for o in range(0, h.get_size(), 262144)], %q)\nh.shutdown()\n", out))
}

func nbdshRandom(x *exchange) {
	out := x.file("spans")
	x.run(x.script("", readAhead+fmt.Sprintf("read(%s, %q)\nh.shutdown()\n", pythonSpans(), out)))
	x.wantSpans(out)
}

// pythonSpans returns the spans in Python's syntax.
func pythonSpans() string {
	var list []string
	for _, s := range spans {
		list = append(list, fmt.Sprintf("(%d, %d)", s.offset, s.length))
	}
	return "[" + strings.Join(list, ", ") + "]"
}

// libnbd can be told to send invalid requests: the service refuses them, and the connection
// goes on.
func nbdshPastTheEnd(x *exchange) {
	out := x.file("spans")
	x.run(x.script("", readAhead+fmt.Sprintf(`
import errno
h.set_strict_mode(0)
size = h.get_size()
for offset, length in [(size, 512), (size - 512, 1024), (1 << 62, 512), (size + 512, 65536)]:
    try:
        h.pread(length, offset)
        raise SystemExit("read at %%d: no error" %% offset)
    except nbd.Error as e:
        assert e.errnum == errno.EINVAL, "read at %%d: %%s" %% (offset, e)
read(%s, %q)
h.shutdown()
`, pythonSpans(), out)))
	x.wantSpans(out)
}

// Without fixed newstyle libnbd sends only EXPORT_NAME: no relay is needed, but TLS is
// impossible.
func nbdshNotFixed(x *exchange) {
	x.addr = x.w.service.addr
	out := x.file("spans")
	x.run(x.script("h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)\n",
		readAhead+fmt.Sprintf("read(%s, %q)\nh.shutdown()\n", pythonSpans(), out)))
	x.wantSpans(out)
}
