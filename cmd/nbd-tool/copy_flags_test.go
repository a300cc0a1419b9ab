package main

import (
	"bytes"
	"encoding/base64"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd/nbdtest"
)

// TestCopyBitmap brings copies up to date by the output of xe vdi-list-changed-blocks: files
// and exports, in every combination.
func TestCopyBitmap(t *testing.T) {
	d := newChangedDisk()
	bits := make([]byte, 9) // 65 blocks
	for i, state := range d.state {
		if state != d.state[0] {
			bits[i/8] |= 0x80 >> (i % 8)
		}
	}
	text := base64.StdEncoding.EncodeToString(bits) + "\n"
	for name, content := range map[string][]byte{"base64": []byte(text), "bytes": bits} {
		bitmap := writeFile(t, "bitmap", content)
		for _, from := range []string{d.serve(t), writeFile(t, "src", d.now)} {
			path := writeFile(t, "copy", d.base)
			succeed(t, "copy", "--verify", "--bitmap", bitmap, from, path)
			sameBytes(t, name+" to a file", readFile(t, path), d.now)
			ram := nbdtest.NewRAM(d.base)
			succeed(t, "copy", "--verify", "--bitmap", bitmap, from, serveRAM(t, ram))
			sameBytes(t, name+" to an export", ram.Stable(), d.now)
		}
	}
	if got, want := d.read.Load(), 4*2*(d.data+changedUnit); got != want {
		t.Errorf("%d bytes were read of the source, want %d", got, want)
	}
	// A shorter copy, which lacks ranges that the bitmap calls unchanged.
	path := writeFile(t, "copy", d.base[:40*changedUnit])
	succeed(t, "copy", "--verify", "--bitmap", writeFile(t, "bitmap", bits), d.serve(t), path)
	sameBytes(t, "a short copy", readFile(t, path), d.now)
}

func TestCopyBitmapRefuses(t *testing.T) {
	d := newChangedDisk()
	uri, path := d.serve(t), writeFile(t, "copy", d.base)
	with := func(text string, args ...string) []string {
		return append([]string{"copy", "--bitmap", writeFile(t, "bitmap", []byte(text))}, args...)
	}
	short := base64.StdEncoding.EncodeToString(make([]byte, 7))
	fail(t, exitFailed, []string{"bitmap: the bitmap has 7 bytes, but a disk of 4199304 bytes has one of 9"}, with(short, uri, path)...)
	fail(t, exitFailed, []string{"has 10 bytes and is not base64"}, with(strings.Repeat("\x00", 10), uri, path)...)
	fail(t, exitUsage, []string{"both name the changed blocks"}, with(short, "--changed-since=x", uri, path)...)
	fail(t, exitUsage, []string{"existing copy"}, with(short, uri, "-")...)
	fail(t, exitUsage, []string{"does not read as zeroes"}, with(short, "--destination-is-zero", uri, path)...)
	fail(t, exitFailed, []string{"no such file"}, "copy", "--bitmap=/no/such/file", uri, path)
	fail(t, exitFailed, []string{"existing full copy"}, with(strings.Repeat("\x00", 9), uri, path+"2")...)
	sameBytes(t, "the copy", readFile(t, path), d.base)
}

// TestCopyToALargerDestination is refused unless the user says so.
func TestCopyToALargerDestination(t *testing.T) {
	want := content(1 << 20)
	ram := nbdtest.NewRAM(bytes.Repeat([]byte{0xee}, len(want)+512))
	src, dst := writeFile(t, "src", want), serveRAM(t, ram)
	fail(t, exitFailed, []string{"is larger than the source: 1049088 bytes instead of 1048576", "--larger-destination"}, "copy", src, dst)
	sameBytes(t, "untouched", ram.Content(), bytes.Repeat([]byte{0xee}, len(want)+512))
	if r := tool(t, "copy", "--larger-destination", src, dst); r.code != exitOK || !strings.Contains(r.err, "last 512 bytes stay as they are") {
		t.Errorf("exit code %d, error output %q", r.code, r.err)
	}
	sameBytes(t, "copied", ram.Stable()[:len(want)], want)
}

// TestCopyOfAnExportOntoItself: a copy of an export onto itself is refused, under any name.
func TestCopyOfAnExportOntoItself(t *testing.T) {
	ram := nbdtest.NewRAM(content(1 << 20))
	uri := serveRAM(t, ram)
	again := strings.Replace(uri, "127.0.0.1", "localhost", 1)
	const vdi = "/0e0fba52-7b2e-4b1e-8d3b-5d3a1f1c2b3a%3Fsession_id=OpaqueRef:"
	for _, dst := range []string{uri, again} {
		fail(t, exitUsage, []string{"the same export is both source and destination"}, "copy", uri, dst)
	}
	fail(t, exitUsage, []string{"the same export"}, "copy", "nbd://one/"+vdi+"a", "nbds://other/"+vdi+"b")
	same := t.TempDir()
	fail(t, exitUsage, []string{"the same export"}, "copy", "nbd+unix:///x?socket="+same, "nbd+unix:///x?socket="+same+"/.")
	if calls := ram.Calls(); calls.Writes != 0 {
		t.Errorf("%d writes", calls.Writes)
	}
}

func TestRateFlag(t *testing.T) {
	for text, want := range map[string]byteRate{"0": 0, "65536": 65536, "64K": 65536, "64KiB": 65536, "50M": 50 << 20, "2GiB": 2 << 30} {
		var r byteRate
		if err := r.Set(text); err != nil || r != want {
			t.Errorf("%s: got %d, error %v; want %d", text, r, err, want)
		}
	}
	for _, text := range []string{"", "1", "63K", "-1", "-64K", "M", "1T", "64k", "99999999999G", "1.5M"} {
		var r byteRate
		if err := r.Set(text); err == nil {
			t.Errorf("%q: got %d, want an error", text, r)
		}
	}
	want := content(100 << 10)
	dst := filepath.Join(t.TempDir(), "dst")
	succeed(t, "copy", "--rate-limit=50M", writeFile(t, "src", want), dst)
	sameBytes(t, "copy", readFile(t, dst), want)
}
