package nat

import "runtime"

// wheel orders flows by when they may have to go. Nothing moves a flow in it that makes
// it stay longer, no packet and no new state: when its time comes, it gets a later one. Each
// slot is half a second, and times beyond the last slot are looked at again.
type wheel struct {
	slots [wheelSlots]uint32 // first flow of each
	at    uint32             // next slot to be looked at, counted from the beginning
}

const (
	wheelSlots = 512
	tickShift  = 3 // coarse units per slot: 0.54 s
	// headMark marks the link of a slot's first flow, which is the slot.
	headMark = 1 << 31
	// sweepStep is how many flows are looked at while the lock is held: some 12 µs.
	sweepStep = 32
)

// add puts a flow in. Its direction 0 has the link to the next one, 1 to the
// previous one.
func (w *wheel) add(t *Table, id uint32, f *Flow) {
	due := (f.last.Load() + t.idle[ClassOf(f.Proto())][f.state.Load()&stateMask] + 1) >> tickShift
	slot := min(max(due, w.at), w.at+wheelSlots-1) % wheelSlots
	next := w.slots[slot]
	f.dir[0].timer, f.dir[1].timer = next, headMark|slot
	if next != 0 {
		t.flow(next).dir[1].timer = id
	}
	w.slots[slot] = id
}

// remove takes a flow out.
func (w *wheel) remove(t *Table, f *Flow) {
	next, prev := f.dir[0].timer, f.dir[1].timer
	if next != 0 {
		t.flow(next).dir[1].timer = prev
	}
	if prev&headMark != 0 {
		w.slots[prev&^headMark] = next
	} else {
		t.flow(prev).dir[0].timer = next
	}
}

// id returns the number of a flow.
func (w *wheel) id(t *Table, f *Flow) uint32 {
	if prev := f.dir[1].timer; prev&headMark == 0 {
		return t.flow(prev).dir[0].timer
	} else {
		return w.slots[prev&^headMark]
	}
}

// Sweep removes flows that were idle too long. It holds the lock for short times
// only, however many there are.
func (t *Table) Sweep(now int64) {
	for more := true; more; {
		t.mu.Lock()
		more = t.sweepSome(Coarse(now))
		t.mu.Unlock()
		// Who waits for the lock is awake later than this goroutine has it again: without
		// this it would wait for many rounds.
		runtime.Gosched()
	}
}

// quiet reports that no reader is in the table, so that all removed flows can be
// reclaimed now. t.mu is held.
func (t *Table) quiet() bool {
	for _, r := range *t.readers.Load() {
		if r.epoch.Load() != 0 {
			return false
		}
	}
	return true
}

// sweepSome looks at some flows whose time has come; false when there are no
// more. t.mu is held.
func (t *Table) sweepSome(now uint32) bool {
	w := &t.wheel
	t.now = max(t.now, now)
	t.reclaim()
	target := now >> tickShift
	if int32(target-w.at) > wheelSlots {
		w.at = target - wheelSlots // the clock jumped: one turn sees all
	}
	for left := sweepStep; int32(target-w.at) > 0; left-- {
		if left == 0 {
			return true
		}
		id := w.slots[w.at%wheelSlots]
		if id == 0 {
			w.at++
			continue
		}
		f := t.flow(id)
		if t.expired(now, f) {
			t.remove(id, f, t.ending(f))
			continue
		}
		w.remove(t, f)
		w.add(t, id, f)
	}
	left := expireStep
	for _, p := range t.pools[1:] {
		if left = p.expire(t, now, left); left == 0 {
			return true
		}
	}
	return t.limbo.first != 0 && t.quiet()
}
