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
)

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
	w.qemuImg(t, p, name, secure, out)
	wantFile(t, out, image)
	tool(t, "e2fsck", "-fn", out)
	w.waitClean(p)
}

// qemuImg copies an export to a file with qemu-img.
func (w *world) qemuImg(t *testing.T, p *process, name string, secure bool, out string) {
	t.Helper()
	if !secure {
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", w.uri(p, name, false), out)
		return
	}
	_, port, _ := net.SplitHostPort(p.addr)
	tool(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+w.trust.ClientDir,
		"--image-opts", "driver=nbd,server.type=inet,server.host=localhost,server.port="+port+",export="+name+",tls-creds=tls0",
		"-O", "raw", out)
}

// uri returns the URI of an export for libnbd and QEMU: with two slashes, and the question
// mark encoded.
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
