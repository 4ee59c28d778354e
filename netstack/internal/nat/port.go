package nat

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"ztgate/netstack/internal/fair"
	"ztgate/netstack/internal/ipkt"
)

// pool is the ports of one external address and protocol, or its identifiers of
// ICMP queries. Port 0 is never used.
type pool struct {
	key          poolKey
	slot         uint16 // of the network
	used         portSet
	reserved     portSet // never chosen: port 0, the gateway's own and those of forwards
	left         [2]int  // ports neither used nor reserved, by class
	size         [2]int  // ports not reserved
	quarantined  portSet // in used, but without flows: kept for their owners
	pages        [256]*[256]mapping
	heads        [mappingHeads]uint16 // chains of mappings by client endpoint
	quarantine   [2]portList          // by class, oldest first
	weak         [2]ranks[portShare]  // ports without a firm flow, by class
	listed       portSet              // those ports
	closed       list                 // closed flows whose ports can be used again, oldest first
	inUse        int
	inQuarantine int
	failures     uint64
	group        *group   // that its address is in; nil = none
	paired       *portSet // mappings that hold their clients' address in it
}

type poolKey struct {
	ext   [16]byte
	proto uint8
}

const mappingHeads = 1 << 14

// mapping says whose an external port is: endpoint independent, and shared with
// nobody (RFC 4787 REQ-1, REQ-3).
type mapping struct {
	client     [16]byte
	port       uint16
	next       uint16 // in the chain
	prev, link uint16 // in the list of quarantined or of weak ones
	// flows is the first of its flows, which are in a ring: firm ones, then others. Of
	// a quarantined one it is when that ends, coarse.
	flows uint32
}

// portList is a list of mappings by their ports.
type portList struct{ first, last uint16 }

func (p *pool) enlist(l *portList, port uint16) {
	m := p.at(port)
	m.prev, m.link = l.last, 0
	if l.last == 0 {
		l.first = port
	} else {
		p.at(l.last).link = port
	}
	l.last = port
}

func (p *pool) unlist(l *portList, port uint16) {
	m := p.at(port)
	if m.prev == 0 {
		l.first = m.link
	} else {
		p.at(m.prev).link = m.link
	}
	if m.link == 0 {
		l.last = m.prev
	} else {
		p.at(m.link).prev = m.prev
	}
	m.prev, m.link = 0, 0
}

// portShare is the weak ports of a client in a class of a pool, oldest first: those
// whose flows are all half-open or closed, so that they can be taken from it.
type portShare struct {
	fair.Share[portShare]
	client *client
	pool   *pool
	next   *portShare // of the client; spare ones
	ports  portList
	class  uint8
}

type portSet [1 << 16 / 64]uint64

func (s *portSet) has(p uint16) bool { return s[p/64]&(1<<(p%64)) != 0 }
func (s *portSet) add(p uint16)      { s[p/64] |= 1 << (p % 64) }
func (s *portSet) del(p uint16)      { s[p/64] &^= 1 << (p % 64) }

func (s *portSet) addRange(first, last uint16) {
	for p := int(first); p <= int(last); p++ {
		s.add(uint16(p))
	}
}

// ownPorts are the ports that no pool has.
func ownPorts() (s portSet) {
	s.add(0)
	s.addRange(LocalPortFirst, LocalPortLast)
	return s
}

func (p *pool) at(port uint16) *mapping { return &p.pages[port>>8][port&255] }

// poolOf returns the number of a pool, which it makes if need be; 0 = too many.
func (t *Table) poolOf(ext [16]byte, proto uint8) uint16 {
	k := poolKey{ext, proto}
	latest := &t.latest[ClassOf(proto)]
	if p := t.pools[*latest]; p != nil && p.key == k {
		return *latest
	}
	if i, ok := t.byAddr[k]; ok {
		*latest = i
		return i
	}
	p := &pool{key: k, reserved: t.ownPorts}
	p.joinGroup(t, t.groups[ext])
	p.countLeft()
	for i, old := range t.pools {
		if i > 0 && old.inUse == 0 && old.inQuarantine == 0 && old.closed.first == 0 && old.reserved == t.ownPorts && len(t.pools) > 64 {
			delete(t.byAddr, old.key)
			t.pools[i], t.byAddr[k] = p, uint16(i)
			return uint16(i)
		}
	}
	const maxPools = 4096
	if len(t.pools) == maxPools {
		return 0
	}
	t.pools = append(t.pools, p)
	t.byAddr[k] = uint16(len(t.pools) - 1)
	return t.byAddr[k]
}

