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

// The bounds of log lines that anybody who can connect can cause.
const (
	logWindow = time.Minute
	// logBurst is how many lines of one kind a peer address may cause in a window.
	logBurst = 10
	// logBurstAll is the same for all addresses together.
	logBurstAll = 100
	// maxLogKeys bounds the memory: pairs of address and kind that are told apart.
	maxLogKeys = 4096
	// maxLogSummaries is how many addresses get a summary line of their own.
	maxLogSummaries = 20
)

// boundedLog writes the log lines that anybody who can connect can cause:
// refusals, and handshakes that end without an export. The first lines of each
// kind and peer address are written as they come. What is beyond is counted, and
// once a minute one line per address tells how many of which kinds were left
// out. An address that goes on gets nothing but that line until it has been
// quiet for a window. The zero value is ready.
type boundedLog struct {
	mu      sync.Mutex // guards what follows
	lines   map[logKey]*logCount
	all     map[string]int // lines written in this window, by kind
	pending *time.Timer    // the end of the window; nil if there is nothing to count
}

// logKey is what lines are counted by. There are few kinds. The address is empty
// for all those beyond maxLogKeys.
type logKey struct{ host, kind string }

// logCount counts the lines of a window.
type logCount struct {
	seen, leftOut int
	noisy         bool // went beyond the burst in the window before
}

// otherPeers stands for the addresses that are not told apart.
const otherPeers = "other addresses"

// allow counts a line and reports whether it may be written. log is for the
// summary of those that may not.
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

// endWindow writes the summaries and begins the next window, unless there is
// nothing to remember.
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

// flush writes the summaries now. It is for the end of the service.
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

// take returns what was left out, by address and kind, and keeps the rest for the
// next window.
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

// logBounded writes a log line about a peer that may be anybody. The kind is one
// of a small set.
func (c *conn) logBounded(level slog.Level, kind, message string, args ...any) {
	ctx := context.Background()
	if c.log.Enabled(ctx, level) && c.srv.bounded.allow(c.srv.log, cmp.Or(c.host, "unix socket"), kind) {
		c.log.Log(ctx, level, message, args...)
	}
}
