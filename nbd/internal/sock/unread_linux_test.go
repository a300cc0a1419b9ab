package sock

import (
	"net"
	"testing"
)

// Unread sees the bytes that have arrived, until they are read.
func TestUnread(t *testing.T) {
	near, far := connected(t)
	u := NewUnread(near)
	if u.Any() {
		t.Error("bytes before the peer has sent any")
	}
	if _, err := far.Write([]byte("ab")); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := near.Read(b[:]); err != nil { // waits until both have arrived
		t.Fatal(err)
	}
	if !u.Any() {
		t.Error("the second byte is not seen")
	}
	if _, err := near.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	if u.Any() {
		t.Error("bytes although all have been read")
	}
	near.Close()
	if u.Any() {
		t.Error("bytes of a closed connection")
	}
}

// TestNoSocket: a connection that is not a socket has no Unread, and its Meter counts the
// bytes that its methods are called with.
func TestNoSocket(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	if NewUnread(near) != nil {
		t.Error("got an Unread")
	}
	m := NewMeter(near)
	m.Add(5)
	if _, known := m.Progress(); known || m.Total() != 5 {
		t.Errorf("got %d bytes and known %t, want 5 and false", m.Total(), known)
	}
}
