package nat

import (
	"cmp"
	"net/netip"
	"slices"

	"ztgate/netstack/internal/ipkt"
)

// Greedy is what a client has of the table, or all clients of a network.
type Greedy struct {
	Prefix          netip.Prefix // one address, or a /24 or /64
	Side            Side
	Slot            uint16 // of the network, from the overlay
	Flows, HalfOpen int
	Ports           int    // external ones, of a client
	Clients         int    // of a network
	Evicted         uint64 // flows that made room for others, of a client
	Refused         uint64 // flows that weren't opened, of a client as long as it has others
}

// Greedy lists the clients, and the networks of several clients, that have most flows: at
// most n of each, most first. It looks at all flows, without keeping packets waiting.
// The caller's reader has entered.
func (t *Table) Greedy(n int) (clients, networks []Greedy) {
	type place struct {
		key  clientKey
		side Side
		slot uint16
	}
	all := map[place]*Greedy{}
	t.Walk(func(i Info) bool {
		k := place{i.clientKey(), i.From(), 0}
		if k.side == Overlay {
			k.slot = i.Slot
		}
		g := all[k]
		if g == nil {
			a := ipkt.Addr(k.key.addr)
			g = &Greedy{Prefix: netip.PrefixFrom(a, a.BitLen()), Side: k.side, Slot: k.slot}
			all[k] = g
		}
		g.Flows++
		if isHalfOpen(i.state.Load()) && i.State != stateAnswered {
			g.HalfOpen++
		}
		return true
	})
	nets := map[place]*Greedy{}
	for k, g := range all {
		bits := 24
		if g.Prefix.Addr().Is6() {
			bits = 64
		}
		p, _ := g.Prefix.Addr().Prefix(bits)
		k.key.addr = ipkt.Bytes(p.Addr())
		net := nets[k]
		if net == nil {
			net = &Greedy{Prefix: p, Side: g.Side, Slot: g.Slot}
			nets[k] = net
		}
		net.Flows += g.Flows
		net.HalfOpen += g.HalfOpen
		net.Clients++
	}
	most := func(m map[place]*Greedy) (out []Greedy) {
		for _, g := range m {
			if g.Prefix.IsSingleIP() || g.Clients > 1 {
				out = append(out, *g)
			}
		}
		slices.SortFunc(out, func(a, b Greedy) int {
			return cmp.Or(b.Flows-a.Flows, a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Slot, b.Slot))
		})
		return slices.Clone(out[:min(len(out), max(n, 0))])
	}
	clients, networks = most(all), most(nets)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range clients {
		g := &clients[i]
		if c := t.clients[keyOfClient(ipkt.Bytes(g.Prefix.Addr()), g.Side, g.Slot)]; c != nil {
			for class := range NumClasses {
				g.Ports += c.portsOf(class)
			}
			g.Evicted, g.Refused = uint64(c.evicted), uint64(c.refused)
		}
	}
	return clients, networks
}
