//go:build !race

package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// usage is the memory of a process, in bytes.
type usage struct{ heap, rss int }

func (u usage) String() string {
	return fmt.Sprintf("heap in use %.2f MiB, RSS %.2f MiB", float64(u.heap)/(1<<20), float64(u.rss)/(1<<20))
}

// startMeasured starts the service and returns a function that reads its memory after a
// garbage collection.
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

// fewestDescriptors returns the number of open descriptors at rest. It counts several times,
// as that of the last call to xapi may still be open.
func (p *process) fewestDescriptors() int {
	p.t.Helper()
	fewest := p.descriptors()
	for range 100 {
		fewest = min(fewest, p.descriptors())
	}
	return fewest
}

// waitDescriptors waits until no more descriptors are open than at rest. Some are closed only
// after the VBD has gone from journal and host.
func (p *process) waitDescriptors(rest int) {
	p.t.Helper()
	eventually(p.t, func() string {
		if open := p.descriptors(); open > rest {
			return fmt.Sprintf("%d descriptors are open, %d at rest: %q", open, rest, p.openFiles())
		}
		return ""
	})
}

// residentBytes returns the resident memory without pages of files, whose number depends on
// the kernel.
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
