package mirror

// side is one of the two ends.
type side int

const (
	primary side = iota
	secondary
)

func (s side) String() string {
	if s == primary {
		return "primary"
	}
	return "secondary"
}

// kind is the kind of an operation.
type kind int

const (
	copying       kind = iota // by the mirror
	toPrimary                 // a client's change, of the primary only
	toBoth                    // a client's change, of the primary and then of the secondary
	afterwards                // a client's change, of the secondary after a pivot
	numberOfKinds = iota
)

// operation is a copy or a change that is in flight.
type operation struct {
	kind       kind
	begin, end int64    // bytes; multiples of the larger block size, or the end of the disk
	lossesThen [2]int64 // cache.lossesEver of both ends, when it began
	stalled    bool     // the client has its answer, and the secondary is still being written
}

// cache is what one end has not put on stable storage.
type cache struct {
	unflushed bitmap // changed since the last flush began
	flushing  bitmap // changed before the flush that is in flight began
	active    bool   // a flush that counts is in flight
	losses    int64  // of the device, as last noticed

	lossesEver int64 // changes of losses, and flushes that failed
}

// tracker decides what may be done next, and knows what may differ. It does no input or
// output, knows no time and has no lock: the mirror calls it with its own lock held.
type tracker struct {
	size, granule, granules int64

	dirty     bitmap
	failed    bitmap // dirty because the copy of it failed
	untouched bitmap // never written at the secondary, which reads as zeroes there
	ops       map[*operation]struct{}
	count     [numberOfKinds]int // operations of each kind
	caches    [2]cache

	mode    Mode
	stalled int // operations

	cursor   int64 // granule at which the next copy is looked for
	taken    int64 // granules in this pass
	passes   int   // that have ended
	left     int64 // dirty granules when the last pass ended
	stagnant int   // passes, one after the other, in which the dirty set has not shrunk
}

func newTracker(size, granule int64) *tracker {
	t := &tracker{size: size, granule: granule, granules: (size + granule - 1) / granule}
	t.ops = make(map[*operation]struct{})
	t.left = t.granules
	for _, b := range []*bitmap{&t.dirty, &t.failed, &t.untouched} {
		*b = newBitmap(t.granules)
	}
	for s := range t.caches {
		t.caches[s].unflushed, t.caches[s].flushing = newBitmap(t.granules), newBitmap(t.granules)
	}
	return t
}

// outwards returns the granules of which a range of bytes covers any part.
func (t *tracker) outwards(begin, end int64) (first, behind int64) {
	return begin / t.granule, (end + t.granule - 1) / t.granule
}

// put changes b for all granules of which a range of bytes covers any part.
func (t *tracker) put(b *bitmap, begin, end int64, member bool) {
	first, behind := t.outwards(begin, end)
	b.put(first, behind, member)
}

// overlaps reports whether an operation in flight has bytes in common with the range.
func (t *tracker) overlaps(begin, end int64) bool {
	for o := range t.ops {
		if o.begin < end && begin < o.end {
			return true
		}
	}
	return false
}

// blocking reports whether changes by clients are made at both ends.
func (t *tracker) blocking() bool { return t.mode == Blocking && t.stalled == 0 }

// small reports whether less than 1 % is dirty.
func (t *tracker) small() bool { return t.dirty.n == 0 || t.dirty.n*100 < t.granules }

// converge changes to mode Blocking when copying alone does no more. It reports whether it
// did.
func (t *tracker) converge() bool {
	if t.mode == Blocking || t.stalled > 0 || t.failed.n > 0 || !t.small() && t.stagnant < 2 {
		return false
	}
	t.mode = Blocking
	return true
}

// fallBack changes to mode Background. It reports whether it did.
func (t *tracker) fallBack() bool {
	changed := t.mode != Background
	t.mode, t.stagnant, t.left = Background, 0, t.granules
	return changed
}

// begin enters an operation. The caller has made sure that it may begin.
func (t *tracker) begin(k kind, begin, end int64) *operation {
	o := &operation{kind: k, begin: begin, end: end}
	for s := range t.caches {
		o.lossesThen[s] = t.caches[s].lossesEver
	}
	if k == toBoth {
		t.put(&t.untouched, begin, end, false)
	}
	t.ops[o] = struct{}{}
	t.count[k]++
	return o
}

// take begins a copy of the next dirty granules on which no operation is in flight, of
// limit bytes at most. It returns nil if there are none.
func (t *tracker) take(limit int64) *operation {
	begin, end := t.find(t.cursor, limit)
	if begin < 0 {
		t.endPass()
		if begin, end = t.find(0, limit); begin < 0 {
			return nil
		}
	}
	t.cursor = end
	t.taken += end - begin
	t.dirty.put(begin, end, false)
	return t.begin(copying, begin*t.granule, min(end*t.granule, t.size))
}

