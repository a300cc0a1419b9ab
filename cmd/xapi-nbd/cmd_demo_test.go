package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/cmd/internal/sampledisk"
	"xapi-nbd/test/requires"
)

// TestDemo runs the demo as README does, and checks its output.
func TestDemo(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"demo", "--once"}, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d\n%s%s", code, stdout.String(), stderr.String())
	}
	out := stdout.String()
	for want, times := range map[string]int{
		"They match.\n": 2,
		// The file system has files in 7 blocks of 2 MiB, and 4 blocks of 64 KiB change.
		"A full copy: 14680064 of 67108864 bytes read":                   1,
		"An increment into the same copy: 262144 of 67108864 bytes read": 1,
		"  created\n": 2, "  plugged\n": 2, "  unplugged\n": 2, "  destroyed\n": 2,
	} {
		if got := strings.Count(out, want); got != times {
			t.Errorf("the demo prints %q %d times, want %d:\n%s", want, got, times, out)
		}
	}
	if last := "\nVBDs left on the host: 0\n"; !strings.HasSuffix(out, last) {
		t.Errorf("the demo does not end with %q:\n%s", last, out)
	}
	if stderr.Len() != 0 {
		t.Errorf("on standard error: %q", stderr.String())
	}
}

// TestDemoCommands runs the commands that the demo prints for another terminal.
func TestDemoCommands(t *testing.T) {
	for _, name := range []string{"qemu-img", "nbdcopy", "nbdinfo"} {
		requires.Tool(t, name)
	}
	bin, dir := t.TempDir(), t.TempDir()
	tool(t, "go", "build", "-o", filepath.Join(bin, "nbd-tool"), "xapi-nbd/cmd/nbd-tool")
	t.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, printed := io.Pipe()
	var stderr bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"demo"}, printed, &stderr)
		printed.Close()
	}()
	commands, lines := "", bufio.NewScanner(stdout)
	for lines.Scan() && lines.Text() != "Ctrl-C ends it." {
		commands += lines.Text() + "\n"
	}
	go io.Copy(io.Discard, stdout)
	_, commands, _ = strings.Cut(commands, "In another terminal:\n")
	outputs := map[string]string{}
	for _, found := range regexp.MustCompile(`(?m)^  ([^#].*)$`).FindAllStringSubmatch(commands, -1) {
		cmd := exec.CommandContext(ctx, "sh", "-c", found[1])
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", found[1], err, out)
		}
		outputs[strings.Fields(found[1])[0]] += string(out)
	}
	for program, want := range map[string]string{
		"nbdinfo":  "x-xapi:unchanged:", // of the contexts of the export
		"qemu-img": "Images are identical.",
	} {
		if !strings.Contains(outputs[program], want) {
			t.Errorf("%s does not print %q:\n%s", program, want, outputs[program])
		}
	}
	for line, want := range map[string]string{"the map of blocks": `14680064 +\d+\.\d% +0 data`, "the map of changes": `(?m)^ *2621440 +131072 +0$`} {
		if !regexp.MustCompile(want).MatchString(outputs["nbdinfo"]) {
			t.Errorf("nbdinfo does not print %s, %s:\n%s", line, want, outputs["nbdinfo"])
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "copy.img")); err != nil || st.Size() != sampledisk.SampleSize {
		t.Errorf("the copy: got %v, %v, want %d bytes", st, err, sampledisk.SampleSize)
	}
	cancel()
	if code := <-ended; code != 0 || stderr.Len() != 0 {
		t.Errorf("exit code %d, on standard error %q", code, stderr.String())
	}
}
