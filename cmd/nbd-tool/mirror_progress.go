package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"

	"xapi-nbd/mirror"
)

// The times between two lines about the progress.
const (
	terminalInterval = time.Second
	linesInterval    = 5 * time.Second
)

// mirrorProgress shows the progress of a mirror: one line that is replaced on a terminal, lines
// on request, and otherwise nothing.
type mirrorProgress struct {
	w      io.Writer
	ticker *time.Ticker // nil: nothing is shown
	begin  string       // what is written before a line
	end    string       // what is written after it
	last   string       // what is written after the last line
}

func newMirrorProgress(w io.Writer, lines bool) *mirrorProgress {
	f, ok := w.(*os.File)
	switch {
	case isDaemon(): // has given up its terminal
	case lines:
		return &mirrorProgress{w: w, ticker: time.NewTicker(linesInterval), end: "\n"}
	case ok && term.IsTerminal(int(f.Fd())):
		return &mirrorProgress{w: w, ticker: time.NewTicker(terminalInterval), begin: "\r", end: "\x1b[K", last: "\n"}
	}
	return &mirrorProgress{}
}

// ticks returns a channel that receives when the progress is to be shown.
func (p *mirrorProgress) ticks() <-chan time.Time {
	if p.ticker == nil {
		return nil
	}
	return p.ticker.C
}

// show writes the progress.
func (p *mirrorProgress) show(s mirror.Status) {
	fmt.Fprintf(p.w, "%smirror: %s%s", p.begin, progressText(s), p.end)
}

// finish ends the line. Nothing is shown after it.
func (p *mirrorProgress) finish() {
	if p.ticker == nil {
		return
	}
	p.ticker.Stop()
	p.ticker = nil
	fmt.Fprint(p.w, p.last)
}

// progressText describes the progress in one line.
func progressText(s mirror.Status) string {
	text := fmt.Sprintf("%v, %d of %d bytes to be copied", s.State, s.Dirty, s.Size)
	if s.Paused {
		return text + ", paused"
	}
	text += fmt.Sprintf(", %.1f MiB/s", s.Rate/(1<<20))
	if s.TimeLeft > 0 && s.Dirty > 0 {
		text += fmt.Sprintf(", %v left", max(s.TimeLeft.Round(time.Second), time.Second))
	}
	return text
}
