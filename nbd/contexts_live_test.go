package nbd_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/test/requires"
)

const (
	dirtyContext     = "qemu:dirty-bitmap:base"
	unchangedContext = "x-test:unchanged:base"
)

// tracked is a RAM device with two contexts for the same changed blocks: with the status of
// qemu:dirty-bitmap and with the opposite one, with which qemu-img copies them.
type tracked struct {
	*nbdtest.RAM
	changed []bool // by 64 KiB
}

const trackedUnit = 64 << 10

func (d tracked) Contexts() []string { return []string{dirtyContext, unchangedContext} }

func (d tracked) ContextExtents(name string, off, n int64) ([]wire.Extent, error) {
	var extents []wire.Extent
	for at := off; at < off+n; {
		end := (at/trackedUnit + 1) * trackedUnit
		var status uint64
		if d.changed[at/trackedUnit] == (name == dirtyContext) {
			status = 1
		}
		extents = append(extents, wire.Extent{Length: uint64(end - at), Status: status})
		at = end
	}
	return extents, nil
}

// run runs a program, which must succeed, and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), requires.Tool(t, name), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return string(out)
}

// TestContextsOfOtherPrograms: libnbd's nbdinfo shows the contexts of a device, and qemu-img
// makes an increment with the second one.
func TestContextsOfOtherPrograms(t *testing.T) {
	const blocks = 64
	base := bytes.Repeat([]byte("old!"), blocks*trackedUnit/4)
	now := bytes.Clone(base)
	changed := make([]bool, blocks)
	for _, b := range []int{3, 4, 40} {
		changed[b] = true
		copy(now[b*trackedUnit:], bytes.Repeat([]byte("new!"), trackedUnit/4))
	}
	clear(now[40*trackedUnit : 41*trackedUnit])
	s := &nbd.Server{Exporter: &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"disk": func() (nbd.Device, error) { return tracked{nbdtest.NewRAM(now), changed}, nil },
	}}}
	nc := nbdtest.Serve(t, s)()
	uri, host := "nbd://"+nc.RemoteAddr().String()+"/disk", nc.RemoteAddr().String()

	var info struct {
		Exports []struct{ Contexts []string }
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(info.Exports[0].Contexts, " "); got != "base:allocation "+dirtyContext+" "+unchangedContext {
		t.Errorf("nbdinfo lists %q", got)
	}
	for context, want := range map[string]string{dirtyContext: "dirty", unchangedContext: "0"} {
		var extents []struct {
			Offset, Length, Type int64
			Description          string
		}
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", "--map="+context, uri)), &extents); err != nil {
			t.Fatal(err)
		}
		changed := 0
		for _, e := range extents {
			if e.Description == want || e.Description == "" && e.Type == 0 {
				changed += int(e.Length)
			}
		}
		if changed != 3*trackedUnit {
			t.Errorf("%s: %d changed bytes in %v", context, changed, extents)
		}
	}

	dir := t.TempDir()
	full, increment := filepath.Join(dir, "full.raw"), filepath.Join(dir, "increment.qcow2")
	if err := os.WriteFile(full, base, 0o600); err != nil {
		t.Fatal(err)
	}
	addr := strings.SplitN(host, ":", 2)
	source := "driver=nbd,export=disk,server.type=inet,server.host=" + addr[0] + ",server.port=" + addr[1] + ",x-dirty-bitmap=" + unchangedContext
	run(t, "qemu-img", "convert", "--image-opts", source, "-O", "qcow2", "-B", full, "-F", "raw", increment)
	run(t, "qemu-img", "convert", "-O", "raw", increment, full+".new")
	got, err := os.ReadFile(full + ".new")
	if err != nil || !bytes.Equal(got, now) {
		t.Errorf("the increment on the full copy is not the disk (%v)", err)
	}
	if info, err := os.Stat(increment); err != nil || info.Size() > 1<<20 {
		t.Errorf("the increment has %d bytes (%v), want little more than 192 KiB", info.Size(), err)
	}
}
