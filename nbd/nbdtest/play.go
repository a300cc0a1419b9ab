package nbdtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// Play plays the client's part of a transcript against the server at the other end of nc,
// and fails the test at the first difference. It closes nc if the transcript ends with
// C: eof, otherwise the caller must close it.
func Play(t testing.TB, nc net.Conn, tr Transcript) {
	t.Helper()
	if err := tr.play(nc, false); err != nil {
		t.Fatal(err)
	}
}

// PlayServer plays the server's part of a transcript against a client, in a goroutine of its
// own. The test fails if the client sends anything else. wait returns when the transcript
// has been played; it is also called at the end of the test. Then nc is closed.
func PlayServer(t testing.TB, nc net.Conn, tr Transcript) (wait func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer nc.Close()
		if err := tr.play(nc, true); err != nil {
			t.Error(err)
		}
	}()
	wait = func() { <-done }
	t.Cleanup(wait)
	return wait
}

// play plays one side. It reads in the order of the transcript but writes from a goroutine
// of its own: without buffers there would be a deadlock if the peer answers before it has
// read everything.
func (tr Transcript) play(nc net.Conn, server bool) error {
	if err := nc.SetDeadline(time.Now().Add(peerTimeout)); err != nil {
		return fmt.Errorf("%s: %w", tr.name, err)
	}
	queue := make(chan []byte, len(tr.lines))
	written := make(chan error, 1)
	go func() { written <- writeAll(nc, queue) }()

	closedByPeer, err := tr.script(nc, server, queue)
	close(queue)
	if err != nil {
		nc.SetWriteDeadline(time.Unix(1, 0)) // the writer must not wait for a peer that does not read
	}
	// A peer that is to close the connection need not have read everything.
	if werr := <-written; err == nil && werr != nil && !closedByPeer {
		err = fmt.Errorf("%s: cannot send: %w", tr.name, werr)
	}
	if err == nil && tr.lines[len(tr.lines)-1].eof && !closedByPeer {
		nc.Close()
	}
	if err == nil {
		nc.SetDeadline(time.Time{})
	}
	return err
}

// script plays the lines. It reports whether the transcript has the peer close the
// connection, and the peer did.
func (tr Transcript) script(nc net.Conn, server bool, queue chan<- []byte) (closedByPeer bool, err error) {
	seen := make(cookies)
	for _, l := range tr.lines {
		switch {
		case l.server == server && l.eof:
			return false, nil
		case l.server == server:
			var b []byte
			if b, err = l.sent(seen); err == nil {
				queue <- b
			}
		case l.eof:
			err = expectEnd(nc)
			closedByPeer = err == nil
		default:
			err = expectTokens(nc, l.tokens, seen)
		}
		if err != nil {
			return false, fmt.Errorf("%s:%d: %s\n%w", tr.name, l.no, l.source, err)
		}
	}
	return closedByPeer, nil
}

func writeAll(nc net.Conn, queue <-chan []byte) error {
	var err error
	for b := range queue {
		if err == nil {
			_, err = nc.Write(b)
		}
	}
	return err
}

// expectEnd expects that the peer closes the connection without sending another byte. A TCP
// peer that closes with unread data resets the connection, which is permitted.
func expectEnd(r io.Reader) error {
	var b [64]byte
	n, err := r.Read(b[:])
	switch {
	case n > 0:
		return fmt.Errorf("got % x, want the end of the connection", b[:n])
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return nil
	}
	return fmt.Errorf("got %w, want the end of the connection", err)
}

func expectTokens(r io.Reader, tokens []token, seen cookies) error {
	for _, tok := range tokens {
		var err error
		switch {
		case tok.text:
			err = expectText(r)
		case tok.wild > 0:
			err = receive(r, make([]byte, tok.wild))
		case tok.cookie != "":
			err = expectCookie(r, tok.cookie, seen)
		default:
			err = expectBytes(r, tok.bytes)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func expectBytes(r io.Reader, want []byte) error {
	got := make([]byte, len(want))
	if err := receive(r, got); err != nil {
		return err
	}
	for i := range want {
		if got[i] != want[i] {
			return fmt.Errorf("at byte %d: got %s, want %s", i, excerpt(got, i), excerpt(want, i))
		}
	}
	return nil
}

// expectCookie receives 8 bytes, the same ones each time.
func expectCookie(r io.Reader, name string, seen cookies) error {
	if want := seen[name]; want != nil {
		return expectBytes(r, want)
	}
	seen[name] = make([]byte, 8)
	return receive(r, seen[name])
}

// excerpt returns b in hex, or the part around byte i if it is long.
func excerpt(b []byte, i int) string {
	const around = 32
	from, to := max(i-around, 0), min(i+around, len(b))
	return fmt.Sprintf("% x (bytes %d to %d)", b[from:to], from, to)
}

// maxText is the longest protocol string.
const maxText = 4096

func expectText(r io.Reader) error {
	var length [4]byte
	if err := receive(r, length[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxText {
		return fmt.Errorf("got a text of %d bytes, want at most %d", n, maxText)
	}
	text := make([]byte, n)
	if err := receive(r, text); err != nil {
		return err
	}
	return checkText(text)
}

func receive(r io.Reader, b []byte) error {
	if n, err := io.ReadFull(r, b); err != nil {
		return fmt.Errorf("got % x and then %w, want %d bytes", b[:n], err, len(b))
	}
	return nil
}
