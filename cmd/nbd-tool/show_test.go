package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"xapi-nbd/cmd/nbd-tool/internal/extents"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// described is a device with a text and a canonical name.
type described struct{ *nbdtest.RAM }

func (described) CanonicalName() string { return "/canonical" }

// showURI serves an export with data from 64 KiB to 128 KiB of 1 MiB.
func showURI(t *testing.T) string {
	t.Helper()
	b := make([]byte, 1<<20)
	nbdtest.Fill(b[64<<10:128<<10], 0, 1)
	ram := nbdtest.NewRAM(b)
	ram.Min, ram.Preferred, ram.MaxPayload = 512, 4096, 1<<20
	ram.Text = "a disk\x1b[2J"
	return serveOne(t, func() nbd.Device { return described{ram.Again()} })
}

func TestInfo(t *testing.T) {
	got := succeed(t, "info", showURI(t))
	for _, row := range []string{"name:          /canonical\n", "description:   a disk [2J\n", "size:          1048576 bytes (1.0 MiB)\n", "access:        read and write\n",
		"flags:         HAS_FLAGS SEND_FLUSH SEND_FUA ", "block size:    minimum 512, preferred 4096, maximum payload 1048576\n",
		"contexts:      base:allocation\n", "protocol:      in the clear, extended headers\n"} {
		if !strings.Contains(got, row) {
			t.Errorf("got\n%s\nwithout %q", got, row)
		}
	}
	if strings.Contains(got, "\x1b") {
		t.Errorf("%q lets the server write to the terminal", got)
	}
}