// Reserve makes list the ports that flows never get, because they are forwarded.
func (t *Table) Reserve(proto uint8, list []netip.AddrPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.pools[1:] {
		if p.key.proto == proto {
			p.reserved = t.ownPorts
		}
	}
	for _, a := range list {
		if i := t.poolOf(ipkt.Bytes(a.Addr()), proto); i != 0 {
			t.pools[i].reserved.add(a.Port())
		}
	}
	for _, p := range t.pools[1:] {
		if p.key.proto == proto {
			p.countLeft()
		}
	}
}

func (t *Table) endpointHash(client *[16]byte, port uint16, round uint64) uint64 {
	le := binary.LittleEndian
	return mix(le.Uint64(client[:])^t.seed[2]^round<<32, le.Uint64(client[8:])^t.seed[3]^uint64(port)<<17)
}

func (p *pool) head(t *Table, client *[16]byte, port uint16) *uint16 {
	return &p.heads[t.endpointHash(client, port, 0)%mappingHeads]
}

// find returns the port of a client's endpoint, 0 if it has none.
func (p *pool) find(t *Table, client *clientKey, port uint16) uint16 {
	for at := *p.head(t, &client.addr, port); at != 0; {
		m := p.at(at)
		if m.port == port && m.client == client.addr && (p.quarantined.has(at) || t.flow(m.flows).clientKey() == *client) {
			return at
		}
		at = m.next
	}
	return 0
}

// portRange is the class of a port: a replaced one stays in it (RFC 4787
// REQ-3 a). The gateway's own ports are no part of it.
func portRange(proto uint8, port uint16) (ranges [2][2]uint16) {
	switch {
	case proto == ipkt.ICMP || proto == ipkt.ICMPv6:
		return [2][2]uint16{{1, LocalPortFirst - 1}, {LocalPortLast + 1, 65535}}
	case port < 1024:
		return [2][2]uint16{{1, 1023}, {1, 0}}
	}
	return [2][2]uint16{{1024, LocalPortFirst - 1}, {LocalPortLast + 1, 65535}}
}

// Classes of ports. Identifiers are all of one class.
const (
	lowPorts  = 0
	highPorts = 1
	lowWords  = 1024 / 64 // of a portSet
)

func portClass(proto uint8, port uint16) int {
	if proto != ipkt.ICMP && proto != ipkt.ICMPv6 && port < 1024 {
		return lowPorts
	}
	return highPorts
}

func sameClass(proto uint8, a, b uint16) bool { return portClass(proto, a) == portClass(proto, b) }

// words are the words of a portSet in which a class lies.
func (p *pool) words(class int) (first, n int) {
	switch {
	case p.key.proto == ipkt.ICMP || p.key.proto == ipkt.ICMPv6:
		return 0, len(p.used)
	case class == lowPorts:
		return 0, lowWords
	}
	return lowWords, len(p.used) - lowWords
}

// countLeft counts the ports of each class, and the free ones.
func (p *pool) countLeft() {
	p.left, p.size = [2]int{}, [2]int{}
	for w := range p.used {
		class := portClass(p.key.proto, uint16(w*64))
		p.left[class] += bits.OnesCount64(^(p.used[w] | p.reserved[w]))
		p.size[class] += bits.OnesCount64(^p.reserved[w])
	}
}

func (p *pool) free(port uint16) bool { return !p.used.has(port) && !p.reserved.has(port) }

