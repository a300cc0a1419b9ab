package sock

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
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

// scriptedConn returns one of the pieces for each read.
type scriptedConn struct {
	net.Conn
	pieces [][]byte
}

func (c *scriptedConn) Read(p []byte) (int, error) {
	if len(c.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.pieces[0])
	if c.pieces[0] = c.pieces[0][n:]; len(c.pieces[0]) == 0 {
		c.pieces = c.pieces[1:]
	}
	return n, nil
}

// Bytes that were read ahead come in their order, also after the end of reading ahead, and no
// byte more is read ahead then.
func TestBatchReadsAhead(t *testing.T) {
	c := &scriptedConn{pieces: [][]byte{[]byte("0123456789"), []byte("abcdef"), []byte("ghi")}}
	b := NewBatch(c)
	var got []string
	read := func(n int) {
		p := make([]byte, n)
		n, err := b.Read(p)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(p[:n]))
	}
	b.ReadAhead(true)
	read(4)
	if len(c.pieces) != 2 {
		t.Errorf("%d pieces are left, want the first one read ahead", len(c.pieces))
	}
	read(4)
	b.ReadAhead(false)
	read(4)
	read(4)
	if len(c.pieces) != 2 {
		t.Errorf("%d pieces are left, want no more than needed read after the end of reading ahead", len(c.pieces))
	}
	b.ReadAhead(true)
	read(batchSize)
	read(8)
	if want := []string{"0123", "4567", "89", "abcd", "ef", "ghi"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := b.Read(make([]byte, 4)); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: got %v, want io.EOF", err)
	}
}
