package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/cmd/internal/sampledisk"
	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/nbd/client"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// The commands and programs of docs/examples run with a simulated host, and print the
// documented output.

// documentedCommand is a command of a document, with its documented output.
type documentedCommand struct{ line, output string }

var (
	indentedBlock = regexp.MustCompile(`(?m)(?:^    .*\n)+`)
	pythonBlock   = regexp.MustCompile("(?s)```python\n# (\\w+\\.py)\n.*?```")
	anyUUID       = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
)

// documentedCommands returns the commands of a document: the indented lines that begin with a
// dollar sign, and their continuation lines. The lines up to the next command are the output.
func documentedCommands(text string) (commands []documentedCommand) {
	for _, block := range indentedBlock.FindAllString(text, -1) {
		inCommand, known := false, false
		for line := range strings.Lines(block) {
			line = strings.TrimPrefix(line, "    ")
			command, begins := strings.CutPrefix(line, "$ ")
			switch {
			case begins:
				commands, known = append(commands, documentedCommand{line: command}), true
			case inCommand:
				commands[len(commands)-1].line += line
			case known:
				commands[len(commands)-1].output += line
			}
			inCommand = (begins || inCommand) && strings.HasSuffix(line, "\\\n")
		}
	}
	return commands
}

// documentRun is the environment in which the commands of a document run.
type documentRun struct {
	*world
	p             *process
	disk          string // uuid
	first, second string // uuids of its snapshots
	content       map[string][]byte
	dir           string
	env           []string
}

// newDocumentRun makes a host with the sample disk, of which four blocks of 64 KiB have
// changed between two snapshots.
func newDocumentRun(t *testing.T) *documentRun {
	t.Helper()
	r := &documentRun{world: newWorld(t, xapitest.Config{Style: xapitest.StyleSM}), dir: t.TempDir(), content: map[string][]byte{}}
	sample, err := os.Create(filepath.Join(r.dir, "sample"))
	must(t, err)
	must(t, sampledisk.Write(sample, sampledisk.SampleSize, sampledisk.Sample()))
	must(t, sample.Truncate(sampledisk.SampleSize))
	r.disk, err = r.host.AddVDI(xapitest.VDISpec{Size: sampledisk.SampleSize, VHD: true, NameLabel: "sample disk"})
	must(t, err)
	block, zeroes := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < sampledisk.SampleSize; off += int64(len(block)) {
		_, err := sample.ReadAt(block, off)
		must(t, err)
		if !bytes.Equal(block, zeroes) {
			must(t, r.host.WriteVDI(r.disk, block, off))
		}
	}
	must(t, sample.Close())
	must(t, r.host.EnableCBT(r.disk))
	r.first = r.snapshot()
	for i, block := range []int64{40, 41, 100, 900} {
		must(t, r.host.WriteVDI(r.disk, random(uint64(i), 64<<10), block*64<<10))
	}
	r.second = r.snapshot()
	r.p = r.start()
	r.setEnv()
	return r
}

// snapshot makes a snapshot of the disk.
func (r *documentRun) snapshot() (uuid string) {
	r.t.Helper()
	uuid, err := r.host.SnapshotVDI(r.disk)
	must(r.t, err)
	r.content[uuid], err = os.ReadFile(r.host.ImagePath(uuid))
	must(r.t, err)
	return uuid
}

// setEnv gives the commands the variables that the documents name, nbd-tool, and a module
// XenAPI for Python.
func (r *documentRun) setEnv() {
	bin := filepath.Join(r.dir, "bin")
	tool(r.t, "go", "build", "-o", filepath.Join(bin, "nbd-tool"), "xapi-nbd/cmd/nbd-tool")
	module, err := os.ReadFile("testdata/XenAPI.py")
	must(r.t, err)
	must(r.t, os.WriteFile(filepath.Join(bin, "XenAPI.py"), module, 0o644))
	_, port, _ := net.SplitHostPort(r.p.addr)
	hosts, err := json.Marshal(map[string]any{"https://POOL-MASTER": map[string]any{
		"socket": r.host.Socket(), "address": "127.0.0.1", "port": port, "certificate": "",
		"sessions": r.file("logins", r.session(xapitest.RoleVMAdmin)),
	}})
	must(r.t, err)
	first, second := r.export(r.first), r.export(r.second)
	r.env = append(os.Environ(),
		"PATH="+bin+":/usr/bin:/bin:"+os.Getenv("PATH"), // the python3 of nbdsh has libnbd's module
		"PYTHONPATH="+bin,
		"XAPI_HOSTS="+string(hosts), "ADDRESS=127.0.0.1", "PORT="+port, "TRUST="+r.trust.ClientDir,
		"DISK="+r.disk, "BASE="+r.first, "EXPORT="+second,
		"FIRST="+r.uri(r.p, first, false), "SECOND="+r.uri(r.p, second, false),
		"CLEAR="+r.uri(r.p, first, false), "SECURE="+r.uri(r.p, first, true))
}

