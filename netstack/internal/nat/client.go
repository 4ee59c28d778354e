package nat

import (
	"ztgate/netstack/internal/fair"
)

// holding is what somebody has of the table.
type holding struct {
	live  int32                // flows but closed ones
	ports [NumClasses][2]int32 // external ports by class, in all pools
}

// client is what one address that opens flows has of the table.
type client struct {
	key      clientKey
	member   uint8 // see Table.members
	standing standing
	holding
	flows   int32  // all
	evicted uint32 // flows that made room
	refused uint32
	tokens  float32
	filled  uint32             // when tokens were added, coarse
	opening list               // half-open flows, oldest first
	half    fair.Share[client] // their number
	shares  *portShare         // of ports that can be taken from it
	// Of those without flows: in the list of remembered ones, or the next spare one.
	earlier, later *client
}

// clientKey tells clients apart: networks may have the same addresses.
type clientKey struct {
	addr [16]byte
	from uint16 // 0 = the VPC, else the network's slot and one
}

func keyOfClient(addr [16]byte, side Side, slot uint16) clientKey {
	if side == VPC {
		return clientKey{addr: addr}
	}
	return clientKey{addr, slot + 1}
}

func (f *Flow) clientKey() clientKey { return keyOfClient(f.Client(), f.From(), f.Slot) }

// newClient makes the account of a client. Those of the VPC belong to no member.
func (t *Table) newClient(c *client, k clientKey, member uint64) {
	*c = client{key: k, tokens: float32(t.set.FlowRatePerClient), filled: t.now}
	if k.from != 0 {
		c.member = uint8(1 + mix(member^t.seed[4], uint64(k.from)^t.seed[5])%(maxMembers-1))
	}
	c.half = fair.Share[client]{Of: c, At: t.places.Place(uint64(c.member), &k.addr)}
}

// recentAt is where a client is that was looked for lately.
func (t *Table) recentAt(k *clientKey) **client {
	h := mix(le.Uint64(k.addr[:])^le.Uint64(k.addr[8:])^t.seed[4], uint64(k.from)^t.seed[5])
	return &t.recent[h%uint64(len(t.recent))]
}

// client returns a client, nil if it has no account.
func (t *Table) client(k clientKey) *client {
	at := t.recentAt(&k)
	if c := *at; c != nil && c.key == k {
		return c
	}
	c := t.clients[k]
	if c != nil {
		*at = c
	}
	return c
}

// clientFor returns the client that opens a flow.
func (t *Table) clientFor(k clientKey, member uint64) *client {
	c := t.client(k)
	switch {
	case c == nil:
		if c = t.spareClients; c != nil {
			t.spareClients = c.later
		} else {
			c = new(client)
		}
		t.newClient(c, k, member)
		t.clients[k] = c
	case c.flows == 0:
		t.remembered.remove(c)
	}
	return c
}

// clientOf returns the client of a flow in the table.
func (t *Table) clientOf(f *Flow) *client { return t.client(f.clientKey()) }

// leave takes a flow off the number of a client's flows.
func (t *Table) leave(c *client) {
	c.flows--
	switch {
	case c.flows > 0:
	case c.standing == proven:
		t.remember(c)
	default:
		t.forget(c)
	}
}

func (t *Table) forget(c *client) {
	delete(t.clients, c.key)
	if at := t.recentAt(&c.key); *at == c {
		*at = nil
	}
	c.later, t.spareClients = t.spareClients, c
}

// addLive counts flows of a client that aren't closed.
func (t *Table) addLive(c *client, n int) {
	c.live += int32(n)
	t.members[c.member].live += int32(n)
}

// addPort counts external ports of a client.
func (t *Table) addPort(c *client, class, portClass, n int) {
	c.ports[class][portClass] += int32(n)
	t.members[c.member].ports[class][portClass] += int32(n)
}

// portsOf returns how many external ports of a protocol class a holding has.
func (h *holding) portsOf(class int) int {
	return int(h.ports[class][lowPorts] + h.ports[class][highPorts])
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
func (t *Table) joinLists(c *client, id uint32, f *Flow) {
	switch s := f.state.Load(); {
	case isHalfOpen(s):
		t.enlist(&c.opening, id, f)
		t.halfOpen.add(c.standing, &c.half, 1)
	case isClosed(s):
		t.enlist(t.closedList(f), id, f)
	}
}

// leaveLists is the inverse of joinLists.
func (t *Table) leaveLists(c *client, f *Flow, state uint32) {
	switch {
	case isHalfOpen(state):
		t.unlist(&c.opening, f)
		t.halfOpen.add(c.standing, &c.half, -1)
	case isClosed(state):
		t.unlist(t.closedList(f), f)
	}
}

// memberFull reports an overlay member that has all the flows it may have, whatever
// addresses it uses.
func (t *Table) memberFull(c *client) bool {
	return c.member != 0 && t.memberFlows > 0 && int(t.members[c.member].live) >= t.memberFlows
}

// oldestOf returns the half-open flow that makes room for another one of a client or of its
// member; 0 if there is none.
func (t *Table) oldestOf(c *client, member bool) uint32 {
	if member {
		if other := t.halfOpen.near(c.half.At, t.older); other != nil && other.member == c.member {
			return other.opening.first
		}
	}
	return c.opening.first
}

// expendableFor returns the flow that makes room for one of a client, 0 if none may go.
// The last part of the table is for those who have few, also for as long as they wait for
// an answer: who has much takes nothing from them while they don't need more than that.
func (t *Table) expendableFor(c *client) uint32 {
	id := t.expendable()
	if id == 0 || int(c.live) < t.keepFor || t.halfOpen.count() > t.kept || !isHalfOpen(t.flow(id).state.Load()) {
		return id
	}
	if owner := t.clientOf(t.flow(id)); owner.key != c.key && int(owner.live) < t.keepFor {
		return 0
	}
	return id
}

// bound is how many flows there may be when a client opens one: what is left last is
// kept for those who have few.
func (t *Table) bound(c *client) int {
	if int(c.live) >= t.keepFor {
		return t.set.MaxFlows - t.kept
	}
	return t.set.MaxFlows
}

// evict removes a flow to make room; false if there is none.
func (t *Table) evict(id uint32) bool {
	if id == 0 {
		return false
	}
	t.remove(id, t.flow(id), Evicted)
	return true
}

// older reports whether a's oldest half-open flow is older than b's.
func (t *Table) older(a, b *client) bool {
	return int32(t.flow(a.opening.first).last.Load()-t.flow(b.opening.first).last.Load()) < 0
}

// expendable returns the flow that makes room for another, 0 if none may go: the
// longest closed one, else the oldest half-open one of the greediest client. In a flood
// from clients of whom nothing was answered it is the other way round. Established flows
// never go (decision D4).
func (t *Table) expendable() (oldest uint32) {
	if t.halfOpen.of(silent) > t.set.MaxFlows/floodPart {
		return t.halfOpen.greediest(t.older).opening.first
	}
	try := func(id uint32) {
		if id != 0 && (oldest == 0 || int32(t.flow(id).last.Load()-t.flow(oldest).last.Load()) < 0) {
			oldest = id
		}
	}
	try(t.closed.first)
	for _, p := range t.pools[1:] {
		try(p.closed.first)
	}
	if oldest == 0 {
		if c := t.halfOpen.greediest(t.older); c != nil {
			oldest = c.opening.first
		}
	}
	return oldest
}
