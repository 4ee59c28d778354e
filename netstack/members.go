package netstack

import (
	"net/netip"
	"time"

	"ztgate/internal/rate"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
)

// The network proves the MAC that a frame came from, but nothing inside it. Who has
// which address is kept by the neighbour table; here packets are held to it.

// fromMember reports a packet from the member that has its source address, or from the
// router that leads to it, as far as is known. If so, answers of the flow go there too.
func (w *worker) fromMember(at *attachment, f *nat.Flow, v *ipkt.View) bool {
	src := v.Source()
	hop := at.hop(src)
	if !hop.IsValid() {
		return true // it is judged by its addresses
	}
	mac := macBytes(w.who.mac)
	verdict := neigh.Fine
	if hop == src {
		verdict = at.neigh.From(w.now, src, mac)
	} else {
		verdict = at.neigh.Through(w.now, hop, mac)
	}
	if verdict != neigh.Fine { // what claims to be us is judged by that
		return at.isOwn(src) || w.set.standsFor(at, src)
	}
	if f != nil && f.Slot == at.slot {
		if owner, known := at.neigh.Lookup(w.now, hop); known && owner == mac {
			f.Hop.Store(packHop(w.second, mac))
		}
	}
	return true
}

// ownerOf reports whether the frame came from the member to which packets for a host go.
func (w *worker) ownerOf(at *attachment, host netip.Addr) bool {
	owner, ok := at.neigh.Owner(at.hop(host))
	return ok && macNumber(owner) == w.who.mac
}

// neighbour counts a message of ARP or neighbour discovery, and sends what waited for it.
func (w *worker) neighbour(at *attachment, proto uint16, n int, ready []neigh.Waiting, from netip.Addr, v neigh.Verdict) {
	switch v {
	case neigh.Fine:
		w.countLocal(at, proto, n, proto == ipkt.ICMPv6)
	case neigh.Invalid:
		w.drop(dropNeighbour)
	case neigh.Refused:
		w.view = ipkt.View{Src: ipkt.Bytes(from)} // all that the message is about
		w.who.view = &w.view
		w.drop(dropConflict)
	}
	w.e.sendReady(w.now, at, ready, from)
}

// surroundings implements [surroundings].
func (e *Engine) surroundings(n Network) neigh.Config {
	c := neigh.Config{MAC: n.MAC, Send: func(frame []byte) { e.writeFrame(n.ID, frame) },
		Conflict: func(c neigh.Conflict) { e.conflict(n.ID, c) }}
	if e.cfg.Owns != nil {
		c.Owns = func(mac neigh.MAC, a netip.Addr) bool { return e.cfg.Owns(n.ID, mac, a) }
	}
	return c
}

// claims limits what is logged of claims of others' addresses, for each who claims.
type claims struct {
	rivals *rate.Table[neigh.MAC]
	all    rate.Shared
}

const (
	claimRivals = 256
	claimEvery  = 30 * time.Second // that one rival is logged
	claimBurst  = 3
)

func (c *claims) init() { c.rivals = rate.NewTable[neigh.MAC](claimRivals) }

// conflict logs that two members claim one address.
func (e *Engine) conflict(network uint64, c neigh.Conflict) {
	now := e.clock()
	if !c.Moved && !e.claims.rivals.Of(c.Rival).Take(now, 1, claimEvery, claimBurst) || !e.claims.all.Take(now, 1, time.Second, 16) {
		return
	}
	text := "a member claims an address that another has: its claim is ignored"
	if c.Moved {
		text = "an address has moved to another member"
	}
	e.log.Warn(text, "network", networkLabel(network), "address", c.Address, "owner", macText(c.Owner), "claimed_by", macText(c.Rival))
}

// Neighbours tells of the hosts of a network that are known and answer, by their own
// addresses, in any order.
func (e *Engine) Neighbours(nwid uint64, f func(a netip.Addr, mac [6]byte)) {
	if at := e.set.Load().attachments[nwid]; at != nil {
		at.neigh.Each(e.clock(), func(a netip.Addr, mac neigh.MAC) { f(a, mac) })
	}
}

// SeenByVPC returns the address by which hosts of the VPC reach a host of a network, and
// whether there is one: what they send there goes to that host.
func (e *Engine) SeenByVPC(nwid uint64, a netip.Addr) (netip.Addr, bool) {
	s := e.set.Load()
	at := s.attachments[nwid]
	if at == nil {
		return a, false
	}
	seen, _ := s.seen(at, a)
	h := s.fromVPC(seen)
	return seen, h.at == at && h.addr == a
}
