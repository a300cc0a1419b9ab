package nbdtest_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

func TestMemIsADevice(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 512, 4097, 1 << 20, 9<<20 + 17} {
		nbdtest.TestDevice(t, func() nbd.Device { return nbdtest.NewMem(size, 1) })
	}
	nbdtest.TestDevice(t, func() nbd.Device { return nbdtest.MemOf([]byte("content")) })
	nbdtest.TestDevice(t, func() nbd.Device { return nbdtest.NewFaulty(nbdtest.NewMem(70000, 1)) })
}

func TestMemContent(t *testing.T) {
	const size = 1 << 16
	whole := nbdtest.Bytes(size, 0, 1)
	if got := nbdtest.Bytes(100, 1001, 1); !bytes.Equal(got, whole[1001:1101]) {
		t.Errorf("Bytes at 1001: got %x, want %x", got[:16], whole[1001:1017])
	}
	m := nbdtest.NewMem(size, 1)
	got := make([]byte, size)
	if n, err := m.ReadAt(got, 0); n != size || err != nil {
		t.Fatalf("ReadAt: got %d and error %v, want %d and none", n, err, size)
	}
	if !bytes.Equal(got, whole) {
		t.Error("ReadAt and Bytes disagree")
	}
	if bytes.Equal(whole, nbdtest.Bytes(size, 0, 2)) {
		t.Error("two seeds have the same content")
	}
	if i := bytes.Index(whole[1:], whole[:8]); i >= 0 {
		t.Errorf("the first 8 bytes come again at %d", i+1)
	}
	huge := nbdtest.NewMem(1<<62, 1)
	if n, err := huge.ReadAt(got[:100], 1<<62-50); n != 50 || !errors.Is(err, io.EOF) {
		t.Errorf("end of a huge device: got %d and error %v, want 50 and io.EOF", n, err)
	}
}

func TestMemMisuse(t *testing.T) {
	read := func(m *nbdtest.Mem, off int64) { _, _ = m.ReadAt(make([]byte, 1), off) }
	tests := []struct {
		name string
		use  func(m *nbdtest.Mem)
		want string // "" means none
	}{
		{"nothing", func(*nbdtest.Mem) {}, ""},
		{"read and close", func(m *nbdtest.Mem) { read(m, 0); m.Close() }, ""},
		{"read past the end", func(m *nbdtest.Mem) { read(m, 1000); m.Close() }, ""},
		{"close twice", func(m *nbdtest.Mem) { m.Close(); m.Close() }, "Close for the 2th time"},
		{"read after close", func(m *nbdtest.Mem) { m.Close(); read(m, 0) }, "ReadAt after Close"},
		{"negative offset", func(m *nbdtest.Mem) { read(m, -1) }, "negative offset -1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := nbdtest.NewMem(512, 1)
			tt.use(m)
			err := m.Misuse()
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want none", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestMemCloseWhileReading(t *testing.T) {
	// A device whose content is slow: the read is inside Mem until released.
	m, arrived, release := nbdtest.SlowMem(512)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = m.ReadAt(make([]byte, 1), 0)
	}()
	<-arrived
	m.Close()
	close(release)
	<-done
	if err := m.Misuse(); err == nil || !strings.Contains(err.Error(), "Close with 1 calls of ReadAt under way") {
		t.Errorf("got %v, want a close with a read under way", err)
	}
}

func TestMemCounts(t *testing.T) {
	m := nbdtest.NewMem(512, 1)
	m.CloseErr = io.ErrUnexpectedEOF
	m.Min, m.Preferred, m.MaxPayload, m.Text = 1, 2, 3, "text"
	_, _ = m.ReadAt(make([]byte, 1), 0)
	_, _ = m.ReadAt(nil, 0)
	if err := m.Close(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Close: got error %v, want CloseErr", err)
	}
	if m.Reads() != 2 || m.Closes() != 1 {
		t.Errorf("got %d reads and %d closes, want 2 and 1", m.Reads(), m.Closes())
	}
	if a, b, c := m.BlockSizes(); a != 1 || b != 2 || c != 3 || m.Description() != "text" {
		t.Errorf("got block sizes %d %d %d and text %q", a, b, c, m.Description())
	}
}
