package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// The exports of every transcript: 64 KiB of text, in rows of 16 bytes with their number, so
// that people can read transcripts.
const rowsSize = 64 << 10

func rows() []byte {
	var b bytes.Buffer
	for i := range rowsSize / 16 {
		fmt.Fprintf(&b, "row %011d\n", i)
	}
	return b.Bytes()
}

// rowsExports are the exports, and every device that they open.
type rowsExports struct {
	nbdtest.Exporter
	mu   sync.Mutex // guards mems
	mems []*nbdtest.Mem
}

func newRowsExports() *rowsExports {
	content := rows()
	e := new(rowsExports)
	open := func(change func(*nbdtest.Mem) nbd.Device) func() (nbd.Device, error) {
		return func() (nbd.Device, error) {
			m := nbdtest.MemOf(content)
			e.mu.Lock()
			e.mems = append(e.mems, m)
			e.mu.Unlock()
			return change(m), nil
		}
	}
	disk := func(m *nbdtest.Mem) nbd.Device {
		m.Min, m.Preferred, m.MaxPayload, m.Text = 512, 4096, 32<<20, "rows of text"
		return m
	}
	plain := func(m *nbdtest.Mem) nbd.Device { return m }
	faulty := func(m *nbdtest.Mem) nbd.Device {
		f := nbdtest.NewFaulty(m)
		f.Fail(0x8000, 512, errors.New("medium error"))
		f.Short(0x9000, 512)
		f.Fail(0xa000, 512, fmt.Errorf("wrapped: %w", syscall.ENOMEM))
		return f
	}
	fail := func(err error) func() (nbd.Device, error) {
		return func() (nbd.Device, error) { return nil, err }
	}
	// The text of the refusal has characters that must not be sent: the server
	// replaces them.
	e.Exports = map[string]func() (nbd.Device, error){
		"": open(plain), "disk": open(disk), "plain": open(plain), "faulty": open(faulty),
		"secret": fail(nbd.Refuse(nbd.ErrPolicy, "not\xfffor\x00you", errors.New("the cause"))),
		"broken": fail(errors.New("the reason is for the log")),
	}
	e.addWritable()
	return e
}

// check expects that names were opened, and that every device was used as
// devices want it, and closed.
func (e *rowsExports) check(t *testing.T, names []string) {
	t.Helper()
	if got := e.Names(); !slices.Equal(got, names) {
		t.Errorf("exports asked for: got %q, want %q", got, names)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, m := range e.mems {
		if got := m.Closes(); got != 1 {
			t.Errorf("device %d was closed %d times, want once", i, got)
		}
		if err := m.Misuse(); err != nil {
			t.Errorf("device %d: %v", i, err)
		}
	}
}
