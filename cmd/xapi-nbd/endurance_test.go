//go:build !race

// The race detector's own memory would be measured, so these tests run without
// it: see the Makefile.

package main

import (
	"testing"

	"xapi-nbd/xapi/xapitest"
)

// TestEnduranceCycles: many connections, ended in every way, leave no memory in use. The
// original program failed after some hundreds.
func TestEnduranceCycles(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	const (
		warm, cycles = 200, 2000
		allowed      = 4 << 20
	)
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 4<<20), xapitest.VDISpec{})
	good := w.export(vdi)
	p, ask := w.startMeasured("--log-level=info")
	p.waitCalm(w)
	rest := p.fewestDescriptors()
	var before usage
	for i := 1; i <= cycles; i++ {
		w.cycle(p, i, good, vdi)
		switch i {
		case warm:
			w.waitClean(p)
			p.waitDescriptors(rest)
			before = ask()
		case cycles:
			w.waitClean(p)
			p.waitDescriptors(rest)
			after := ask()
			t.Logf("after %d cycles: %v", warm, before)
			t.Logf("after %d cycles: %v", cycles, after)
			if after.heap > before.heap+allowed {
				t.Errorf("heap in use grew by %d bytes, at most %d allowed", after.heap-before.heap, allowed)
			}
			if after.rss > before.rss+allowed {
				t.Errorf("RSS grew by %d bytes, at most %d allowed", after.rss-before.rss, allowed)
			}
		}
	}
}

// cycle is one client, of a kind that depends on i.
func (w *world) cycle(p *process, i int, good, vdi string) {
	w.t.Helper()
	switch i % 8 {
	case 0: // refused
		if conn, err := w.open(p, w.host.ExportName(vdi, "OpaqueRef:dead"), false); err == nil {
			conn.Close()
			w.t.Fatal("a session that was logged out was served")
		}
	case 1: // by NBD_OPT_EXPORT_NAME, ended by a reset
		conn, answer := w.exportName(p, good)
		if len(answer) != 134 {
			w.t.Fatalf("EXPORT_NAME: got %d bytes", len(answer))
		}
		conn.Close()
	case 2: // disconnects before it sends anything
		if client, err := w.dial(p, false); err == nil {
			_ = client.Abort()
		}
	default: // a transfer, every second one over TLS
		conn, err := w.open(p, good, i%2 == 0)
		if err != nil {
			w.t.Fatalf("cycle %d: %v", i, err)
		}
		if _, err := conn.ReadAt(make([]byte, 2<<20), 0); err != nil {
			w.t.Fatalf("cycle %d: %v", i, err)
		}
		conn.Close()
	}
}
