package demo

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/service"
)

// serveOn prints commands for another terminal and serves until a signal.
func (w *world) serveOn(ctx context.Context) error {
	w.host.SetPurposes(w.network, "insecure_nbd")
	select {
	case <-time.After(service.PurposeTTL): // the service asks again for the purpose
	case <-ctx.Done():
		return nil
	}
	w.say("\nStill serving; the network's purpose is insecure_nbd now, so clients without TLS are\nserved too. In another terminal:\n")
	for _, command := range w.commands() {
		w.say("  %s", command)
	}
	w.say("\nCtrl-C ends it.")
	<-ctx.Done()
	return nil
}

// commands are lines for a shell. They make files in its current directory.
func (w *world) commands() []string {
	first, second := w.clearURI(w.first), w.clearURI(w.second)
	port := w.service.Addrs()[0].(*net.TCPAddr).Port
	changed := fmt.Sprintf("driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=%d,export=%s,x-dirty-bitmap=%s%s",
		port, w.exportName(w.second), service.UnchangedBlocks, w.first)
	secure := fmt.Sprintf("nbds://localhost:%d%s?tls-certificates=%s", port, w.uriPath(w.first), w.trust.ClientDir)
	tool := nbdTool()
	return []string{
		"# What the service tells of an export, with TLS, and which blocks have data:",
		fmt.Sprintf("nbdinfo '%s'", secure),
		fmt.Sprintf("nbdinfo --map --totals '%s'", first),
		"# Which blocks have changed between the two snapshots (0: changed, 1: unchanged):",
		fmt.Sprintf("nbdinfo --map=%s%s '%s'", service.UnchangedBlocks, w.first, second),
		"# A full copy of the first snapshot, and an increment of the second one into it:",
		fmt.Sprintf("nbdcopy '%s' copy.img", first),
		fmt.Sprintf("%s copy --changed-since %s '%s' copy.img", tool, w.first, second),
		"# The same as a qcow2 image, and one on top of it with what has changed:",
		fmt.Sprintf("qemu-img convert -f raw -O qcow2 '%s' full.qcow2", first),
		fmt.Sprintf("qemu-img convert --image-opts '%s' -O qcow2 -B full.qcow2 -F qcow2 increment.qcow2", changed),
		"qemu-img compare -f raw -F qcow2 copy.img increment.qcow2",
	}
}

func (w *world) clearURI(vdi string) string {
	return fmt.Sprintf("nbd://%s%s", w.addr(), w.uriPath(vdi))
}

// uriPath is the path of a URI for the export of a VDI.
func (w *world) uriPath(vdi string) string {
	return "/" + strings.ReplaceAll(w.exportName(vdi), "?", "%3F")
}

// nbdTool is how a shell starts nbd-tool: by its path if it is beside this program, as
// after make.
func nbdTool() string {
	self, err := os.Executable()
	if err != nil {
		return "nbd-tool"
	}
	beside := filepath.Join(filepath.Dir(self), "nbd-tool")
	if _, err := os.Stat(beside); err != nil {
		return "nbd-tool"
	}
	return "'" + beside + "'"
}
