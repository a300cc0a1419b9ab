// Package progress shows the progress of a transfer: a bar on a terminal, lines on request,
// and otherwise nothing.
package progress

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// interval is the time between lines.
const interval = 5 * time.Second

// Meter counts bytes. Its methods may be called concurrently; it has no
// goroutine.
type Meter struct {
	bar   *progressbar.ProgressBar // nil: no bar
	w     io.Writer
	label string
	total int64
	start time.Time

	mu   sync.Mutex // guards the fields below
	done int64
	last time.Time // of the newest line; zero: no lines
}

// New returns a Meter for a transfer of total bytes. label names the transfer. The Meter
// writes a bar to w if that is a terminal, or lines if lines is set.
func New(w io.Writer, label string, total int64, lines bool) *Meter {
	m := &Meter{w: w, label: label, total: total, start: time.Now()}
	f, ok := w.(*os.File)
	switch {
	case lines:
		m.last = m.start
	case ok && term.IsTerminal(int(f.Fd())):
		m.bar = progressbar.NewOptions64(max(total, 1), // 0 would make it a spinner
			progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(label), progressbar.OptionFullWidth(),
			progressbar.OptionShowBytes(true), progressbar.OptionShowTotalBytes(true), progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond))
	}
	return m
}

// Add counts n more bytes.
func (m *Meter) Add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done += n
	if m.bar != nil {
		_ = m.bar.Add64(n)
	}
	if now := time.Now(); !m.last.IsZero() && now.Sub(m.last) >= interval {
		m.last = now
		m.line(now)
	}
}

// Done returns the number of bytes that have been counted.
func (m *Meter) Done() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.done
}

// Finish ends the bar or writes the last line. Add must not be called after it.
func (m *Meter) Finish() {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.bar != nil:
		_ = m.bar.Exit() // keeps its state: a failed transfer is not complete
		fmt.Fprintln(m.w)
	case !m.last.IsZero():
		m.line(time.Now())
	}
}

// line writes the share that is done, the rate and the remaining time.
func (m *Meter) line(now time.Time) {
	elapsed := now.Sub(m.start)
	percent := 100.0
	if m.total > 0 {
		percent = 100 * float64(m.done) / float64(m.total)
	}
	text := fmt.Sprintf("%s: %.1f %%, %d of %d bytes", m.label, percent, m.done, m.total)
	if elapsed > 0 && m.done > 0 {
		rate := float64(m.done) / elapsed.Seconds()
		text += fmt.Sprintf(", %.1f MiB/s", rate/(1<<20))
		if m.done < m.total {
			left := time.Duration(float64(m.total-m.done) / rate * float64(time.Second))
			text += fmt.Sprintf(", %v left", max(left.Round(time.Second), time.Second))
		}
	}
	fmt.Fprintln(m.w, text)
}