// endPass compares the dirty set with that at the end of the last pass, unless nothing was
// copied in this one.
func (t *tracker) endPass() {
	if t.taken == 0 {
		return
	}
	if t.dirty.n < t.left {
		t.stagnant = 0
	} else {
		t.stagnant++
	}
	t.left, t.taken, t.cursor = t.dirty.n, 0, 0
	t.passes++
}

// find returns the first granules from i on that can be copied, or -1.
func (t *tracker) find(i, limit int64) (begin, end int64) {
	for i = t.dirty.next(i); i >= 0; i = t.dirty.next(i) {
		end := min(i+max(limit/t.granule, 1), t.granules)
		busyUntil := int64(0)
		for o := range t.ops {
			first, behind := t.outwards(o.begin, o.end)
			switch {
			case first <= i && i < behind:
				busyUntil = max(busyUntil, behind)
			case first > i:
				end = min(end, first)
			}
		}
		if busyUntil > 0 {
			i = busyUntil
			continue
		}
		n := i + 1
		for n < end && t.dirty.has(n) {
			n++
		}
		return i, n
	}
	return -1, -1
}

// remove takes an operation that has ended out of the table.
func (t *tracker) remove(o *operation) {
	delete(t.ops, o)
	t.count[o.kind]--
	if o.stalled {
		t.stalled--
	}
}

// lost reports whether an end may have lost what o has done.
func (t *tracker) lost(o *operation, s side) bool { return o.lossesThen[s] != t.caches[s].lossesEver }

// endCopy ends a copy. written is whether the secondary was changed. The losses of both ends
// have been noticed.
func (t *tracker) endCopy(o *operation, written bool, err error) {
	if written {
		t.put(&t.caches[secondary].unflushed, o.begin, o.end, true)
	}
	if err != nil || t.lost(o, primary) || t.lost(o, secondary) {
		t.put(&t.dirty, o.begin, o.end, true)
	}
	t.put(&t.failed, o.begin, o.end, err != nil)
	t.remove(o)
}

// endChange ends a change by a client. synced is whether it was made at the secondary, too.
// The losses of both ends have been noticed.
func (t *tracker) endChange(o *operation, synced bool) {
	if o.kind != afterwards {
		t.put(&t.caches[primary].unflushed, o.begin, o.end, true)
	}
	if o.kind != toPrimary {
		t.put(&t.caches[secondary].unflushed, o.begin, o.end, true)
	}
	if !synced || t.lost(o, primary) || t.lost(o, secondary) {
		t.put(&t.dirty, o.begin, o.end, true)
	}
	t.remove(o)
}

// stall makes the range of a change dirty whose client is answered before the secondary has it.
func (t *tracker) stall(o *operation) {
	o.stalled = true
	t.stalled++
	t.put(&t.dirty, o.begin, o.end, true)
}

// noteLosses compares the number of losses of an end with the last one. It reports whether
// changes may have been lost.
func (t *tracker) noteLosses(s side, losses int64) bool {
	if t.caches[s].losses == losses {
		return false
	}
	t.caches[s].losses = losses
	return t.lose(s)
}

// lose makes all granules dirty that an end has not flushed. They stay unflushed: perhaps
// nothing was lost yet. It reports whether there were any.
func (t *tracker) lose(s side) bool {
	c := &t.caches[s]
	c.lossesEver++
	c.unflushed.add(&c.flushing)
	c.flushing.clear()
	t.dirty.add(&c.unflushed)
	return c.unflushed.n > 0
}

// beginFlush begins a flush of an end. It reports whether the flush counts: only one at a
// time does. The caller passes the result to endFlush.
func (t *tracker) beginFlush(s side) bool {
	c := &t.caches[s]
	if c.active {
		return false
	}
	c.active = true
	c.unflushed, c.flushing = c.flushing, c.unflushed
	return true
}

// endFlush ends a flush. The losses of the end have been noticed. It reports whether changes
// may have been lost.
func (t *tracker) endFlush(s side, counts bool, err error) bool {
	c := &t.caches[s]
	if counts {
		c.active = false
	}
	if err != nil {
		return t.lose(s)
	}
	if counts {
		c.flushing.clear()
	}
	return false
}

// flushed reports whether an end has put all changes on stable storage.
func (t *tracker) flushed(s side) bool {
	return t.caches[s].unflushed.n == 0 && t.caches[s].flushing.n == 0
}

// inSync reports whether both ends are equal, and the secondary keeps that.
func (t *tracker) inSync() bool {
	return t.dirty.n == 0 && len(t.ops) == 0 && t.flushed(secondary)
}

// clean reports whether the granules of a range of bytes are equal at both ends and on stable
// storage.
func (t *tracker) clean(begin, end int64) bool {
	first, behind := t.outwards(begin, end)
	if t.dirty.any(first, behind) || t.overlaps(first*t.granule, behind*t.granule) {
		return false
	}
	for s := range t.caches {
		c := &t.caches[s]
		if c.unflushed.any(first, behind) || c.flushing.any(first, behind) {
			return false
		}
	}
	return true
}
