package main

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// maxQueuedLog bounds what a log that is not taken may keep in memory, in bytes.
const maxQueuedLog = 1 << 20

// flushLimit is how long the end of the process waits for the log to be taken.
const flushLimit = 500 * time.Millisecond

// logQueue is a writer that never waits. A goroutine passes on what is written, in
// the same order. When too much waits, what comes next is dropped and counted, and
// the count is passed on at its place in the order as soon as there is room. A
// line whose writing fails, as on a full disk, counts as dropped as well.
type logQueue struct {
	out     io.Writer
	dropped func(lines int) []byte // the line that tells of dropped ones

	mu      sync.Mutex // guards what follows
	lines   []queuedLine
	bytes   int // of lines
	lost    int // lines dropped after the last of lines
	total   int64
	writing bool // one line has been taken off lines and is being written
	wake    *sync.Cond
}

// queuedLine is one line that waits.
type queuedLine struct {
	text []byte
	lost int // lines dropped right before it
}

// newLogQueue starts the goroutine, which is there until the process ends.
func newLogQueue(out io.Writer, dropped func(lines int) []byte) *logQueue {
	q := &logQueue{out: out, dropped: dropped}
	q.wake = sync.NewCond(&q.mu)
	go q.run()
	return q
}

// Write implements io.Writer. Each call is one line. It does not fail.
func (q *logQueue) Write(line []byte) (int, error) {
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

// drop counts lines that nobody will read; q.mu is held.
func (q *logQueue) drop(lines int) {
	q.lost += lines
	q.total += int64(lines)
}

// Dropped is how many lines have been dropped since the start.
func (q *logQueue) Dropped() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.total
}

// run passes lines on.
func (q *logQueue) run() {
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

// take waits for the next line. It has no text when there are only dropped lines
// to tell of.
func (q *logQueue) take() queuedLine {
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

// flush waits until everything has been passed on, for limit at most, and reports
// whether it has been.
func (q *logQueue) flush(limit time.Duration) bool {
	timer := time.AfterFunc(limit, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.wake.Broadcast()
	})
	defer timer.Stop()
	deadline := time.Now().Add(limit)
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.lines) > 0 || q.lost > 0 || q.writing {
		if !time.Now().Before(deadline) {
			return false
		}
		q.wake.Wait()
	}
	return true
}
