package logging

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// maxQueuedLog bounds the queued lines, in bytes.
const maxQueuedLog = 1 << 20

// FlushLimit is how long a process that ends waits for its log to be written.
const FlushLimit = 500 * time.Millisecond

// Queue is a writer that never blocks. A goroutine writes the lines in their order. When
// the queue is full, lines are dropped and counted, and a line with the count is written
// in their place. A line whose writing fails, as on a full disk, counts as dropped as
// well. Its methods may be called concurrently.
type Queue struct {
	out     io.Writer
	dropped func(lines int) []byte // returns the line that counts dropped ones

	mu      sync.Mutex // guards the fields below
	lines   []queuedLine
	bytes   int // of lines
	lost    int // lines dropped after the last of lines
	total   int64
	writing bool // one line has been taken off lines and is being written
	wake    *sync.Cond
}

// queuedLine is a line in the queue.
type queuedLine struct {
	text []byte
	lost int // lines dropped right before it
}

// newQueue starts the goroutine, which runs until the process ends.
func newQueue(out io.Writer, dropped func(lines int) []byte) *Queue {
	q := &Queue{out: out, dropped: dropped}
	q.wake = sync.NewCond(&q.mu)
	go q.run()
	return q
}

// Write implements io.Writer. Each call is one line. It does not fail.
func (q *Queue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes+len(line) > maxQueuedLog {
		q.drop(1)
		return len(line), nil
	}
	q.lines = append(q.lines, queuedLine{bytes.Clone(line), q.lost})
	q.bytes += len(line)
	q.lost = 0
	q.wake.Broadcast()
	return len(line), nil
}

// drop counts lines that are not written; q.mu is held.
func (q *Queue) drop(lines int) {
	q.lost += lines
	q.total += int64(lines)
}

// Dropped returns the number of dropped lines since the start.
func (q *Queue) Dropped() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.total
}

// run writes lines.
func (q *Queue) run() {
	failing := 0 // lines that could not be written since the last that could
	for {
		line := q.take()
		if lost := line.lost + failing; lost > 0 {
			if _, err := q.out.Write(q.dropped(lost)); err == nil {
				failing = 0
			} else {
				failing = lost
			}
		}
		if len(line.text) > 0 {
			if _, err := q.out.Write(line.text); err != nil {
				failing++
				q.mu.Lock()
				q.total++
				q.mu.Unlock()
			}
		}
	}
}

// take waits for the next line. It has no text if only a count of dropped lines is to be
// written.
func (q *Queue) take() queuedLine {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.writing = false
	q.wake.Broadcast()
	for len(q.lines) == 0 && q.lost == 0 {
		q.wake.Wait()
	}
	q.writing = true
	if len(q.lines) == 0 {
		line := queuedLine{lost: q.lost}
		q.lost = 0
		return line
	}
	line := q.lines[0]
	q.lines[0] = queuedLine{}
	q.lines = q.lines[1:]
	q.bytes -= len(line.text)
	return line
}

// Flush waits until every line has been written, for limit at most, and reports whether
// all have been.
func (q *Queue) Flush(limit time.Duration) bool {
	expired := false // guarded by q.mu
	timer := time.AfterFunc(limit, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		expired = true
		q.wake.Broadcast()
	})
	defer timer.Stop()
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.lines) > 0 || q.lost > 0 || q.writing {
		if expired {
			return false
		}
		q.wake.Wait()
	}
	return true
}
