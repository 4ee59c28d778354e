package vl1

import (
	"net/netip"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// maxHops is how many relays a packet may pass (chapter 01 §4.3).
const maxHops = 3

// pair is an unordered pair of peers.
type pair struct{ low, high identity.Address }

// relayPacket forwards a packet for somebody else, if we are a root (chapter 02
// §4.8).
func (c *Core) relayPacket(w *Worker, src Source, p packet.Packet) {
	if !c.IsRoot() {
		w.stats.rejects[RejectNotRelayed].Add(1)
		return
	}
	if p.Hops() >= maxHops {
		w.stats.rejects[RejectHops].Add(1)
		return
	}
	p.SetHops(p.Hops() + 1)
	dst := c.Peer(p.Destination())
	if !c.forward(w, src, dst, p.Source(), p) {
		return
	}
	if from := c.Peer(p.Source()); from != nil && dst != nil {
		c.introduce(w, from, dst)
	}
}

func (c *Core) relayFragment(w *Worker, src Source, f packet.Fragment) {
	if !c.IsRoot() {
		w.stats.rejects[RejectNotRelayed].Add(1)
		return
	}
	if f.Hops() >= maxHops {
		w.stats.rejects[RejectHops].Add(1)
		return
	}
	f.SetHops(f.Hops() + 1)
	c.forward(w, src, c.Peer(f.Destination()), 0, f)
}

// forward sends a datagram to dst directly, else to another root.
func (c *Core) forward(w *Worker, src Source, dst *Peer, source identity.Address, datagram []byte) (direct bool) {
	var r *route
	if dst != nil {
		r = dst.route.Load()
		direct = r != nil && !r.relay
	}
	if !direct {
		r = nil
		if best := c.best.Load(); best != nil && best.addr != source {
			r = best.route.Load()
		}
	}
	if r == nil || r.path.ep == src.Endpoint && r.path.sock == src.Socket {
		w.stats.rejects[RejectNotRelayed].Add(1)
		return false
	}
	if !c.relays.allow(w.t, src.Endpoint.Addr(), packet.Fragment(datagram).Destination(), len(datagram)) {
		w.stats.rejects[RejectRelayRate].Add(1)
		return false
	}
	w.out.Send(r.path.sock, r.path.ep, nil, datagram)
	r.path.lastOut.Store(w.t)
	c.stats.relayed.Add(1)
	return direct
}

// What one source address may have relayed, and what may be relayed to one node
// (chapter 02 §9): far more than relayed traffic ought to be, far less than a root's
// line carries, so that one of them can't take it all. A datagram costs something
// besides its bytes.
const (
	relayRate     = 100_000_000   // bytes a second
	relayBurst    = relayRate / 2 // bytes at once
	relayCost     = 64            // bytes
	relayByteTime = time.Second / relayRate
	relayGateSize = 4096 // sources, and destinations, told apart
)

// relayGates bound what is relayed from each source and to each destination.
type relayGates struct {
	source      *rate.Table[netip.Addr]
	destination *rate.Table[identity.Address]
}

func newRelayGates() relayGates {
	return relayGates{rate.NewTable[netip.Addr](relayGateSize), rate.NewTable[identity.Address](relayGateSize)}
}

// allow takes a datagram's bytes from the buckets of its source, of IPv6 a /64, and of
// its destination.
func (g *relayGates) allow(t int64, source netip.Addr, destination identity.Address, size int) bool {
	if source.Is6() {
		if p, err := source.Prefix(64); err == nil {
			source = p.Addr()
		}
	}
	return g.source.Of(source).Take(t, size+relayCost, relayByteTime, relayBurst) &&
		g.destination.Of(destination).Take(t, size+relayCost, relayByteTime, relayBurst)
}

// introductions are when pairs of peers were told of each other.
type introductions struct {
	m map[pair]int64
}

// due reports whether a pair was not introduced lately, and may be remembered.
func (i *introductions) due(k pair, t int64) bool {
	last, ok := i.m[k]
	return (!ok || since(t, last) >= introduceEvery) && len(i.m) < maxIntroductions
}

func (i *introductions) note(k pair, t int64) { i.m[k] = t }

func (i *introductions) expire(t int64) {
	for k, at := range i.m {
		if since(t, at) >= introduceEvery {
			delete(i.m, k)
		}
	}
}

// introduce sends two peers each other's endpoint (chapter 02 §7.3).
func (c *Core) introduce(w *Worker, a, b *Peer) {
	key := pair{min(a.addr, b.addr), max(a.addr, b.addr)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.intros.due(key, w.t) {
		return
	}
	pa, pb := c.commonPathsLocked(a, b, w.t)
	if pa == nil {
		return
	}
	c.intros.note(key, w.t)
	c.rendezvousLocked(w, a, pa, b.addr, pb.ep)
	c.rendezvousLocked(w, b, pb, a.addr, pa.ep)
}

func (c *Core) rendezvousLocked(w *Worker, to *Peer, over *path, peer identity.Address, at netip.AddrPort) {
	b := packet.Packet(rendezvous{peer, at}.append(make([]byte, packet.HeaderLen, 64)))
	c.emit(w, to, &way{sock: over.sock, ep: over.ep, size: safeDatagram}, packet.VerbRendezvous, b, to.suite())
	over.lastOut.Store(w.t)
}

// commonPathsLocked finds the most private scope and the family in which both have a
// path.
func (c *Core) commonPathsLocked(a, b *Peer, t int64) (pa, pb *path) {
	best := func(p *Peer, scope packet.Scope, v4 bool) (best *path) {
		for _, pa := range p.paths {
			if pa.scope == scope && pa.ep.Addr().Is4() == v4 && !pa.silent(t) && (best == nil || pa.qualityLocked(t) < best.qualityLocked(t)) {
				best = pa
			}
		}
		return best
	}
	for scope := packet.ScopePrivate; scope > packet.ScopeNone; scope-- {
		for _, v4 := range []bool{false, true} {
			if pa, pb = best(a, scope, v4), best(b, scope, v4); pa != nil && pb != nil {
				return pa, pb
			}
		}
	}
	return nil, nil
}