// run runs the commands of a document, one after the other, and after each waits until
// the VDI is detached.
func (r *documentRun) run(t *testing.T, name string) (text string) {
	t.Helper()
	text = document(t, filepath.Join("examples", name))
	for _, found := range pythonBlock.FindAllStringSubmatch(text, -1) {
		program := strings.TrimSuffix(strings.TrimPrefix(found[0], "```python\n"), "```")
		must(t, os.WriteFile(filepath.Join(r.dir, found[1]), []byte(program), 0o644))
	}
	commands := documentedCommands(text)
	if len(commands) < 2 {
		t.Fatalf("%s has %d commands", name, len(commands))
	}
	for _, c := range commands {
		if got, want := r.sh(t, c.line), anyUUID.ReplaceAllString(c.output, "UUID"); got != want {
			t.Errorf("%s: %s\ngot:\n%s\nwant:\n%s", name, c.line, got, want)
		}
	}
	return text
}

// sh runs a line of a shell and returns its standard output, with "UUID" instead of UUIDs,
// which differ each time, and with blanks instead of tabs, as in the documents.
func (r *documentRun) sh(t *testing.T, line string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-o", "pipefail", "-c", line)
	cmd.Dir, cmd.Env = r.dir, r.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%s: %v\n%s%s", line, err, out, stderr.Bytes())
	}
	r.waitClean(r.p)
	return anyUUID.ReplaceAllString(strings.ReplaceAll(string(out), "\t", "    "), "UUID")
}

func (r *documentRun) wantCopies(t *testing.T, want []byte, names ...string) {
	t.Helper()
	for _, name := range names {
		path := filepath.Join(r.dir, name)
		if strings.HasSuffix(name, ".qcow2") {
			path += ".raw"
			tool(t, "qemu-img", "convert", "-O", "raw", filepath.Join(r.dir, name), path)
		}
		wantFile(t, path, want)
	}
}

func requireDocumentTools(t *testing.T) {
	t.Helper()
	for _, name := range []string{"qemu-img", "nbdcopy", "nbdinfo", "nbdsh"} {
		requires.Tool(t, name)
	}
}

func TestDocumentsOfFullCopies(t *testing.T) {
	requireDocumentTools(t)
	r := newDocumentRun(t)
	r.env = append(r.env, "EXPORT="+r.export(r.first))
	r.run(t, "nbdcopy.md")
	r.run(t, "qemu-img.md")
	r.wantCopies(t, r.content[r.first], "disk1.img", "disk2.img", "disk3.img", "disk.qcow2", "disk2.qcow2")
}

func TestDocumentOfIncrements(t *testing.T) {
	requireDocumentTools(t)
	r := newDocumentRun(t)
	text := r.run(t, "incremental.md")
	r.wantCopies(t, r.content[r.first], "full.img", "full.qcow2")
	r.wantCopies(t, r.content[r.second], "disk.img", "increment.qcow2", "libnbd.img", "xapi.img")
	r.wantReasons(t, text)
}

// wantReasons requires that the document has the errors of the log, each in a row of its
// table.
func (r *documentRun) wantReasons(t *testing.T, text string) {
	t.Helper()
	other, err := r.host.AddVDI(xapitest.VDISpec{Size: 2 << 20, VHD: true})
	must(t, err)
	openSince := func(base string) *client.Conn {
		return r.openAs(r.p, false, false, r.export(r.second), service.UnchangedBlocks+base)
	}
	for _, base := range []string{r.second, other, "d5ab7a1c-7e2c-4f3b-8d55-8a9f8e2a1b11"} {
		must(t, openSince(base).Close())
		r.waitClean(r.p)
	}
	conn := openSince(r.first)
	must(t, errors.Join(openSince(other).Close(), conn.Close()))
	r.waitClean(r.p)
	logged := regexp.MustCompile(`changed blocks are not known.*`).FindAllString(r.p.output(), -1)
	if len(logged) != 4 {
		t.Errorf("logged: %q, want 4 lines", logged)
	}
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)`.*\\|.*\\|.*\\|$").FindAllStringSubmatch(text, -1)
	for _, line := range logged {
		if !slices.ContainsFunc(rows, func(row []string) bool { return strings.Contains(line, row[1]) }) {
			t.Errorf("no row of the document has the error of %s", line)
		}
	}
}

// TestConvertWithDirtyBitmapIsWrong: the documents warn of this command, as its image is
// wrong. If the image becomes right the documents have to change.
func TestConvertWithDirtyBitmapIsWrong(t *testing.T) {
	requireDocumentTools(t)
	r := newDocumentRun(t)
	r.sh(t, `qemu-img convert -f raw -O qcow2 "$FIRST" full.qcow2`)
	r.sh(t, `qemu-img convert -O qcow2 -B full.qcow2 -F qcow2 --image-opts "driver=nbd,server.type=inet,`+
		`server.host=$ADDRESS,server.port=$PORT,export=$EXPORT,x-dirty-bitmap=qemu:dirty-bitmap:$BASE" wrong.qcow2`)
	r.sh(t, `qemu-img convert -O raw wrong.qcow2 wrong.img`)
	wrong, err := os.ReadFile(filepath.Join(r.dir, "wrong.img"))
	must(t, err)
	if bytes.Equal(wrong, r.content[r.second]) {
		t.Error("qemu-img makes a right increment with qemu:dirty-bitmap")
	}
}
