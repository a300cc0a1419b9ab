package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// peer runs a foreign client, which must succeed, and returns its output.
func peer(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), requires.Tool(t, name), args...)
	cmd.Dir = t.TempDir() // fio leaves files
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out.String(), errOut.String())
	}
	return out.String()
}

// serveSparse serves a writable file whose second MiB is a hole, and returns
// its URI and path.
func serveSparse(t *testing.T) (uri, file string) {
	t.Helper()
	const mib = 1 << 20
	data := append(append(content(mib), make([]byte, mib)...), content(mib)...)
	file = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{0, 2 * mib} {
		if _, err := f.WriteAt(data[off:off+mib], off); err != nil {
			t.Fatal(err)
		}
	}
	return "nbd://" + startServe(t, "--listen=127.0.0.1:0", "--writable", "--export=disk", file).addr + "/disk", file
}

// Foreign clients see the holes of a file, and read it right.
func TestPeersReadSparse(t *testing.T) {
	uri, file := serveSparse(t)
	want := readFile(t, file)
	got := strings.Join(strings.Fields(peer(t, "nbdinfo", "--json", "--map", uri)), "")
	if n := strings.Count(got, `"description":"hole,zero"`); n != 1 || !strings.Contains(got, `"offset":1048576,"length":1048576,"type":3`) {
		t.Errorf("nbdinfo --map: %s", got)
	}
	got = peer(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)
	if !strings.Contains(got, `"start": 1048576, "length": 1048576, "depth": 0, "present": true, "zero": true, "data": false`) {
		t.Errorf("qemu-img map: %s", got)
	}
	out := filepath.Join(t.TempDir(), "out")
	peer(t, "nbdcopy", uri, out)
	sameBytes(t, "nbdcopy", readFile(t, out), want)
	peer(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
	sameBytes(t, "qemu-img", readFile(t, out), want)
	if got := peer(t, "nbdinfo", "--list", strings.TrimSuffix(uri, "disk")); !strings.Contains(got, `export="disk"`) {
		t.Errorf("nbdinfo --list: %s", got)
	}
}

// Foreign clients write, and the file then has their data.
func TestPeersWrite(t *testing.T) {
	src := writeFile(t, "src", append(content(2<<20), make([]byte, 1<<20)...))
	want := readFile(t, src)

	uri, file := serveSparse(t)
	peer(t, "nbdcopy", src, uri)
	sameBytes(t, "nbdcopy", readFile(t, file), want)

	uri, file = serveSparse(t)
	peer(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", src, uri)
	sameBytes(t, "qemu-img", readFile(t, file), want)

	uri, file = serveSparse(t)
	peer(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 512 1024", "-c", "write -f -P 0x5b 4096 4096",
		"-c", "write -z 65536 65536", "-c", "discard 1M 64k", "-c", "flush", "-c", "read -P 0x5a 512 1024", uri)
	got := readFile(t, file)
	if !bytes.Equal(got[512:1536], bytes.Repeat([]byte{0x5a}, 1024)) || !bytes.Equal(got[4096:8192], bytes.Repeat([]byte{0x5b}, 4096)) ||
		!bytes.Equal(got[65536:131072], make([]byte, 65536)) {
		t.Error("qemu-io: the file does not have the written data")
	}
}

// fio writes at random, many requests at a time, and verifies its reads. One
// block size: with two its verification fails against nbdkit's memory as well.
func TestPeersFio(t *testing.T) {
	uri, _ := serveSparse(t)
	peer(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--bs=16k", "--size=3m",
		"--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--randseed=1")
}
