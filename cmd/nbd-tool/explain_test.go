package main

import (
	"io"
	"net"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

// receiveRequest reads a request that has no payload.
func receiveRequest(nc net.Conn) (wire.Request, error) {
	var b [wire.RequestLen]byte
	if _, err := io.ReadFull(nc, b[:]); err != nil {
		return wire.Request{}, err
	}
	return wire.ParseRequest(&b)
}

// The error for the end of a transfer says why it ended, not which system call failed.
func TestEndsInWords(t *testing.T) {
	tests := []struct {
		name string
		end  func(nc net.Conn, r wire.Request) error
		want string
	}{
		{"closed", func(net.Conn, wire.Request) error { return nil },
			"connection lost: the server closed the connection (1 request outstanding) (the server's log may say why)"},
		{"closed inside a reply", func(nc net.Conn, r wire.Request) error {
			var b [wire.SimpleReplyLen]byte
			wire.PutSimpleReply(&b, wire.Success, r.Cookie)
			_, err := nc.Write(append(b[:], 1, 2, 3))
			return err
		}, "connection lost inside a reply: the server closed the connection (1 request outstanding) (the server's log may say why)"},
		{"reset", func(nc net.Conn, _ wire.Request) error { return nc.(*net.TCPConn).SetLinger(0) },
			"connection lost: the connection was reset by the server, or on the way to it (1 request outstanding) (the server's log may say why)"},
		{"shut down", func(nc net.Conn, r wire.Request) error {
			var b [wire.SimpleReplyLen]byte
			wire.PutSimpleReply(&b, wire.ESHUTDOWN, r.Cookie)
			_, err := nc.Write(b[:])
			return err
		}, "the server is shutting down: NBD_CMD_READ: server answered NBD_ESHUTDOWN"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			uri := oldServerThat(t, func(nc net.Conn) error {
				r, err := receiveRequest(nc)
				if err != nil {
					return err
				}
				return tt.end(nc, r)
			})
			r := tool(t, "copy", "--retry-for=0", "--requests=1", uri, "-")
			checkFailure(t, r, exitFailed, "stopped after 0 of 12345 bytes", "reading at offset 0: "+tt.want+"\n")
			for _, raw := range []string{"tcp", "EOF", "syscall", "reset by peer"} {
				if strings.Contains(r.err, raw) {
					t.Errorf("%q has %q", r.err, raw)
				}
			}
		})
	}
}

// A request without a reply fails after the timeout.
func TestTimeout(t *testing.T) {
	const timeout, once = "--timeout=100ms", "--retry-for=0"
	silent := oldServer(t)
	want := []string{"no progress for 100ms", "--timeout sets how long"}
	fail(t, exitFailed, append(want, "no reply to NBD_CMD_READ of 12345 bytes at 0"), "copy", timeout, once, silent, "-")
	fail(t, exitFailed, append(want, "no reply to NBD_CMD_READ"), "copy", timeout, once, silent, writeFile(t, "dst", nil))
}
