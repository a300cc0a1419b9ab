package nbd

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// The bounds of log lines that any peer can cause.
const (
	logWindow = time.Minute
	// logBurst is how many lines of one kind a peer address may cause in a window.
	logBurst = 10
	// logBurstAll is the same for all addresses together.
	logBurstAll = 100
	// maxLogKeys bounds the memory: the pairs of address and kind that are counted apart.
	maxLogKeys = 4096
	// maxLogSummaries is how many addresses get a summary line of their own.
	maxLogSummaries = 20
)

// boundedLog bounds the log lines that any peer can cause: refusals, and handshakes that
// end without an export. The first lines of each kind and peer address are written. Further
// lines are only counted, and once a minute one line per address has the number of lines of
// each kind that were left out. An address that reached the bound gets only that line until
// it has caused no more than the bound in one window. The zero value is ready for use.
type boundedLog struct {
	mu      sync.Mutex // guards the fields below
	lines   map[logKey]*logCount
	all     map[string]int // lines written in this window, by kind
	pending *time.Timer    // the end of the window; nil if there is nothing to count
}

// logKey identifies a counter. There are few kinds. The address is otherPeers for those
// beyond maxLogKeys.
type logKey struct{ host, kind string }

// logCount counts the lines of a window.
type logCount struct {
	seen, leftOut int
	noisy         bool // above the burst in the window before
}

// otherPeers stands for the addresses that are not counted apart.
const otherPeers = "other addresses"

// allow counts a line and reports whether it may be written. log is for the summary of the
// lines that may not.
func (b *boundedLog) allow(log *slog.Logger, host, kind string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pending == nil {
		b.lines, b.all = make(map[logKey]*logCount), make(map[string]int)
		b.pending = time.AfterFunc(logWindow, func() { b.endWindow(log) })
	}
	count := b.count(logKey{host, kind})
	count.seen++
	if count.noisy || count.seen > logBurst || b.all[kind] >= logBurstAll {
		count.leftOut++
		return false
	}
	b.all[kind]++
	return true
}

func (b *boundedLog) count(key logKey) *logCount {
	if count := b.lines[key]; count != nil {
		return count
	}
	if len(b.lines) >= maxLogKeys {
		key.host = otherPeers
		if count := b.lines[key]; count != nil {
			return count
		}
	}
	count := new(logCount)
	b.lines[key] = count
	return count
}

// endWindow writes the summaries, and begins the next window if any address is noisy.
func (b *boundedLog) endWindow(log *slog.Logger) {
	b.mu.Lock()
	if b.pending == nil {
		b.mu.Unlock()
		return // flushed meanwhile
	}
	leftOut := b.take()
	if len(b.lines) == 0 {
		b.pending = nil
	} else {
		b.pending.Reset(logWindow)
	}
	b.mu.Unlock()
	summarize(log, leftOut)
}

// flush writes the summaries now. It is for the end of a Server.
func (b *boundedLog) flush(log *slog.Logger) {
	b.mu.Lock()
	if b.pending == nil {
		b.mu.Unlock()
		return
	}
	b.pending.Stop()
	b.pending = nil
	leftOut := b.take()
	b.mu.Unlock()
	summarize(log, leftOut)
}

// take returns the numbers of lines that were left out, by address and kind, and resets
// the counters for the next window; b.mu is held.
func (b *boundedLog) take() map[string]map[string]int {
	leftOut := make(map[string]map[string]int)
	for key, count := range b.lines {
		if count.leftOut > 0 {
			if leftOut[key.host] == nil {
				leftOut[key.host] = make(map[string]int)
			}
			leftOut[key.host][key.kind] = count.leftOut
		}
		if *count = (logCount{noisy: count.seen > logBurst}); !count.noisy {
			delete(b.lines, key)
		}
	}
	clear(b.all)
	return leftOut
}

// summarize writes one line for each of the addresses with the most lines, and one
// for the rest.
func summarize(log *slog.Logger, leftOut map[string]map[string]int) {
	sum := func(kinds map[string]int) (n int) {
		for _, k := range kinds {
			n += k
		}
		return n
	}
	hosts := slices.SortedFunc(maps.Keys(leftOut), func(a, b string) int {
		return cmp.Or(cmp.Compare(sum(leftOut[b]), sum(leftOut[a])), cmp.Compare(a, b))
	})
	rest, addresses := make(map[string]int), 0
	for i, host := range hosts {
		if kinds := leftOut[host]; i < maxLogSummaries && host != otherPeers {
			log.Warn("log lines left out", "remote", host, "count", sum(kinds), "kinds", kindsText(kinds))
			continue
		}
		addresses++
		for kind, n := range leftOut[host] {
			rest[kind] += n
		}
	}
	if addresses > 0 {
		log.Warn("log lines left out", "remote", otherPeers, "count", sum(rest), "kinds", kindsText(rest))
	}
}

func kindsText(kinds map[string]int) string {
	parts := make([]string, 0, len(kinds))
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		parts = append(parts, fmt.Sprintf("%s %d", kind, kinds[kind]))
	}
	return strings.Join(parts, ", ")
}

// logBounded logs a line that any peer can cause, within the bounds. There must be few
// kinds.
func (c *conn) logBounded(level slog.Level, kind, message string, args ...any) {
	ctx := context.Background()
	if c.log.Enabled(ctx, level) && c.srv.bounded.allow(c.srv.log, cmp.Or(c.host, "unix socket"), kind) {
		c.log.Log(ctx, level, message, args...)
	}
}
