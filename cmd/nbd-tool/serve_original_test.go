package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// TestServeFlagsOfTheOriginal: a command line of the original nbd-tool works.
func TestServeFlagsOfTheOriginal(t *testing.T) {
	file := writeFile(t, "disk", make([]byte, 512))
	s := startServe(t, "--exportname=disk", "--no-tls", "--port=0", "--ciphersuites=AES", "--curve", "secp384r1", file)
	if host, _, err := net.SplitHostPort(s.addr); err != nil || !net.ParseIP(host).IsLoopback() {
		t.Errorf("listens on %s, %v; want loopback", s.addr, err)
	}
	if got := succeed(t, "size", "nbd://"+s.addr+"/disk"); got != "512\n" {
		t.Errorf("got %q", got)
	}
	code, errOut := s.stop()
	for _, flag := range ignoredFlags {
		if !strings.Contains(errOut, "--"+flag+" is ignored") {
			t.Errorf("the log does not say that --%s is ignored: %s", flag, errOut)
		}
	}
	if code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// tapdisk is tapdisk's client of NBD, which sends and expects these bytes and no others.
type tapdisk struct {
	t  *testing.T
	nc net.Conn
}

func (c tapdisk) send(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// receive expects n bytes.
func (c tapdisk) receive(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("receiving %d bytes: %v", n, err)
	}
	return b
}

// openTapdisk connects and asks for an export.
func openTapdisk(t *testing.T, addr, name string) tapdisk {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	c := tapdisk{t, nc}
	if got := c.receive(18); string(got) != "NBDMAGICIHAVEOPT\x00\x03" { // fixed newstyle, no zeroes
		t.Fatalf("greeting: got %q", got)
	}
	c.send([]byte{0, 0, 0, 3}) // both flags, unasked
	c.send([]byte("IHAVEOPT\x00\x00\x00\x01"))
	c.send(binary.BigEndian.AppendUint32(nil, uint32(len(name))))
	c.send([]byte(name))
	return c
}

// request sends the header of a request, whose cookie is that of tapdisk.
func (c tapdisk) request(n int, command uint32, off uint64, length uint32) {
	c.t.Helper()
	b := []byte("\x25\x60\x95\x13")
	b = binary.BigEndian.AppendUint32(b, command) // flags of 16 bits that are 0, and the command
	b = fmt.Appendf(b, "td%05x\x00", n)
	b = binary.BigEndian.AppendUint64(b, off)
	c.send(binary.BigEndian.AppendUint32(b, length))
}

// reply expects a simple reply without an error and returns the number of its request.
func (c tapdisk) reply() (n int) {
	c.t.Helper()
	b := c.receive(16)
	if _, err := fmt.Sscanf(string(b[8:]), "td%05x\x00", &n); err != nil || string(b[:8]) != "\x67\x44\x66\x98\x00\x00\x00\x00" {
		c.t.Fatalf("reply: got % x, %v", b, err)
	}
	return n
}

// TestServeTapdisk plays tapdisk's client: the NUL behind the name, the reply to EXPORT_NAME in
// one piece and without zeroes, as many requests in flight as it has, and no errors.
func TestServeTapdisk(t *testing.T) {
	const requests, length = 352, 4096
	file := writeFile(t, "disk", make([]byte, requests*length))
	s := startServe(t, "--listen=127.0.0.1:0", "--writable", "--forgive-nul", "--export=tapdisk_client", file)
	c := openTapdisk(t, s.addr, "tapdisk_client\x00")
	b := make([]byte, 200) // one call of recv must get all of it
	n, err := c.nc.Read(b)
	if err != nil || n != 10 || binary.BigEndian.Uint64(b) != requests*length || b[9]&1 == 0 {
		t.Fatalf("reply to EXPORT_NAME: got % x, %v", b[:n], err)
	}
	for i := range requests {
		c.request(i, uint32(wire.CmdWrite), uint64(i)*length, length)
		c.send(nbdtest.Bytes(length, int64(i)*length, 1))
	}
	c.allReplies(requests, func(int) {})
	for i := range requests {
		c.request(i, uint32(wire.CmdRead), uint64(i)*length, length)
	}
	c.allReplies(requests, func(i int) {
		sameBytes(t, fmt.Sprintf("request %d", i), c.receive(length), nbdtest.Bytes(length, int64(i)*length, 1))
	})
	c.request(0, uint32(wire.CmdDisc), 0, 0)
	if n, err := c.nc.Read(b); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after DISC: got %d bytes, %v", n, err)
	}
	if code, errOut := s.stop(); code != exitOK || errOut != "" {
		t.Errorf("exit code %d, error output %q", code, errOut)
	}
	sameBytes(t, "file", readFile(t, file), nbdtest.Bytes(requests*length, 0, 1))
}

// allReplies expects a reply to each request, in any order.
func (c tapdisk) allReplies(requests int, payload func(n int)) {
	c.t.Helper()
	answered := make([]bool, requests)
	for range requests {
		n := c.reply()
		if n >= requests || answered[n] {
			c.t.Fatalf("a reply to request %d, which is not in flight", n)
		}
		answered[n] = true
		payload(n)
	}
}

// TestServeTapdiskRefused: without --forgive-nul, or with anything else than one NUL behind the
// name, the connection is closed.
func TestServeTapdiskRefused(t *testing.T) {
	file := writeFile(t, "disk", make([]byte, 512))
	args := []string{"--listen=127.0.0.1:0", "--export=tapdisk_client", file}
	strict, forgiving := startServe(t, args...), startServe(t, append(args, "--forgive-nul")...)
	for _, tt := range []struct {
		s    *served
		name string
	}{
		{strict, "tapdisk_client\x00"}, {forgiving, "tapdisk_client\x00\x00"},
		{forgiving, "tapdisk\x00client"}, {forgiving, "\x00"},
	} {
		c := openTapdisk(t, tt.s.addr, tt.name)
		if b, err := io.ReadAll(c.nc); len(b) > 0 || err != nil {
			t.Errorf("%q: got % x, %v; want the end of the connection", tt.name, b, err)
		}
	}
}

// TestServeIdleTapdisk: a mirror is not ended because its guest does not write.
func TestServeIdleTapdisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFileServer(settingsSource{}, io.Discard, io.Discard)
		s.exports.replace([]export{{name: "tapdisk_client", path: writeFile(t, "disk", make([]byte, 4096))}})
		s.forgiveNUL()
		nc, ended := nbdtest.Pipe(t, &s.server)
		c := tapdisk{t, nc}
		c.receive(18)
		c.send([]byte("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x0ftapdisk_client\x00"))
		c.receive(10)
		for range 2 {
			time.Sleep(30 * 24 * time.Hour)
			c.request(0, uint32(wire.CmdRead), 0, 4096)
			c.reply()
			c.receive(4096)
		}
		c.request(0, uint32(wire.CmdDisc), 0, 0)
		if err := ended(); err != nil {
			t.Error(err)
		}
	})
}
