package sock

import (
	"bytes"
	"errors"
	"net"
	"testing"
)

// countingConn takes writes until it fails.
type countingConn struct {
	net.Conn
	got    bytes.Buffer
	writes int
	err    error
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes++
	if c.err != nil {
		return 0, c.err
	}
	return c.got.Write(p)
}

func TestBatch(t *testing.T) {
	c := &countingConn{}
	b := NewBatch(c)
	record := bytes.Repeat([]byte{7}, 16<<10)
	b.Write(record)
	if c.writes != 1 {
		t.Errorf("without a batch: %d writes, want 1", c.writes)
	}
	b.Begin()
	for range 40 { // 640 KiB
		b.Write(record)
	}
	if err := b.End(); err != nil {
		t.Error(err)
	}
	if c.writes != 1+3 || c.got.Len() != 41*len(record) {
		t.Errorf("got %d bytes in %d writes, want %d in 4", c.got.Len(), c.writes, 41*len(record))
	}
	b.Write(record)
	if c.writes != 5 {
		t.Errorf("after the batch: %d writes, want 5", c.writes)
	}
}

func TestBatchFails(t *testing.T) {
	c := &countingConn{err: errors.New("gone")}
	b := NewBatch(c)
	b.Begin()
	if _, err := b.Write([]byte("x")); err != nil {
		t.Error(err) // not tried yet
	}
	if err := b.End(); !errors.Is(err, c.err) {
		t.Errorf("end: got %v, want the connection's error", err)
	}
	b.Begin()
	if err := b.End(); !errors.Is(err, c.err) {
		t.Errorf("a later batch: got %v, want the error again: bytes are missing", err)
	}
}
