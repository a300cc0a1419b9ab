package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// The tools that people use, against the running service, on real block devices
// that hold a real file system.
func TestPullFromLoopDevices(t *testing.T) {
	requires.LoopDevices(t)
	for _, tool := range []string{"qemu-img", "nbdcopy", "nbdinfo", "mke2fs", "e2fsck"} {
		requires.Tool(t, tool)
	}
	for i, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("%d-byte sectors", sector), func(t *testing.T) {
			style := []xapitest.DeviceStyle{xapitest.StyleSM, xapitest.StyleNBD}[i]
			w := newWorld(t, xapitest.Config{Loop: true, Style: style})
			image := makeExt4(t)
			vdi := w.addVDI(image, xapitest.VDISpec{SectorSize: sector})
			p := w.start()
			for _, secure := range []bool{false, true} {
				t.Run(map[bool]string{false: "clear", true: "TLS"}[secure], func(t *testing.T) {
					w.pullWithTools(t, p, vdi, secure, sector, image)
				})
			}
			if code := p.stop(patience); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
		})
	}
}

// The same bytes past the page cache, from sectors of both sizes: those of 4096
// bytes are more than the memory of replies is aligned to.
func TestPullPastThePageCache(t *testing.T) {
	requires.LoopDevices(t)
	requires.Tool(t, "nbdcopy")
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("%d-byte sectors", sector), func(t *testing.T) {
			w := newWorld(t, xapitest.Config{Loop: true})
			image := random(1, 8<<20+4096)
			vdi := w.addVDI(image, xapitest.VDISpec{SectorSize: sector})
			p := w.start("--config=" + w.file("direct.toml", "direct_io = true"))
			for _, size := range []string{"65536", "2097152"} {
				out := filepath.Join(t.TempDir(), "copy")
				tool(t, "nbdcopy", "--request-size="+size, w.uri(p, w.export(vdi), false), out)
				wantFile(t, out, image)
				w.waitClean(p)
			}
			if log := p.output(); strings.Contains(log, "past the page cache") {
				t.Errorf("the device was read through the page cache:\n%s", log)
			}
		})
	}
}

// makeExt4 makes a file system with some files in it.
func makeExt4(t *testing.T) []byte {
	t.Helper()
	files := t.TempDir()
	for i := range 5 {
		if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("file%d", i)), random(uint64(i+1), (i+1)<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "ext4")
	tool(t, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", files, image, "48M")
	data, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// pullWithTools copies the disk with each tool and compares.
func (w *world) pullWithTools(t *testing.T, p *process, vdi string, secure bool, sector int, image []byte) {
	name := w.export(vdi)
	uri := w.uri(p, name, secure)
	info := tool(t, "nbdinfo", uri)
	if want := fmt.Sprintf("block_size_minimum: %d\n", sector); !strings.Contains(info, want) {
		t.Errorf("nbdinfo does not print %q:\n%s", want, info)
	}
	w.waitClean(p)

	out := filepath.Join(t.TempDir(), "copy")
	tool(t, "nbdcopy", uri, out)
	wantFile(t, out, image)
	tool(t, "e2fsck", "-fn", out)
	w.waitClean(p)

	out = filepath.Join(t.TempDir(), "copy")
	if !secure {
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
	} else {
		_, port, _ := net.SplitHostPort(p.addr)
		tool(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+w.trust.ClientDir,
			"--image-opts", "driver=nbd,server.type=inet,server.host=localhost,server.port="+port+",export="+name+",tls-creds=tls0",
			"-O", "raw", out)
	}
	wantFile(t, out, image)
	tool(t, "e2fsck", "-fn", out)
	w.waitClean(p)
}

// uri is how libnbd and qemu want the export: two slashes, the question mark
// encoded.
func (w *world) uri(p *process, name string, secure bool) string {
	_, port, _ := net.SplitHostPort(p.addr)
	path := "/" + strings.ReplaceAll(name, "?", "%3F")
	if secure {
		return "nbds://localhost:" + port + path + "?tls-certificates=" + w.trust.ClientDir
	}
	return "nbd://127.0.0.1:" + port + path
}

// tool runs a program and returns its standard output.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), requires.Tool(t, name), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", name, err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

func wantFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the copy differs: %d bytes, SHA-256 %x, want %d bytes, %x", len(got), sha256.Sum256(got), len(want), sha256.Sum256(want))
	}
}

// Without root the simulated host plugs files; that is what the demo and most
// other tests run on. Sizes that are no multiple of a sector are served to the
// last byte.
func TestPullFromFiles(t *testing.T) {
	for _, size := range []int{1 << 20, 1<<20 + 512, 1<<20 + 1, 3} {
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, TLS %v", size, secure), func(t *testing.T) {
				w := newWorld(t, xapitest.Config{})
				image := random(uint64(size), size)
				vdi := w.addVDI(image, xapitest.VDISpec{})
				p := w.start()
				conn, err := w.open(p, w.export(vdi), secure)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, conn.Size())
				if _, err := conn.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
					t.Errorf("got %d bytes (%v), want the %d of the image", len(got), err, len(image))
				}
				wantMin := uint32(512)
				if size%512 != 0 {
					wantMin = 1
				}
				if got := conn.Info().BlockSizes.Min; got != wantMin {
					t.Errorf("minimum block size: got %d, want %d", got, wantMin)
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
				w.waitClean(p)
			})
		}
	}
}

// A loop device would drop the tail of such a file, so the simulated host
// refuses to plug it, and the client hears why.
func TestOddSizeIsNotPluggedAsLoop(t *testing.T) {
	requires.LoopDevices(t)
	w := newWorld(t, xapitest.Config{Loop: true})
	vdi := w.addVDI(random(1, 1<<20+1), xapitest.VDISpec{})
	p := w.start()
	if _, err := w.open(p, w.export(vdi), false); err == nil || !strings.Contains(err.Error(), "SR_BACKEND_FAILURE") {
		t.Errorf("got %v, want xapi's refusal", err)
	}
	w.waitClean(p)
}

// Xen Orchestra's client wants 134 bytes and reads them with one call.
func TestExportNameAnswerIsOneSegment(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	conn, answer := w.exportName(p, w.export(vdi))
	want := append([]byte{0, 0, 0, 0, 0, 0x10, 0, 0, 1, 3}, make([]byte, 124)...)
	if !bytes.Equal(answer, want) {
		t.Errorf("got %d bytes %x, want 134 bytes %x", len(answer), answer, want)
	}
	conn.Close()
	w.waitClean(p)
}