// choose returns a free port for an endpoint, 0 if there is none: the same
// number, else one that is hard to guess (RFC 6056), but the same one after a
// restart with the same seed.
func (p *pool) choose(t *Table, client *[16]byte, port uint16) uint16 {
	class := portClass(p.key.proto, port)
	if p.left[class] == 0 {
		return 0
	}
	if p.free(port) {
		return port
	}
	ranges := portRange(p.key.proto, port)
	n0 := uint64(ranges[0][1]) + 1 - uint64(ranges[0][0])
	n := n0 + uint64(ranges[1][1]) + 1 - uint64(ranges[1][0])
	pick := func(round uint64) uint16 {
		i := t.endpointHash(client, port, round) >> 16 % n
		if i < n0 {
			return ranges[0][0] + uint16(i)
		}
		return ranges[1][0] + uint16(i-n0)
	}
	const tries = 16
	for round := range uint64(tries) {
		if c := pick(round + 1); p.free(c) {
			return c
		}
	}
	return p.scan(class, pick(tries+1)) // few are left
}

// scan returns the first free port of a class from a place on, 0 if there is none.
func (p *pool) scan(class int, from uint16) uint16 {
	first, n := p.words(class)
	at := int(from/64) - first
	for i := range n + 1 {
		w := first + (at+i)%n
		left := ^(p.used[w] | p.reserved[w])
		if i == 0 {
			left &= ^uint64(0) << (from % 64)
		}
		if left != 0 {
			return uint16(w*64 + bits.TrailingZeros64(left))
		}
	}
	return 0
}

// acquire gives a flow its external port; take allows that half-open flows give
// theirs up. t.mu is held.
func (t *Table) acquire(now uint32, c *client, id uint32, f *Flow, ext [16]byte, take bool) Refusal {
	i := t.poolOf(ext, f.Proto())
	if i == 0 {
		return NoPort
	}
	p, class := t.pools[i], ClassOf(f.Proto())
	f.setAddr(endExternal, ext)
	f.pool, p.slot = i, f.Slot
	port := p.find(t, &c.key, f.ClientPort())
	if port != 0 && p.quarantined.has(port) && p.reserved.has(port) { // forwarded since
		p.leaveQuarantine(port)
		p.drop(t, port)
		port = 0
	}
	if port == 0 || p.quarantined.has(port) {
		pc := portClass(f.Proto(), f.ClientPort())
		gave, why := t.mayHavePort(p, c, class, pc, take)
		if why != Accepted {
			return why
		}
		if port != 0 {
			p.leaveQuarantine(port)
		} else if port = t.newPort(now, p, c, f, pc, gave, take); port == 0 {
			if take {
				p.failures++
			}
			return NoPort
		}
		t.addPort(c, class, pc, 1)
	}
	f.setPort(endExternal, port)
	f.flags |= flagMapped
	t.chain(p.at(port), id, isFirm(f.state.Load()))
	t.settle(p, c, port)
	return Accepted
}

// overPorts reports why a client can't have one more port of a class without giving
// one up: unless limits are configured, it or its overlay member may have three quarters
// of them.
func (t *Table) overPorts(p *pool, c *client, pc int) Refusal {
	if t.set.MaxPortsPerClient > 0 {
		return Accepted
	}
	class, most := ClassOf(p.key.proto), max(p.size[pc]*3/4, 1)
	switch {
	case int(c.ports[class][pc]) >= most:
		return ClientPorts
	case c.member != 0 && int(t.members[c.member].ports[class][pc]) >= most:
		return MemberPorts
	}
	return Accepted
}

// mayHavePort makes sure that a client may have one more port, for which it gave one up
// if need be.
func (t *Table) mayHavePort(p *pool, c *client, class, pc int, take bool) (gave bool, why Refusal) {
	if limit := t.set.MaxPortsPerClient; limit > 0 && c.portsOf(class) >= limit {
		return false, ClientPorts
	}
	why = t.overPorts(p, c, pc)
	switch {
	case why == Accepted:
		return false, Accepted
	case !take:
		return false, NoPort
	case t.takePort(p, pc, func() *portShare { return t.ownShare(p, c, pc, why) }) == 0:
		return false, why
	}
	return true, Accepted
}