// The keys of the JSON output are stable.
func TestInfoJSON(t *testing.T) {
	const want = `{
  "name": "ram",
  "description": "",
  "size": 4096,
  "read_only": true,
  "flags": [
    "HAS_FLAGS",
    "READ_ONLY",
    "SEND_DF",
    "CAN_MULTI_CONN",
    "BLOCK_STATUS_PAYLOAD"
  ],
  "block_size": {
    "minimum": 1,
    "preferred": 4096,
    "maximum_payload": 33554432
  },
  "contexts": [
    "base:allocation"
  ],
  "protocol": {
    "tls": null,
    "structured_replies": true,
    "extended_headers": true
  }
}
`
	uri := serveOne(t, func() nbd.Device { return nbdtest.NewMem(4096, 1) })
	if got := succeed(t, "info", "--json", uri); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestInfoListsContexts(t *testing.T) {
	names := []string{extents.DirtyContext + baseName, extents.UnchangedContext + baseName}
	uri := newChangedDisk().serve(t, names...)
	names = append([]string{wire.BaseAllocation}, names...)
	if got, want := succeed(t, "info", uri), "\ncontexts:      "+strings.Join(names, " ")+"\n"; !strings.Contains(got, want) {
		t.Errorf("got\n%s\nwithout %q", got, want)
	}
	var report infoReport
	if err := json.Unmarshal([]byte(succeed(t, "info", "--json", uri)), &report); err != nil || !slices.Equal(report.Contexts, names) {
		t.Errorf("got contexts %q (%v), want %q", report.Contexts, err, names)
	}
}

func TestSize(t *testing.T) {
	uri := showURI(t)
	if got := succeed(t, "size", uri); got != "1048576\n" {
		t.Errorf("got %q", got)
	}
	if got := succeed(t, "size", "--json", uri); got != "{\n  \"size\": 1048576\n}\n" {
		t.Errorf("got %q", got)
	}
}

func TestMap(t *testing.T) {
	const text = `               0            65536  hole,zero
           65536            65536  data
          131072           917504  hole,zero
           total            65536  data, 6.2 %
           total           983040  hole,zero, 93.8 %
`
	const asJSON = `{
  "size": 1048576,
  "extents": [
    {"offset":0,"length":65536,"hole":true,"zero":true},
    {"offset":65536,"length":65536,"hole":false,"zero":false},
    {"offset":131072,"length":917504,"hole":true,"zero":true}
  ],
  "totals": {"data":65536,"hole":0,"zero":0,"hole_zero":983040}
}
`
	uri := showURI(t)
	if got := succeed(t, "map", uri); got != text {
		t.Errorf("got\n%s\nwant\n%s", got, text)
	}
	if got := succeed(t, "map", "--json", uri); got != asJSON {
		t.Errorf("got\n%s\nwant\n%s", got, asJSON)
	}
	empty := serveRAM(t, nbdtest.NewRAM(nil))
	if got := succeed(t, "map", "--json", empty); !json.Valid([]byte(got)) || !strings.Contains(got, `"extents": []`) {
		t.Errorf("of nothing: got\n%s", got)
	}
}

// oldServer supports the options that every server supports: LIST and EXPORT_NAME. It serves
// one connection after the other until the end of the test, and answers no request.
func oldServer(t *testing.T) (uri string) {
	return oldServerThat(t, func(nc net.Conn) error {
		_, err := io.Copy(io.Discard, nc)
		return err
	})
}

// oldServerThat is an oldServer that does something else in the transmission
// phase.
func oldServerThat(t *testing.T, transmit func(nc net.Conn) error) (uri string) {
	return scriptedServer(t, func(nc net.Conn) error { return oldDialogue(nc, transmit) })
}

// scriptedServer has one conversation after the other until the end of the test.
func scriptedServer(t *testing.T, talk func(nc net.Conn) error) (uri string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			_ = talk(nc) // the client reports the error
			nc.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return "nbd://" + l.Addr().String() + "/"
}

// receiveOption reads an option, and drops its data.
func receiveOption(nc net.Conn) (wire.Option, error) {
	var b [wire.OptionHeaderLen]byte
	if _, err := io.ReadFull(nc, b[:]); err != nil {
		return 0, err
	}
	hdr, err := wire.ParseOptionHeader(&b)
	if err != nil {
		return 0, err
	}
	_, err = io.CopyN(io.Discard, nc, int64(hdr.Length))
	return hdr.Option, err
}

func oldDialogue(nc net.Conn, transmit func(net.Conn) error) error {
	if _, err := nc.Write(wire.AppendGreeting(nil, wire.FlagFixedNewstyle|wire.FlagNoZeroes)); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(nc, flags[:]); err != nil {
		return err
	}
	for {
		opt, err := receiveOption(nc)
		if err != nil {
			return err
		}
		switch opt {
		case wire.OptAbort:
			return nil
		case wire.OptExportName:
			info := binary.BigEndian.AppendUint64(nil, 12345)
			info = binary.BigEndian.AppendUint16(info, uint16(wire.FlagHasFlags|wire.FlagReadOnly))
			if _, err := nc.Write(info); err != nil {
				return err
			}
			return transmit(nc)
		case wire.OptList:
			reply := func(name, text string) []byte {
				data := append(binary.BigEndian.AppendUint32(nil, uint32(len(name))), name+text...)
				return wire.AppendOptionReply(nil, wire.OptList, wire.RepServer, data)
			}
			b := append(reply("", ""), reply("/disk?session_id="+secret, "the \"first\"\n")...)
			b = wire.AppendOptionReply(b, wire.OptList, wire.RepAck, nil)
			if _, err := nc.Write(b); err != nil {
				return err
			}
		default:
			if _, err := nc.Write(wire.AppendOptionReply(nil, opt, wire.RepErrUnsup, nil)); err != nil {
				return err
			}
		}
	}
}

func TestList(t *testing.T) {
	const asJSON = `{
  "exports": [
    {
      "name": "",
      "description": ""
    },
    {
      "name": "/disk?session_id=<session>",
      "description": "the \"first\" "
    }
  ]
}
`
	uri := oldServer(t)
	if got, want := succeed(t, "list", uri), "\"\"\n/disk?session_id=<session>\tthe \"first\" \n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := succeed(t, "list", "--json", uri); got != asJSON {
		t.Errorf("got\n%s\nwant\n%s", got, asJSON)
	}
	fail(t, exitFailed, []string{"NBD_OPT_LIST", "NBD_REP_ERR_POLICY"}, "list", showURI(t))
}

