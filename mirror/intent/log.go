package intent

import (
	"context"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"
	"time"

	"xapi-nbd/internal/fsys"
)

// settle is the time since the last write after which a region may be cleared. It keeps a
// region that is written again and again from costing a sync each time.
const settle = 5 * time.Second

// Log is an open write-intent log. Its methods may be called concurrently.
type Log struct {
	file    fsys.File
	path    string
	resumed bool

	mu     sync.Mutex
	closed bool
	// now is the wanted content. The next change writes it to all slots but the one number
	// kept, which has the durable content.
	now  slot
	kept int
	// durable has the regions that a process which opens the file at any later moment finds in
	// it. During a change these are the ones that are in the old content and in the new one.
	durable bitmap
	// changing is the change that is being written, or nil. Changes have numbers from 1:
	// begun is the last one that has begun, saved the last one that was successful.
	changing     *change
	begun, saved uint64
	// writes counts the calls of Mark without Done in each region; ended has the time of the
	// last Done in those that are listed.
	writes map[int]int
	ended  map[int]time.Time
}

// change is one write of the file. Concurrent calls share it.
type change struct {
	number uint64
	bits   bitmap
	done   chan struct{}
	err    error // valid after done is closed
}

// Resumed reports whether the log existed when it was opened.
func (l *Log) Resumed() bool { return l.resumed }

// Dirty returns the ranges that are listed at this moment, as offset and length in bytes, in
// order. Adjacent regions are one range.
func (l *Log) Dirty() iter.Seq2[int64, int64] {
	l.mu.Lock()
	bits, d := slices.Clone(l.now.bits), l.now.description
	l.mu.Unlock()
	return func(yield func(off, n int64) bool) {
		for i := 0; i < d.regions(); i++ {
			if !bits.has(i) {
				continue
			}
			first := i
			for i+1 < d.regions() && bits.has(i+1) {
				i++
			}
			off, _ := d.region(first)
			last, n := d.region(i)
			if !yield(off, last+n-off) {
				return
			}
		}
	}
}

// DirtyBytes returns the sum of the lengths that Dirty returns.
func (l *Log) DirtyBytes() (sum int64) {
	for _, n := range l.Dirty() {
		sum += n
	}
	return sum
}

// region returns the offset and the length of a region.
func (d description) region(i int) (off, n int64) {
	off = int64(i) * d.Region
	return off, min(d.Region, d.Size-off)
}

// Mark lists the regions of a range of bytes, and returns when they are in the file durably.
// It has to be called before each write, zeroing or trim of the primary begins, in all modes
// of the mirror. After an error the write must not begin. Otherwise the caller calls Done.
//
// Mark does no I/O if all the regions are listed already.
func (l *Log) Mark(ctx context.Context, off, n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	first, last, err := l.regionsOf(off, n)
	if err != nil {
		return err
	}
	if err := l.usable(); err != nil {
		return err
	}
	for i := first; i <= last; i++ {
		l.writes[i]++
		l.now.bits.set(i)
	}
	if l.durable.hasAll(first, last) {
		return nil
	}
	number := l.begun + 1
	if l.changing != nil && l.changing.bits.hasAll(first, last) {
		number = l.changing.number
	}
	if err := l.save(ctx, number); err != nil {
		for i := first; i <= last; i++ {
			l.leave(i)
		}
		return err
	}
	return nil
}

// Done ends what one successful Mark of the same range began. It has to be called when the
// write has ended, successful or not, and the caller either counts the range as not equal
// (see Clear) or has written it to the secondary.
func (l *Log) Done(off, n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first, last, err := l.regionsOf(off, n)
	if err != nil {
		return // so was the Mark
	}
	for i := first; i <= last; i++ {
		l.leave(i)
		l.ended[i] = time.Now()
	}
}

// leave ends one write in a region. l.mu is held.
func (l *Log) leave(i int) {
	if l.writes[i]--; l.writes[i] <= 0 {
		delete(l.writes, i)
	}
}