// newPort makes a mapping for a flow and returns its port, 0 if there is none. gave
// says that the client gave one up for it.
func (t *Table) newPort(now uint32, p *pool, c *client, f *Flow, pc int, gave, take bool) (port uint16) {
	p.expire(t, now, expireStep)
	if gave || p.left[pc] > t.keptPorts(p, c, pc) {
		client := f.Client()
		port = p.choose(t, &client, f.ClientPort())
	}
	if port == 0 {
		port = t.reuse(p, pc, take)
	}
	if port != 0 {
		p.add(t, &c.key, f.ClientPort(), port)
	}
	return port
}

// keptPorts is how many free ports a client leaves to those who have few.
func (t *Table) keptPorts(p *pool, c *client, pc int) int {
	if t.set.MaxPortsPerClient > 0 || int(c.ports[ClassOf(p.key.proto)][pc]) < few(p.size[pc]) {
		return 0
	}
	return p.size[pc] / keptPart
}

// add makes the mapping of a free port, as yet without flows.
func (p *pool) add(t *Table, client *clientKey, clientPort, port uint16) {
	if p.pages[port>>8] == nil {
		p.pages[port>>8] = new([256]mapping)
	}
	head := p.head(t, &client.addr, clientPort)
	*p.at(port) = mapping{client: client.addr, port: clientPort, next: *head}
	*head = port
	p.used.add(port)
	p.left[portClass(p.key.proto, port)]--
	p.inUse++
	p.hold(client, port)
}

// reuse frees a port when all are taken. First one whose connections are all closed,
// as RFC 6888 REQ-8 allows where TCP is tracked; then one in quarantine; then one whose
// flows are half-open, of the greediest client. In a flood of these it is the other way
// round, so that it doesn't cost others the ports that are kept for them, or which their
// servers take for those of connections that have just ended.
func (t *Table) reuse(p *pool, pc int, take bool) uint16 {
	greediest := func() *portShare { return t.greediest(p, pc) }
	if take && p.flooded(p.weak[pc].of(silent), pc) {
		if port := t.takePort(p, pc, greediest); port != 0 {
			return port
		}
	}
	for range reuseTries {
		id := p.closed.first
		if id == 0 {
			break
		}
		old, left := t.flow(id), p.left[pc]
		port := old.ExtPort()
		t.remove(id, old, Evicted)
		if p.left[pc] > left {
			return port
		}
	}
	if take && p.flooded(p.weak[pc].count(), pc) {
		if port := t.takePort(p, pc, greediest); port != 0 {
			return port
		}
	}
	for range reuseTries {
		port := p.quarantine[pc].first
		if port == 0 {
			break
		}
		p.leaveQuarantine(port)
		p.drop(t, port)
		if p.free(port) {
			return port
		}
	}
	if !take {
		return 0
	}
	return t.takePort(p, pc, greediest)
}

const (
	reuseTries = 64
	// A mapping with more flows than this gives some of them up at a time.
	takeFlows = 32
	takeTries = 4
)

func (t *Table) greediest(p *pool, pc int) *portShare {
	return p.weak[pc].greediest(t.olderPort)
}

// olderPort reports whether a's oldest weak port has been silent for longer than b's.
func (t *Table) olderPort(a, b *portShare) bool {
	at := func(s *portShare) uint32 { return t.flow(s.pool.at(s.ports.first).flows).last.Load() }
	return int32(at(a)-at(b)) < 0
}

// flooded reports that so many ports of a class without a firm flow are a flood.
func (p *pool) flooded(ports, pc int) bool { return ports > p.size[pc]/floodPart }

// ownShare returns the weak ports from which one is given up for a client that has its
// share, or whose overlay member has.
func (t *Table) ownShare(p *pool, c *client, pc int, why Refusal) *portShare {
	if why == MemberPorts {
		if s := p.weak[pc].near(c.half.At, t.olderPort); s != nil && s.client.member == c.member {
			return s
		}
	}
	return c.share(p, pc)
}

