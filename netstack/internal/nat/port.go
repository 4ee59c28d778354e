package nat

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

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
	quarantined  portSet // in used, but without flows: kept for their owners
	pages        [256]*[256]mapping
	heads        [mappingHeads]uint16 // chains of mappings by client endpoint
	quarantine   struct{ first, last uint16 }
	closed       list // closed flows whose ports can be used again, oldest first
	inUse        int
	inQuarantine int
	failures     uint64
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
	prev, link uint16 // in the list of quarantined ones
	n          uint32 // flows; of a quarantined one: when that ends, coarse
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
	if i, ok := t.byAddr[k]; ok {
		return i
	}
	p := &pool{key: k, reserved: t.ownPorts}
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
func (p *pool) find(t *Table, client *[16]byte, port uint16) uint16 {
	for at := *p.head(t, client, port); at != 0; {
		m := p.at(at)
		if m.port == port && m.client == *client {
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

// countLeft counts the free ports of each class.
func (p *pool) countLeft() {
	p.left = [2]int{}
	for w := range p.used {
		p.left[portClass(p.key.proto, uint16(w*64))] += bits.OnesCount64(^(p.used[w] | p.reserved[w]))
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

// acquire gives a flow its external port. t.mu is held.
func (t *Table) acquire(now uint32, f *Flow, ext [16]byte) Refusal {
	i := t.poolOf(ext, f.Proto())
	if i == 0 {
		return NoPort
	}
	client, clientPort := f.Client(), f.ClientPort()
	p, c, class := t.pools[i], t.clientOf(client), ClassOf(f.Proto())
	f.setAddr(endExternal, ext)
	f.pool, p.slot = i, f.Slot
	port := p.find(t, &client, clientPort)
	if port != 0 && p.quarantined.has(port) && p.reserved.has(port) { // forwarded since
		p.leaveQuarantine(port)
		p.drop(t, port)
		port = 0
	}
	if port != 0 {
		if p.quarantined.has(port) {
			p.leaveQuarantine(port)
			c.ports[class]++
		}
		p.at(port).n++
		f.setPort(endExternal, port)
		f.flags |= flagMapped
		return Accepted
	}
	if limit := t.set.MaxPortsPerClient; limit > 0 && c.ports[class] >= limit {
		return ClientPorts
	}
	p.expire(t, now)
	if port = p.choose(t, &client, clientPort); port == 0 {
		port = t.reuse(p, f)
	}
	if port == 0 {
		p.failures++
		return NoPort
	}
	p.add(t, &client, clientPort, port)
	c.ports[class]++
	f.setPort(endExternal, port)
	f.flags |= flagMapped
	return Accepted
}

// add makes the mapping of a free port, for one flow.
func (p *pool) add(t *Table, client *[16]byte, clientPort, port uint16) {
	if p.pages[port>>8] == nil {
		p.pages[port>>8] = new([256]mapping)
	}
	head := p.head(t, client, clientPort)
	*p.at(port) = mapping{client: *client, port: clientPort, next: *head, n: 1}
	*head = port
	p.used.add(port)
	p.left[portClass(p.key.proto, port)]--
	p.inUse++
}

// reuse finds a port when all are taken: one whose connections are all closed, as
// RFC 6888 REQ-8 allows where TCP is tracked, else one in quarantine, as it allows
// where only answers pass.
func (t *Table) reuse(p *pool, f *Flow) uint16 {
	const tries = 64
	client, clientPort := f.Client(), f.ClientPort()
	for range tries {
		id := p.closed.first
		if id == 0 {
			break
		}
		old := t.flow(id)
		port := old.ExtPort()
		t.remove(id, old, Evicted)
		if p.free(port) && sameClass(f.Proto(), port, clientPort) {
			return port
		}
		if c := p.choose(t, &client, clientPort); c != 0 {
			return c
		}
	}
	if t.Filter(f.Proto()) == EndpointIndependent {
		return 0
	}
	port := p.quarantine.first
	for range tries {
		if port == 0 || sameClass(f.Proto(), port, clientPort) && !p.reserved.has(port) {
			break
		}
		port = p.at(port).link
	}
	if port != 0 {
		p.leaveQuarantine(port)
		p.drop(t, port)
	}
	return port
}

// release takes a flow off its mapping. t.mu is held.
func (t *Table) release(f *Flow, why Reason) {
	p := t.pools[f.pool]
	port := f.ExtPort()
	m := p.at(port)
	if m.n--; m.n > 0 {
		return
	}
	if c := t.clients[f.Client()]; c != nil {
		c.ports[ClassOf(f.Proto())]--
	}
	if t.quarantine == 0 || why == Closed || isClosed(f.state.Load()) {
		p.drop(t, port)
		return
	}
	end := f.last.Load() + t.idle[ClassOf(f.Proto())][f.state.Load()&stateMask]
	p.enterQuarantine(port, min(t.now, end)+t.quarantine)
}

// enterQuarantine keeps a mapping without flows for its owner until a time
// (RFC 6888 REQ-8).
func (p *pool) enterQuarantine(port uint16, until uint32) {
	m := p.at(port)
	m.n = until
	p.quarantined.add(port)
	p.inQuarantine++
	p.inUse--
	m.prev, m.link = p.quarantine.last, 0
	if m.prev == 0 {
		p.quarantine.first = port
	} else {
		p.at(m.prev).link = port
	}
	p.quarantine.last = port
}

// leaveQuarantine takes a mapping out of the list of quarantined ones.
func (p *pool) leaveQuarantine(port uint16) {
	m := p.at(port)
	if m.prev == 0 {
		p.quarantine.first = m.link
	} else {
		p.at(m.prev).link = m.link
	}
	if m.link == 0 {
		p.quarantine.last = m.prev
	} else {
		p.at(m.link).prev = m.prev
	}
	m.prev, m.link, m.n = 0, 0, 0
	p.quarantined.del(port)
	p.inQuarantine--
	p.inUse++
}

// drop forgets a mapping without flows that isn't quarantined.
func (p *pool) drop(t *Table, port uint16) {
	m := p.at(port)
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

// expire frees some ports whose quarantine is over.
func (p *pool) expire(t *Table, now uint32) {
	const most = 256
	for range most {
		port := p.quarantine.first
		if port == 0 || int32(p.at(port).n-now) > 0 {
			return
		}
		p.leaveQuarantine(port)
		p.drop(t, port)
	}
}

// Owner returns whose an external port is.
func (t *Table) Owner(ext [16]byte, proto uint8, port uint16) (client [16]byte, clientPort uint16, ok bool) {
	return t.owner(ext, proto, port, false)
}

// Quarantined returns whose an external port was that is quarantined.
func (t *Table) Quarantined(ext [16]byte, proto uint8, port uint16) (client [16]byte, clientPort uint16, ok bool) {
	return t.owner(ext, proto, port, true)
}

func (t *Table) owner(ext [16]byte, proto uint8, port uint16, quarantined bool) (client [16]byte, clientPort uint16, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, ok := t.byAddr[poolKey{ext, proto}]
	if !ok {
		return client, 0, false
	}
	p := t.pools[i]
	if !p.used.has(port) || p.quarantined.has(port) != quarantined {
		return client, 0, false
	}
	m := p.at(port)
	return m.client, m.port, true
}

// PoolInfo is how far the ports of one external address and protocol are used.
type PoolInfo struct {
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
		out = append(out, PoolInfo{p.slot, p.key.proto, p.inUse, p.inQuarantine, p.failures})
	}
	return out
}