// Clear removes regions from the file. It has to be called after successful flushes of both
// ends; began is the time before these flushes. A region is removed if it has no Mark without
// Done, if its last Done was at least 5 s ago and before began, and if equal returns true for
// its range.
//
// equal has to report whether both ends are known to be equal in the whole range and have
// flushed it: nothing is left to be copied, being copied, being written, or unflushed. It is called with the lock of the log held, so it must not call the log.
//
// After an error the file may list more regions than necessary, which is safe.
func (l *Log) Clear(ctx context.Context, began time.Time, equal func(off, n int64) bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	now, cleared := time.Now(), false
	for i := range l.now.regions() {
		ended, written := l.ended[i]
		if !l.now.bits.has(i) || l.writes[i] > 0 || written && (now.Sub(ended) < settle || !ended.Before(began)) {
			continue
		}
		if equal(l.now.region(i)) {
			l.now.bits.unset(i)
			delete(l.ended, i)
			cleared = true
		}
	}
	if !cleared {
		return nil
	}
	return l.save(ctx, l.begun+1)
}

// Complete records durably that the mirror ended with both ends equal. The file is kept and
// can not be resumed afterwards, as the secondary may get newer data: at once if pivot, which
// means that the clients go on with the secondary. Complete has to be called while no write is
// under way, after the last flush of both ends, and before anything is written to the
// secondary alone. After an error the mirror has not ended, and may go on; one error is a Mark
// without Done.
func (l *Log) Complete(ctx context.Context, pivot bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.changing != nil { // its writer must not take the end into its next change
		if err := l.wait(ctx, l.changing); err != nil {
			return err
		}
	}
	if err := l.usable(); err != nil {
		return err
	}
	if len(l.writes) > 0 {
		return fmt.Errorf("write-intent log %s: a write is under way", l.path)
	}
	before := l.now.description
	at := time.Now().UTC().Truncate(time.Second)
	l.now.Ended, l.now.EndedAt = endedStop, &at
	if pivot {
		l.now.Ended = endedPivot
	}
	// Twice, so that it is in all slots: whichever one is damaged later, no other one may make the
	// file look as if the mirror went on.
	c := l.change()
	if c.err == nil {
		c = l.change()
	}
	if c.err != nil {
		// The file may say that the mirror ended. The next Mark has to take that back.
		l.now.description = before
		l.durable = newBitmap(l.now.regions())
		return fmt.Errorf("write-intent log: %w", c.err)
	}
	return nil
}

// usable returns an error if the log is closed or the mirror has ended. l.mu is held.
func (l *Log) usable() error {
	switch {
	case l.closed:
		return fmt.Errorf("write-intent log %s: %w", l.path, os.ErrClosed)
	case l.now.Ended != "":
		return fmt.Errorf("write-intent log %s: %w", l.path, ErrCompleted)
	}
	return nil
}

// regionsOf returns the first and the last region of a range. If it is empty, last is less
// than first.
func (l *Log) regionsOf(off, n int64) (first, last int, err error) {
	if off < 0 || n < 0 || off > l.now.Size || n > l.now.Size-off {
		return 0, 0, fmt.Errorf("write-intent log %s: %d bytes at %d of %d", l.path, n, off, l.now.Size)
	}
	if n == 0 {
		return 0, -1, nil
	}
	return int(off / l.now.Region), int((off + n - 1) / l.now.Region), nil
}

// save returns when a change with that number or a later one is durable, or when such a
// change has failed. The number is of a change that was begun or of the next one. l.mu is
// held, but not during I/O.
func (l *Log) save(ctx context.Context, number uint64) error {
	for l.saved < number {
		c := l.changing
		if c == nil {
			c = l.change()
		} else if err := l.wait(ctx, c); err != nil {
			return err
		}
		if c.number >= number && c.err != nil {
			return fmt.Errorf("write-intent log: %w", c.err)
		}
	}
	return nil
}

// change writes the wanted content. l.mu is held, but not during I/O.
func (l *Log) change() *change {
	l.begun++
	l.now.generation++
	s := l.now
	s.bits = slices.Clone(s.bits)
	c := &change{number: l.begun, bits: s.bits, done: make(chan struct{})}
	l.changing = c
	l.durable.keep(c.bits)

	l.mu.Unlock()
	err := l.writeOthers(s) // only one change at a time uses l.kept
	l.mu.Lock()

	if err == nil {
		l.durable = slices.Clone(c.bits)
		l.saved = c.number
	}
	c.err = err
	l.changing = nil
	close(c.done)
	return c
}

// wait waits for a change. l.mu is held, but not meanwhile.
func (l *Log) wait(ctx context.Context, c *change) error {
	l.mu.Unlock()
	defer l.mu.Lock()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close unlocks and closes the file. The log keeps its content for the next process. All later
// calls of Mark and Complete fail.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	l.closed = true
	for l.changing != nil {
		_ = l.wait(context.Background(), l.changing) // never fails
	}
	return l.file.Close()
}