// takePort frees a weak port, the oldest one of the share that from returns, and
// returns it; 0 if there is none.
func (t *Table) takePort(p *pool, pc int, from func() *portShare) uint16 {
	for range takeTries {
		s := from()
		if s == nil {
			return 0
		}
		port := s.ports.first
		for n := 0; n < takeFlows && p.used.has(port); n++ {
			id := p.at(port).flows
			t.remove(id, t.flow(id), Evicted)
		}
		switch {
		case p.free(port):
			return port
		case p.listed.has(port): // it still has flows: another one may be freed sooner
			p.unlist(&s.ports, port)
			p.enlist(&s.ports, port)
		}
	}
	return 0
}

// share returns a client's weak ports of a class of a pool, nil if it has none.
func (c *client) share(p *pool, pc int) *portShare {
	for s := c.shares; s != nil; s = s.next {
		if s.pool == p && int(s.class) == pc {
			return s
		}
	}
	return nil
}

// settle puts a mapping into the list of its client's weak ports, or takes it out.
func (t *Table) settle(p *pool, c *client, port uint16) {
	m := p.at(port)
	weak := m.flows != 0 && !isFirm(t.flow(m.flows).state.Load())
	if weak == p.listed.has(port) {
		return
	}
	pc := portClass(p.key.proto, port)
	s := c.share(p, pc)
	if weak {
		if s == nil {
			s = t.newShare(p, c, pc)
		}
		p.listed.add(port)
		p.enlist(&s.ports, port)
		p.weak[pc].add(c.standing, &s.Share, 1)
		return
	}
	p.listed.del(port)
	p.unlist(&s.ports, port)
	p.weak[pc].add(c.standing, &s.Share, -1)
	if s.ports.first == 0 {
		at := &c.shares
		for *at != s {
			at = &(*at).next
		}
		*at = s.next
		s.next, t.spareShares = t.spareShares, s
	}
}

func (t *Table) newShare(p *pool, c *client, pc int) *portShare {
	s := t.spareShares
	if s != nil {
		t.spareShares = s.next
	} else {
		s = new(portShare)
	}
	*s = portShare{client: c, pool: p, class: uint8(pc), next: c.shares}
	s.Of, s.At = s, c.half.At
	c.shares = s
	return s
}

// chain puts a flow into the ring of its mapping.
func (t *Table) chain(m *mapping, id uint32, firm bool) {
	next := m.flows
	if next == 0 {
		m.flows = id
		return
	}
	prev := t.links(next).prev
	if prev == 0 {
		prev = next // it was alone
	}
	t.setLinks(id, links{prev, next})
	t.join(prev, id)
	t.join(id, next)
	if firm {
		m.flows = id
	}
}

// unchain takes a flow out of the ring of its mapping.
func (t *Table) unchain(m *mapping, id uint32) {
	l := t.links(id)
	if l.next == 0 {
		m.flows = 0
		return
	}
	if m.flows == id {
		m.flows = l.next
	}
	t.setLinks(id, links{})
	if l.prev == l.next { // the other one is alone now
		t.setLinks(l.next, links{})
		return
	}
	t.join(l.prev, l.next)
}

// join makes two flows neighbours.
func (t *Table) join(a, b uint32) {
	la, lb := t.links(a), t.links(b)
	la.next, lb.prev = b, a
	t.setLinks(a, la)
	t.setLinks(b, lb)
}

// rechain puts a flow of a mapping where its new state belongs.
func (t *Table) rechain(c *client, id uint32, f *Flow) {
	p, port := t.pools[f.pool], f.ExtPort()
	t.unchain(p.at(port), id)
	t.chain(p.at(port), id, isFirm(f.state.Load()))
	t.settle(p, c, port)
}

