package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/test/requires"
)

// countingRAM counts writes, and reports each of a hundred.
type countingRAM struct {
	*nbdtest.RAM
	writes  *atomic.Int64
	hundred chan<- struct{}
}

func (c countingRAM) WriteAt(p []byte, off int64) (int, error) {
	if c.writes.Add(1)%100 == 0 {
		select {
		case c.hundred <- struct{}{}:
		default:
		}
	}
	return c.RAM.WriteAt(p, off)
}

// TestMirrorFio: fio writes, and verifies, through a mirror, and goes on on the old secondary
// after a pivot, in the middle of its requests. At the end both disks have what fio expects.
func TestMirrorFio(t *testing.T) {
	fio := requires.Tool(t, "fio")
	const size = 32 << 20
	primary := writeFile(t, "primary", make([]byte, size))
	ram := nbdtest.NewRAM(make([]byte, size))
	hundred := make(chan struct{}, 1)
	uri := serveOne(t, func() nbd.Device { return countingRAM{ram.Again(), new(atomic.Int64), hundred} })
	m := startMirror(t, make([]byte, size), primary, uri)
	first := []string{"--name=first", "--size=16m", "--bs=4k", "--rw=randwrite", "--randseed=1", "--verify=crc32c", "--verify_fatal=1"}
	second := []string{"--name=second", "--offset=16m", "--size=16m", "--bs=4k", "--rw=randwrite", "--randseed=2", "--verify=crc32c", "--verify_fatal=1"}
	through := []string{"--ioengine=nbd", "--uri=" + m.uri(), "--iodepth=8"}
	peer(t, "fio", append(first, through...)...) // while everything is copied

	// The second job is interrupted when it has written on both sides of the pivot.
	dir := t.TempDir()
	var output bytes.Buffer
	writer := exec.CommandContext(t.Context(), fio, append(append(second, through...), "--do_verify=0", "--rate_iops=1000")...)
	writer.Dir, writer.Stdout, writer.Stderr = dir, &output, &output
	wait := func() {
		t.Helper()
		for len(hundred) > 0 {
			<-hundred
		}
		for range 2 {
			<-hundred
		}
	}
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	m.command("wait") // since then the secondary gets all writes
	wait()
	m.command("complete", "--pivot", "--verify")
	before := readFile(t, primary)
	wait()
	if err := writer.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = writer.Wait() // an interrupted fio fails

	sameBytes(t, "primary since the pivot", readFile(t, primary), before)
	secondary := writeFile(t, "secondary", ram.Content())
	for _, disk := range []string{primary, secondary} {
		peer(t, "fio", append(first, "--ioengine=psync", "--filename="+disk, "--verify_only")...)
	}
	verify := exec.CommandContext(t.Context(), fio, append(second, "--ioengine=psync", "--filename="+secondary, "--verify_only", "--verify_state_load=1", "--output-format=json")...)
	verify.Dir = dir
	out, err := verify.CombinedOutput()
	var report struct {
		Jobs []struct {
			Read struct {
				Bytes int64 `json:"io_bytes"`
			}
		}
	}
	if jerr := json.Unmarshal(out, &report); err != nil || jerr != nil || report.Jobs[0].Read.Bytes == 0 {
		t.Fatalf("fio does not find its data on the secondary: %v, %v\n%s\n%s", err, jerr, out, output.String())
	}
	// What the second job wrote before the pivot is on the primary: a block differs from the
	// secondary only if it is still empty there.
	after := ram.Content()
	written := 0
	for off := 16 << 20; off < size; off += 4096 {
		old := before[off : off+4096]
		if strings.Trim(string(old), "\x00") == "" {
			continue
		}
		written++
		if !bytes.Equal(old, after[off:off+4096]) {
			t.Fatalf("the primary has other data than the secondary at offset %d", off)
		}
	}
	if written < 100 {
		t.Errorf("%d blocks were written before the pivot: that is no test", written)
	}
	m.endComplete()
}

// TestMirrorTLS: TLS with client certificates at all three places, names of exports, and URIs in
// files, which are not printed.
func TestMirrorTLS(t *testing.T) {
	disk := content(mirrorSize)
	serverTLS, _ := nbdtest.TLS(t)
	serverCA, pair := certificateFiles(t, serverTLS)
	ca := filepath.Join(serverCA, "ca-cert.pem")
	friendCA, friend := clientCertificate(t, ca)
	image := writeFile(t, "secondary", make([]byte, len(disk)))
	source := writeFile(t, "primary", disk)
	one := startServe(t, "--listen=127.0.0.1:0", "--writable", "--certfile="+pair, "--cafile="+friendCA, "--export=/a?session_id="+secret, source)
	two := startServe(t, "--listen=127.0.0.1:0", "--writable", "--certfile="+pair, "--cafile="+friendCA, "--export=b", image)
	dir := shortDir(t)
	uris := []string{writeFile(t, "one", []byte("nbds://"+one.addr+"//a%3Fsession_id="+secret)), writeFile(t, "two", []byte("nbds://"+two.addr+"/b"))}
	s := startServing(t, "mirror", "--listen=127.0.0.1:0", "--certfile="+pair, "--cafile="+friendCA, "--export=moved", "--control=unix:"+dir+"/ctl",
		"--tls-certificates="+friend, "--primary-uri-file="+uris[0], "--secondary-uri-file="+uris[1])
	uri := "nbds://" + s.addr + "/moved?tls-certificates=" + friend
	succeed(t, "copy", "--verify", writeFile(t, "new", content(mirrorSize + 512)[512:]), uri)
	fail(t, exitFailed, []string{"no such export"}, "size", strings.Replace(uri, "/moved", "/", 1))
	fail(t, exitFailed, []string{"certificate required"}, "size", "--tls-ca="+ca, "nbds://"+s.addr+"/moved")
	succeed(t, "ctl", filepath.Join(dir, "ctl"), "complete", "--stop", "--verify")
	code, errOut := s.stop()
	if code != exitOK || strings.Contains(errOut, secret) {
		t.Errorf("exit code %d, error output %s", code, errOut)
	}
	sameBytes(t, "secondary", readFile(t, image), readFile(t, source))
}
