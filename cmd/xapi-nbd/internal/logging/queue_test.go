package logging

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// patience bounds every wait of these tests. No step is expected to take that long.
const patience = 2 * time.Minute

// gatedLog is a log whose first write sends to entered and blocks until open is closed,
// unless they are nil. It fails with err.
type gatedLog struct {
	entered, open chan struct{}
	block         sync.Once
	text          bytes.Buffer
	err           error
}

func (l *gatedLog) Write(p []byte) (int, error) {
	l.block.Do(func() {
		if l.entered != nil {
			l.entered <- struct{}{}
			<-l.open
		}
	})
	if l.err != nil {
		return 0, l.err
	}
	return l.text.Write(p)
}

func testQueue(l *gatedLog) *Queue {
	return newQueue(l, func(lines int) []byte { return fmt.Appendf(nil, "dropped %d\n", lines) })
}

// TestLogQueueDropsAndCounts: lines are passed on in order. A line with the number of dropped
// ones is written in their place.
func TestLogQueueDropsAndCounts(t *testing.T) {
	const lineLen = maxQueuedLog / 8
	line := func(i int) string { return strings.Repeat(string(rune('a'+i)), lineLen-1) + "\n" }
	l := &gatedLog{entered: make(chan struct{}), open: make(chan struct{})}
	q := testQueue(l)
	var want strings.Builder
	for i := range 12 {
		if n, err := q.Write([]byte(line(i))); n != lineLen || err != nil {
			t.Fatalf("Write: got %d, %v", n, err)
		}
		if i == 0 {
			<-l.entered // the first line is being written and needs no room
		}
	}
	if q.Flush(time.Millisecond) {
		t.Error("flushed to a log that takes nothing")
	}
	dropped := int(q.Dropped())
	if dropped != 3 {
		t.Fatalf("dropped %d lines of 12, with room for 8 beside the first", dropped)
	}
	close(l.open)
	if !q.Flush(patience) {
		t.Fatal("not flushed")
	}
	io.WriteString(q, "last\n")
	if !q.Flush(patience) {
		t.Fatal("not flushed")
	}
	for i := range 12 - dropped {
		want.WriteString(line(i))
	}
	fmt.Fprintf(&want, "dropped %d\nlast\n", dropped)
	if got := l.text.String(); got != want.String() {
		t.Errorf("got %d bytes that end in %q, want %d that end in %q", len(got), got[max(0, len(got)-40):], want.Len(), want.String()[want.Len()-40:])
	}
}

// TestFlushEndsAtItsLimit: a flush ends at any limit, so that the process ends although its
// log is blocked.
func TestFlushEndsAtItsLimit(t *testing.T) {
	l := &gatedLog{entered: make(chan struct{}), open: make(chan struct{})}
	defer close(l.open)
	q := testQueue(l)
	io.WriteString(q, "one\n")
	<-l.entered
	for range 300 {
		if q.Flush(10 * time.Microsecond) {
			t.Fatal("flushed to a log that takes nothing")
		}
	}
}

// TestLogQueueCountsFailedWrites: while the disk of the log is full, dropped lines are
// counted.
func TestLogQueueCountsFailedWrites(t *testing.T) {
	l := &gatedLog{err: errors.New("no space left on device")}
	q := testQueue(l)
	io.WriteString(q, "one\n")
	io.WriteString(q, "two\n")
	if !q.Flush(patience) {
		t.Fatal("not flushed")
	}
	l.err = nil
	io.WriteString(q, "three\n")
	if !q.Flush(patience) {
		t.Fatal("not flushed")
	}
	if got, want := l.text.String(), "dropped 2\nthree\n"; got != want || q.Dropped() != 2 {
		t.Errorf("got %q and %d dropped, want %q", got, q.Dropped(), want)
	}
}

// TestDroppedLine: every format has a line about dropped lines.
func TestDroppedLine(t *testing.T) {
	for format, want := range map[string]string{
		"text": "level=warning", "json": `"level":"warning"`, "syslog": "<4>level=warning",
	} {
		_, formatter := logOutput(config.Config{LogFormat: format}, io.Discard)
		got := string(droppedLine(formatter, 7))
		if !strings.Contains(got, want) || !strings.Contains(got, "7") || !strings.HasSuffix(got, "\n") {
			t.Errorf("%s: got %q", format, got)
		}
	}
}

// TestSyslog: lines go to syslog with their priority, and to standard error without syslog.
func TestSyslog(t *testing.T) {
	var stderr bytes.Buffer
	path := filepath.Join(t.TempDir(), "log")
	s := &syslogWriter{fallback: &stderr, dial: func() (*syslog.Writer, error) {
		return syslog.Dial("unixgram", path, syslog.LOG_DAEMON|syslog.LOG_INFO, "xapi-nbd")
	}}
	io.WriteString(s, "<4>msg=early\n")
	if got := stderr.String(); got != "msg=early\n" {
		t.Errorf("without syslog: got %q", got)
	}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := make([]byte, 1024)
	for line, want := range map[string]string{"<3>msg=bad\n": "<27>", "<4>msg=bad\n": "<28>", "<6>msg=bad\n": "<30>", "<7>msg=bad\n": "<31>"} {
		if _, err := io.WriteString(s, line); err != nil {
			t.Error(err)
		}
		n, err := l.Read(b)
		if got := string(b[:n]); err != nil || !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "msg=bad\n") {
			t.Errorf("%q: got %q, %v, want priority %s", line, got, err, want)
		}
	}
}
