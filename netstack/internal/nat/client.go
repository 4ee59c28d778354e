package nat

import "math/bits"

// client is what one address that opens flows has of the table.
type client struct {
	addr       [16]byte
	flows      int // all
	live       int // but closed ones
	halfOpen   int
	ports      [NumClasses]int
	opening    list // half-open flows, oldest first
	tokens     float32
	filled     uint32 // when tokens were added, coarse
	bucket     int    // list of t.halfOpen it is in, -1 = none
	prev, next *client
}

func (t *Table) clientOf(a [16]byte) *client {
	c := t.clients[a]
	if c == nil {
		c = &client{addr: a, bucket: -1, tokens: float32(t.set.FlowRatePerClient), filled: t.now}
		t.clients[a] = c
	}
	return c
}

// leaveClient takes a removed flow off its client.
func (t *Table) leaveClient(f *Flow, state uint32) {
	c := t.clientOf(f.Client())
	c.flows--
	if !isClosed(state) {
		c.live--
	}
	if c.flows == 0 {
		delete(t.clients, c.addr)
	}
}

// allowRate takes a token of a client.
func (t *Table) allowRate(now uint32, c *client) bool {
	rate := float32(t.set.FlowRatePerClient)
	if rate == 0 {
		return true
	}
	const perSecond = 1e9 / (1 << coarseShift)
	if passed := int32(now - c.filled); passed > 0 {
		c.tokens = min(rate, c.tokens+float32(passed)*rate/perSecond)
		c.filled = now
	}
	if c.tokens < 1 {
		return false
	}
	c.tokens--
	return true
}

// closedList is where a closed flow waits.
func (t *Table) closedList(f *Flow) *list {
	if f.Mapped() {
		return &t.pools[f.pool].closed
	}
	return &t.closed
}

// joinLists puts a flow into the list of its state.
func (t *Table) joinLists(id uint32, f *Flow) {
	switch s := f.state.Load(); {
	case isHalfOpen(s):
		c := t.clientOf(f.Client())
		t.enlist(&c.opening, id, f)
		c.halfOpen++
		t.rebucket(c)
	case isClosed(s):
		t.enlist(t.closedList(f), id, f)
	}
}

// leaveLists is the inverse of joinLists.
func (t *Table) leaveLists(f *Flow, state uint32) {
	switch {
	case isHalfOpen(state):
		c := t.clientOf(f.Client())
		t.unlist(&c.opening, f)
		c.halfOpen--
		t.rebucket(c)
	case isClosed(state):
		t.unlist(t.closedList(f), f)
	}
}

// rebucket puts a client into the list of those with about as many half-open flows.
func (t *Table) rebucket(c *client) {
	want := bits.Len(uint(c.halfOpen)) - 1 // -1 for none
	if want == c.bucket {
		return
	}
	if c.bucket >= 0 {
		if c.prev != nil {
			c.prev.next = c.next
		} else {
			t.halfOpen[c.bucket] = c.next
		}
		if c.next != nil {
			c.next.prev = c.prev
		}
	}
	c.bucket, c.prev, c.next = want, nil, nil
	if want >= 0 {
		c.next = t.halfOpen[want]
		if c.next != nil {
			c.next.prev = c
		}
		t.halfOpen[want] = c
	}
}

// makeRoom removes one flow that may go: the longest closed one, else the oldest
// half-open one of a client that has most of them. Established flows never go
// (decision D4).
func (t *Table) makeRoom() bool {
	id := t.expendable()
	if id == 0 {
		return false
	}
	t.remove(id, t.flow(id), Evicted)
	return true
}

// expendable returns the flow that makes room for another, 0 if none may go.
func (t *Table) expendable() (oldest uint32) {
	try := func(id uint32) {
		if id != 0 && (oldest == 0 || int32(t.flow(id).last.Load()-t.flow(oldest).last.Load()) < 0) {
			oldest = id
		}
	}
	try(t.closed.first)
	for _, p := range t.pools[1:] {
		try(p.closed.first)
	}
	for i := len(t.halfOpen) - 1; i >= 0 && oldest == 0; i-- {
		if c := t.halfOpen[i]; c != nil {
			oldest = c.opening.first
		}
	}
	return oldest
}
