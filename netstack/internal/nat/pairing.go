package nat

import (
	"math/bits"
	"net/netip"
	"slices"

	"ztgate/netstack/internal/ipkt"
)

// An address of which less than one scarcePart of the ports is left isn't for new clients, as
// long as there is another.
const scarcePart = 4

// Group is external addresses of one family on a network. A client of the VPC leaves
// from one of them for as long as it has a mapping there, in use or in quarantine,
// whatever its protocols (RFC 4787 REQ-2, RFC 7857 §4).
type Group struct {
	Slot      uint16 // of the network
	Addresses []netip.Addr
}

func (g *Group) equal(o *Group) bool {
	return g.Slot == o.Slot && slices.Equal(g.Addresses, o.Addresses)
}

// group is one in the table.
type group struct {
	Group
	addrs   [][16]byte
	clients []int             // of each address
	pairs   map[[16]byte]pair // by client
}

// pair is the address of a client, by its number in the group.
type pair struct {
	at       int
	mappings int // by which it is held
}

// SetGroups makes list the groups: no address is in two of them. Who has an address
// keeps it if it is still in the group. Where a group is another than before, its
// mappings are counted, with the lock held: some 20 ms for a full table.
func (t *Table) SetGroups(list []Group) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.groups
	t.groups = make(map[[16]byte]*group)
	for _, g := range list {
		first := ipkt.Bytes(g.Addresses[0])
		same := old[first]
		if same == nil || !same.equal(&g) {
			same = &group{Group: g, pairs: make(map[[16]byte]pair)}
			for _, a := range g.Addresses {
				same.addrs = append(same.addrs, ipkt.Bytes(a))
			}
			same.clients = make([]int, len(same.addrs))
		}
		for _, a := range same.addrs {
			t.groups[a] = same
		}
	}
	for _, p := range t.pools[1:] {
		if g := t.groups[p.key.ext]; g != p.group {
			p.joinGroup(t, g)
		}
	}
}

// joinGroup makes a pool one of a group, nil = of none.
func (p *pool) joinGroup(t *Table, g *group) {
	p.group, p.paired = g, nil
	if g == nil {
		return
	}
	p.paired = new(portSet)
	for w, used := range p.used {
		for ; used != 0; used &= used - 1 {
			port := uint16(w*64 + bits.TrailingZeros64(used))
			m := p.at(port)
			client := clientKey{addr: m.client}
			if !p.quarantined.has(port) {
				client = t.flow(m.flows).clientKey()
			}
			p.hold(&client, port)
		}
	}
}

// hold makes a mapping hold its client's address, if that is this one or there is none yet.
func (p *pool) hold(client *clientKey, port uint16) {
	g := p.group
	if g == nil || client.from != 0 {
		return
	}
	had, ok := g.pairs[client.addr]
	if !ok {
		had.at = slices.Index(g.addrs, p.key.ext)
		g.clients[had.at]++
	} else if g.addrs[had.at] != p.key.ext {
		return
	}
	had.mappings++
	g.pairs[client.addr] = had
	p.paired.add(port)
}

// letGo is the inverse of hold.
func (p *pool) letGo(client *[16]byte, port uint16) {
	g := p.group
	if g == nil || !p.paired.has(port) {
		return
	}
	p.paired.del(port)
	had := g.pairs[*client]
	if had.mappings--; had.mappings == 0 {
		g.clients[had.at]--
		delete(g.pairs, *client)
		return
	}
	g.pairs[*client] = had
}

// addressOf returns the address behind which a flow is masqueraded: its client's, or for a
// client without one that of the fewest clients. Where all but few ports are taken it is
// that which has most left.
func (t *Table) addressOf(f *Flow, n *NewFlow) [16]byte {
	g := t.groups[n.Address]
	if !n.Paired || g == nil {
		return n.Address
	}
	client, proto := f.Client(), f.Proto()
	if p, ok := g.pairs[client]; ok {
		return g.addrs[p.at]
	}
	pc, count := portClass(proto, f.ClientPort()), len(g.addrs)
	first := int(t.endpointHash(&client, 0, 0) % uint64(count)) // among equals
	fewest, most, room := -1, first, -1
	for i := range count {
		at := (first + i) % count
		left, all := 1<<16, 1<<16 // of a pool that isn't there yet
		if number, ok := t.byAddr[poolKey{g.addrs[at], proto}]; ok {
			left, all = t.pools[number].left[pc], t.pools[number].size[pc]
		}
		if left > room {
			most, room = at, left
		}
		if left > all/scarcePart && (fewest < 0 || g.clients[at] < g.clients[fewest]) {
			fewest = at
		}
	}
	if fewest < 0 {
		fewest = most
	}
	return g.addrs[fewest]
}

// AddressOf returns the address behind which a flow would be masqueraded.
func (t *Table) AddressOf(k *Key, n *NewFlow) netip.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	var f Flow
	v := ipkt.View{V6: !ipkt.Addr(k.src).Is4(), Proto: k.proto}
	t.fill(0, &f, k, &v, n)
	return ipkt.Addr(t.addressOf(&f, n))
}