// release takes a flow off its mapping. t.mu is held.
func (t *Table) release(c *client, id uint32, f *Flow, why Reason) {
	p := t.pools[f.pool]
	port := f.ExtPort()
	m := p.at(port)
	t.unchain(m, id)
	t.settle(p, c, port)
	if m.flows != 0 {
		return
	}
	class := ClassOf(f.Proto())
	t.addPort(c, class, portClass(f.Proto(), port), -1)
	if t.quarantine == 0 || why == Closed || why == Evicted || isClosed(f.state.Load()) {
		p.drop(t, port)
		return
	}
	end := f.last.Load() + t.idle[class][f.state.Load()&stateMask]
	p.enterQuarantine(port, min(t.now, end)+t.quarantine)
}

// enterQuarantine keeps a mapping without flows for its owner until a time
// (RFC 6888 REQ-8).
func (p *pool) enterQuarantine(port uint16, until uint32) {
	p.at(port).flows = until
	p.quarantined.add(port)
	p.inQuarantine++
	p.inUse--
	p.enlist(&p.quarantine[portClass(p.key.proto, port)], port)
}

// leaveQuarantine takes a mapping out of the list of quarantined ones.
func (p *pool) leaveQuarantine(port uint16) {
	p.unlist(&p.quarantine[portClass(p.key.proto, port)], port)
	p.at(port).flows = 0
	p.quarantined.del(port)
	p.inQuarantine--
	p.inUse++
}

// drop forgets a mapping without flows that isn't quarantined.
func (p *pool) drop(t *Table, port uint16) {
	m := p.at(port)
	p.letGo(&m.client, port)
	for at := p.head(t, &m.client, m.port); *at != 0; at = &p.at(*at).next {
		if *at == port {
			*at = m.next
			break
		}
	}
	*m = mapping{}
	p.used.del(port)
	if !p.reserved.has(port) {
		p.left[portClass(p.key.proto, port)]++
	}
	p.inUse--
}

// expireStep is how many ports whose quarantine is over are freed at a time.
const expireStep = 64

// expire frees at most some ports whose quarantine is over. It returns how many more
// it might have freed.
func (p *pool) expire(t *Table, now uint32, most int) int {
	for pc := range p.quarantine {
		for ; most > 0; most-- {
			port := p.quarantine[pc].first
			if port == 0 || int32(p.at(port).flows-now) > 0 {
				break
			}
			p.leaveQuarantine(port)
			p.drop(t, port)
		}
	}
	return most
}

// Owner returns whose an external port is, and the network that he uses.
func (t *Table) Owner(ext [16]byte, proto uint8, port uint16) (client [16]byte, clientPort, slot uint16, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, m := t.owner(ext, proto, port)
	if m == nil || p.quarantined.has(port) {
		return client, 0, 0, false
	}
	return m.client, m.port, t.flow(m.flows).Slot, true
}

// Quarantined returns whose an external port was that is quarantined.
func (t *Table) Quarantined(ext [16]byte, proto uint8, port uint16) (client [16]byte, clientPort uint16, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, m := t.owner(ext, proto, port)
	if m == nil || !p.quarantined.has(port) {
		return client, 0, false
	}
	return m.client, m.port, true
}

// owner returns the mapping of an external port, nil if there is none. t.mu is held.
func (t *Table) owner(ext [16]byte, proto uint8, port uint16) (*pool, *mapping) {
	i, ok := t.byAddr[poolKey{ext, proto}]
	if !ok || !t.pools[i].used.has(port) {
		return nil, nil
	}
	return t.pools[i], t.pools[i].at(port)
}

// PoolInfo is how far the ports of one external address and protocol are used.
type PoolInfo struct {
	External           [16]byte
	Slot               uint16
	Proto              uint8
	InUse, Quarantined int
	Failures           uint64
}

// Pools lists the port pools.
func (t *Table) Pools() []PoolInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]PoolInfo, 0, len(t.pools))
	for _, p := range t.pools[1:] {
		out = append(out, PoolInfo{p.key.ext, p.slot, p.key.proto, p.inUse, p.inQuarantine, p.failures})
	}
	return out
}