// Servers without INFO, GO and structured replies work.
func TestOldServer(t *testing.T) {
	uri := oldServer(t)
	if got := succeed(t, "size", uri); got != "12345\n" {
		t.Errorf("got %q", got)
	}
	got := succeed(t, "info", uri+"some")
	for _, want := range []string{"name:          some\n", "block size:    not advertised\n", "contexts:      none\n", "in the clear, simple replies\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("got\n%s\nwithout %q", got, want)
		}
	}
	fail(t, exitFailed, []string{"base:allocation"}, "map", uri)
}

// chatty is an exporter whose refusals contain the export name.
func chatty(name string) (nbd.Device, error) {
	return nil, nbd.Refuse(nbd.ErrPolicy, "you asked for "+name+" or "+strings.ReplaceAll(name, ":", "%3A"), nil)
}

// TestSessionStaysSecret: no command prints the session, even if the server sends it. Each
// run of the tool in these tests checks that.
func TestSessionStaysSecret(t *testing.T) {
	export := "/0e0fba52%3Fsession_id=" + secret
	uri := serve(t, exporterFunc(chatty)) + export
	for _, args := range [][]string{{"info", uri}, {"size", uri}, {"map", uri}, {"copy", uri, "-"}, {"copy", "/dev/null", uri}} {
		if r := tool(t, args...); r.code != exitFailed {
			t.Errorf("%q: exit code %d, want %d", args, r.code, exitFailed)
		}
	}
	fail(t, exitFailed, []string{"session_id=<session>", "NBD_REP_ERR_POLICY"}, "info", uri)
	for _, args := range [][]string{
		{"info", strings.ReplaceAll(uri, "%3F", "?")}, {"info", uri, uri}, {uri}, {"serve", "--listen", uri, "/dev/null"},
		{"info", "--" + uri}, {"copy", uri, "-", "--connections=" + uri}, {"copy", uri},
	} {
		if r := tool(t, args...); r.code != exitUsage {
			t.Errorf("%q: exit code %d, want %d", args, r.code, exitUsage)
		}
	}
	// Without a canonical name the name is the one asked for.
	uri = serveOne(t, func() nbd.Device { return nbdtest.NewMem(512, 1) })
	uri = strings.TrimSuffix(uri, "ram") + export
	if got := succeed(t, "info", uri); !strings.Contains(got, "/0e0fba52?session_id=<session>\n") {
		t.Errorf("got\n%s", got)
	}
	succeed(t, "info", "--json", uri)
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"session_id=abc def":                  "session_id=<session> def",
		`"a?session_id=OpaqueRef:1-2&x=1"`:    `"a?session_id=<session>&x=1"`,
		"nbd://h//u%3Fsession_id%3DOpaque%3A": "nbd://h//u%3Fsession_id%3D<session>",
		"SESSION_INVALID [OpaqueRef:12-3a]":   "SESSION_INVALID [<session>]",
		"opaqueref%3A12 x":                    "<session> x",
		"session of opaque things":            "session of opaque things",
	} {
		if got := string(redact([]byte(in))); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// A closed pipe as standard output is an error.
func TestOutputFails(t *testing.T) {
	uri := showURI(t)
	for _, args := range [][]string{{"info", uri}, {"info", "--json", uri}, {"size", uri}, {"map", uri}, {"list", oldServer(t)}, {"copy", uri, "-"}, {"version"}} {
		if code := run(t.Context(), args, streams{nil, brokenPipe{}, io.Discard}); code != exitFailed {
			t.Errorf("%q: exit code %d, want %d", args, code, exitFailed)
		}
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) {
	return 0, fmt.Errorf("write: %w", errors.ErrUnsupported)
}
