package vl1

import (
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// whoisState paces the questions for one address (chapter 02 §5.2).
type whoisState struct {
	first, last int64
}

// askWhois asks the best root for an identity, with pacing. Core.mu is held.
// stranger marks questions that an unauthenticated packet caused.
func (c *Core) askWhois(w *Worker, a identity.Address, stranger bool) {
	if a.Reserved() || a == c.self {
		return
	}
	st := c.whois[a]
	if st == nil {
		if len(c.whois) >= maxWhois {
			w.stats.rejects[RejectQueueFull].Add(1)
			return
		}
		st = &whoisState{first: w.t}
	}
	if st.last != 0 && since(w.t, st.last) < whoisPacing {
		return
	}
	if stranger && !c.strangers.Take(w.t, 50*time.Millisecond, 50) {
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	c.whois[a] = st
	best := c.best.Load()
	if best == nil {
		return // asked again by the queues
	}
	pa := best.bestPathLockedOrRoute()
	if pa == nil {
		return
	}
	st.last = w.t
	b := packet.Packet(a.Append(make([]byte, packet.HeaderLen, packet.HeaderLen+identity.AddressLen)))
	id := c.emit(w, best, pa.sock, pa.ep, packet.VerbWhois, b, best.suite())
	pa.lastOut.Store(w.t)
	c.expect(id, &expectation{peer: best.addr, verb: packet.VerbWhois, sent: w.t, asked: a})
}

// Lookup asks for the identity of a if it isn't known.
func (c *Core) Lookup(w *Worker, a identity.Address) {
	if c.Peer(a) != nil || c.recall(w, a) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.askWhois(w, a, false)
}

// okWhois learns the identities that answer our question.
func (c *Core) okWhois(w *Worker, from *Peer, b []byte, e *expectation) {
	if !c.IsUpstream(from.addr) {
		w.stats.rejects[RejectNotUpstream].Add(1)
		return
	}
	r := reader{Reader: wire.Reader{Buf: b}}
	for r.Left() > 0 {
		id := r.identity()
		if r.Failed {
			w.stats.rejects[RejectMalformed].Add(1)
			return
		}
		if id.Address() != e.asked {
			continue
		}
		if c.count.Load() >= maxPeers {
			w.stats.rejects[RejectPeerLimit].Add(1)
		} else if p, err := c.addPeer(id, w.t); err == nil {
			c.peerLearned(w, p)
		}
	}
}

// peerLearned retries whatever waited for an identity.
func (c *Core) peerLearned(w *Worker, p *Peer) {
	t := w.t
	c.mu.Lock()
	delete(c.whois, p.addr)
	c.updateRoute(p, t)
	h, hinted := c.hints[p.addr]
	delete(c.hints, p.addr)
	if hinted && since(t, h.born) < queueTimeout {
		c.punch(w, p, h.sock, h.at)
	}
	var mine []heldPacket
	c.held = slices.DeleteFunc(c.held, func(q heldPacket) bool {
		if q.from == p.addr {
			mine = append(mine, q)
			return true
		}
		return false
	})
	c.mu.Unlock()
	c.cfg.Upper.PeerLearned(w, p)
	c.flushQueue(w, p)
	for _, q := range mine {
		c.receivePacket(w, q.src, packet.Packet(q.data))
	}
}

// Bounds of WHOIS (chapter 02 §9).
const (
	maxWhoisAnswer  = 16
	maxWhoisForward = 4

	// Identities that one peer may ask for, also of a root.
	whoisEvery = 50 * time.Millisecond
	whoisBurst = 64
)

func (c *Core) receiveWhois(w *Worker, from *Peer, p packet.Packet, src Source) {
	t := w.t
	c.mu.Lock()
	gated := !c.IsRoot() && from.lastWhois != 0 && since(t, from.lastWhois) < whoisGate
	most := len(p.Payload()) / identity.AddressLen
	for range min(most, maxWhoisAnswer) {
		gated = gated || !from.whoisBytes.Take(t, whoisEvery, whoisBurst)
	}
	if !gated {
		from.lastWhois = t
	}
	c.mu.Unlock()
	if gated {
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	var answer []byte
	forwarded := 0
	b := p.Payload()
	for n := 0; len(b) >= identity.AddressLen && n < maxWhoisAnswer; n++ {
		a := identity.AddressFromBytes(b)
		b = b[identity.AddressLen:]
		if a == c.self {
			answer = c.id.AppendBinary(answer)
		} else if known := c.Peer(a); known != nil {
			answer = known.id.AppendBinary(answer)
		} else if forwarded < maxWhoisForward && !c.IsUpstream(from.addr) {
			forwarded++
			c.mu.Lock()
			c.askWhois(w, a, true)
			c.mu.Unlock()
		}
	}
	if len(answer) > 0 {
		c.SendOK(w, from, src, packet.VerbWhois, p.ID(), answer)
	}
	c.heard(w, from, src, packet.VerbWhois, false, false)
}
