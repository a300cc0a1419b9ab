//go:build !race

// The race detector's own memory would be measured, so these tests run without
// it: see the Makefile.

package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/xapi/xapitest"
)

// Many connections, ended in every way, leave nothing in memory: the original's
// users knew it for dying after some hundreds.
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
			w.t.Fatal("a dead session was served")
		}
	case 1: // the old way, abruptly ended
		conn, answer := w.exportName(p, good)
		if len(answer) != 134 {
			w.t.Fatalf("EXPORT_NAME: got %d bytes", len(answer))
		}
		conn.Close()
	case 2: // gone before it said anything
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

// usage is what a process holds.
type usage struct{ heap, rss int }

func (u usage) String() string {
	return fmt.Sprintf("heap in use %.2f MiB, RSS %.2f MiB", float64(u.heap)/(1<<20), float64(u.rss)/(1<<20))
}

// startMeasured starts the service and returns how to ask it, after a
// collection, what it holds.
func (w *world) startMeasured(flags ...string) (*process, func() usage) {
	w.t.Helper()
	questionsRead, questionsWrite, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	answersRead, answersWrite, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	w.childFiles = []*os.File{questionsRead, answersWrite}
	p := w.start(flags...)
	questionsRead.Close()
	answersWrite.Close()
	w.t.Cleanup(func() { questionsWrite.Close(); answersRead.Close() })
	answers := bufio.NewReader(answersRead)
	return p, func() usage {
		if _, err := questionsWrite.Write([]byte{'?'}); err != nil {
			w.t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			w.t.Fatal(err)
		}
		heap, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			w.t.Fatal(err)
		}
		return usage{heap: heap, rss: p.residentBytes()}
	}
}

func (p *process) descriptors() int {
	p.t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	return len(fds)
}

// fewestDescriptors is how many are open at rest. That of the last call to xapi may
// still be, so there are several looks.
func (p *process) fewestDescriptors() int {
	p.t.Helper()
	fewest := p.descriptors()
	for range 100 {
		fewest = min(fewest, p.descriptors())
	}
	return fewest
}

// waitDescriptors waits until no more descriptors are open than at rest. What is
// over when a VBD has gone from journal and host, is not closed yet.
func (p *process) waitDescriptors(rest int) {
	p.t.Helper()
	eventually(p.t, func() string {
		if open := p.descriptors(); open > rest {
			return fmt.Sprintf("%d descriptors are open, %d at rest: %q", open, rest, p.openFiles())
		}
		return ""
	})
}

// residentBytes is without the pages of files, which the kernel takes and brings
// back as it likes.
func (p *process) residentBytes() int {
	p.t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "status"))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				p.t.Fatal(err)
			}
			return kib << 10
		}
	}
	p.t.Fatal("no RssAnon")
	return 0
}
