package main

import (
	"bytes"
	"io"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// If the server allows it there are several connections, each with several requests in flight.
func TestCopyInParallel(t *testing.T) {
	const connections, requests = 3, 4
	held := make(chan struct{})
	arrivals := make(chan struct{}, 1000)
	src := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){"ram": func() (nbd.Device, error) {
		return &holding{nbdtest.NewMem(8<<20, 1), arrivals, held}, nil
	}}}
	uri := serve(t, src) + "ram"
	done := make(chan result, 1)
	go func() {
		var errOut bytes.Buffer
		code := run(t.Context(), []string{"copy", "--connections=3", "--requests=4", uri, "-"}, streams{nil, io.Discard, &errOut})
		done <- result{code: code, err: errOut.String()}
	}()
	for range connections * requests {
		<-arrivals
	}
	close(held)
	if r := <-done; r.code != exitOK {
		t.Errorf("exit code %d: %s", r.code, r.err)
	}
	if n := len(src.Opens()); n != connections {
		t.Errorf("%d connections, want %d", n, connections)
	}
}

// holding blocks all reads until held is closed.
type holding struct {
	*nbdtest.Mem
	arrivals chan<- struct{}
	held     <-chan struct{}
}

func (h *holding) ReadAt(p []byte, off int64) (int, error) {
	h.arrivals <- struct{}{}
	<-h.held
	return h.Mem.ReadAt(p, off)
}

// lonely does not promise consistency between connections.
type lonely struct{ *nbdtest.RAM }

func (lonely) MultiConn() bool { return false }

func TestCopyWithoutMultiConn(t *testing.T) {
	want := content(1 << 20)
	ram := nbdtest.NewRAM(make([]byte, len(want)))
	dst := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){"": func() (nbd.Device, error) { return lonely{ram.Again()}, nil }}}
	succeed(t, "copy", "--connections=5", writeFile(t, "src", want), serve(t, dst))
	sameBytes(t, "export", ram.Stable(), want)
	if n := len(dst.Opens()); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}
