package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

// documentedCommand is a command of a document, with the output that follows it.
var documentedCommand = regexp.MustCompile(`(?m)^    \$ (.*)\n((?:    [^$\n].*\n)*)`)

// TestDocumentOfMirror runs the commands of the document, while a client writes.
func TestDocumentOfMirror(t *testing.T) {
	page := string(readFile(t, "../../docs/examples/mirror.md"))
	commands := documentedCommand.FindAllStringSubmatch(page, -1)
	if len(commands) != 5 {
		t.Fatalf("the document has %d commands", len(commands))
	}
	dir := shortDir(t)
	script := "#!/bin/sh\n" + toolEnv + "=1 exec '" + os.Args[0] + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "nbd-tool"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	disk := content(mirrorSize)
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("old.img"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var writing sync.WaitGroup
	var conn *client.Conn
	end := sync.OnceFunc(func() {
		close(done)
		writing.Wait()
		if conn != nil {
			conn.Close()
		}
	})
	defer end()
	var ended func()
	for i, c := range commands {
		if i == len(commands)-1 { // the client has connected to the new disk
			end()
			ended = watchControl(t, path("mirror.ctl"))
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-c", c[1])
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		out, err := cmd.Output()
		if err != nil || c[2] != "" && string(out) != strings.ReplaceAll(c[2], "    ", "") {
			t.Fatalf("%s: %v, %q, want %q", c[1], err, out, c[2])
		}
		if i == 0 {
			m := &mirrorRun{served: &served{addr: "unix:" + path("disk.sock")}, t: t}
			m.connect()
			conn = m.conn
			writing.Go(func() {
				for seed := uint64(1); ; seed++ {
					select {
					case <-done:
						return
					default:
					}
					p := nbdtest.Bytes(4096, int64(seed), seed)
					off := int(seed*37) % (mirrorSize / 512) * 512
					p = p[:min(4096, mirrorSize-off)]
					if err := conn.Write(t.Context(), p, int64(off), false); err != nil {
						t.Error(err)
						return
					}
					copy(disk[off:], p)
				}
			})
		}
	}
	ended()
	sameBytes(t, "the new disk", readFile(t, path("new.img")), disk)
	left, err := filepath.Glob(path("*"))
	if err != nil || strings.Join(left, " ") != strings.Join([]string{path("mirror.state"), path("nbd-tool"), path("new.img"), path("old.img")}, " ") {
		t.Errorf("left: %q, %v", left, err)
	}
}

// TestDocumentedStatus: the document explains every field of the status, and no others.
func TestDocumentedStatus(t *testing.T) {
	page := string(readFile(t, "../../docs/examples/mirror.md"))
	documented := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (`[a-z_`, ]+`) \\|").FindAllStringSubmatch(page, -1) {
		for field := range strings.SplitSeq(row[1], ", ") {
			documented[strings.Trim(field, "`")] = true
		}
	}
	text, err := json.Marshal(control.Status{})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	if len(fields) != reflect.TypeFor[control.Status]().NumField() {
		t.Errorf("%d fields are printed always", len(fields))
	}
	for field := range fields {
		if !documented[field] {
			t.Errorf("%s is not documented", field)
		}
		delete(documented, field)
	}
	delete(documented, "cancel") // a row of another table
	for field := range documented {
		t.Errorf("%s is documented and does not exist", field)
	}
}
