package main

import (
	"path/filepath"
	"regexp"
)

// ops waits for the end of the process and returns its operations, in order.
func (tr *tracer) ops(w *crashWorld) (ops []point) {
	seen := make(map[point]int)
	for line := range tr.lines {
		if op, ok := w.parseOp(line); ok {
			seen[op]++
			op.n = seen[op]
			ops = append(ops, op)
		}
	}
	return ops
}

// opLine is an operation as strace prints it: on an open file, or on a name.
var opLine = regexp.MustCompile(`^(?:\[pid +\d+\] )?(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD<[^>]*>, )?"([^"]*)")`)

// ofPoller are operations of Go's poller on a file. They have no effect after the end of the
// process.
var ofPoller = map[string]bool{"fcntl": true, "epoll_ctl": true}

// parseOp returns the point of a line, without its number. The second line of an operation
// that strace prints in two is not counted again.
func (w *crashWorld) parseOp(line string) (op point, ok bool) {
	m := opLine.FindStringSubmatch(line)
	if m == nil || ofPoller[m[1]] {
		return point{}, false
	}
	name := m[2] + m[3]
	if name == w.name(imageFile) {
		return point{what: m[1], file: imageFile}, true
	}
	rel, err := filepath.Rel(w.dir, name)
	if err != nil || !filepath.IsLocal(rel) {
		w.t.Errorf("not a file of this world: %s", line)
	}
	return point{what: m[1], file: rel}, true
}

// imageFile replaces the name of the file behind the VDI, which is random.
const imageFile = "image"

// name returns the path of a point's file in this world.
func (w *crashWorld) name(file string) string {
	if file == imageFile {
		return w.host.ImagePath(w.vdi)
	}
	return filepath.Join(w.dir, file)
}
