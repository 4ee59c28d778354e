package vl1

import (
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// questions are the addresses whose identities we ask for (chapter 02 §5.2).
type questions struct {
	m map[identity.Address]question
}

type question struct {
	first, last int64 // wanted, and asked; 0 = not yet
}

// room reports whether an address is wanted, or another one may be.
func (q *questions) room(a identity.Address) bool {
	_, ok := q.m[a]
	return ok || len(q.m) < maxWhois
}

// due reports whether an address was not asked for just now.
func (q *questions) due(a identity.Address, t int64) bool {
	last := q.m[a].last
	return last == 0 || since(t, last) >= whoisPacing
}

// want remembers that an address is wanted.
func (q *questions) want(a identity.Address, t int64) {
	if _, ok := q.m[a]; !ok {
		q.m[a] = question{first: t}
	}
}

// asked notes that an address that is wanted was asked for.
func (q *questions) asked(a identity.Address, t int64) {
	x := q.m[a]
	x.last = t
	q.m[a] = x
}

func (q *questions) answered(a identity.Address) { delete(q.m, a) }

func (q *questions) expire(t int64) {
	for a, x := range q.m {
		if since(t, max(x.last, x.first)) >= 2*whoisPacing {
			delete(q.m, a)
		}
	}
}

// askWhoisLocked asks the best root for an identity, with pacing.
// stranger marks questions that an unauthenticated packet caused.
func (c *Core) askWhoisLocked(w *Worker, a identity.Address, stranger bool) {
	switch {
	case a.Reserved() || a == c.self:
		return
	case !c.whois.room(a):
		w.stats.rejects[RejectQueueFull].Add(1)
		return
	case !c.whois.due(a, w.t):
		return
	case stranger && !c.strangers.mayAsk(w.t):
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	c.whois.want(a, w.t)
	best := c.best.Load()
	if best == nil {
		return // asked again by the queues
	}
	pa := best.directPath()
	if pa == nil {
		return
	}
	c.whois.asked(a, w.t)
	b := packet.Packet(a.Append(make([]byte, packet.HeaderLen, packet.HeaderLen+identity.AddressLen)))
	id := c.emit(w, best, &way{sock: pa.sock, ep: pa.ep, size: safeDatagram}, packet.VerbWhois, b, best.suite())
	pa.lastOut.Store(w.t)
	c.replies.expect(id, &expectation{peer: best.addr, verb: packet.VerbWhois, sent: w.t, asked: a})
}

// Lookup asks for the identity of a if it isn't known.
func (c *Core) Lookup(w *Worker, a identity.Address) {
	if c.Peer(a) != nil || c.recall(w, a) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.askWhoisLocked(w, a, false)
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
	c.mu.Lock()
	c.whois.answered(p.addr)
	c.updateRouteLocked(p, w.t)
	if h, ok := c.hints.take(p.addr, w.t); ok {
		c.punchLocked(w, p, h.sock, h.at)
	}
	mine := c.held.take(p.addr)
	c.mu.Unlock()
	c.cfg.Upper.PeerLearned(w, p)
	c.flushQueue(w, p)
	for _, q := range mine {
		if q.opened {
			c.receiveHello(w, q.src, packet.Packet(q.data))
		} else {
			c.receivePacket(w, &q.src, packet.Packet(q.data))
		}
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
	c.mu.Lock()
	gated := !c.IsRoot() && from.lastWhois != 0 && since(w.t, from.lastWhois) < whoisGate
	most := len(p.Payload()) / identity.AddressLen
	for range min(most, maxWhoisAnswer) {
		gated = gated || !from.whoisBytes.Take(w.t, whoisEvery, whoisBurst)
	}
	if !gated {
		from.lastWhois = w.t
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
			c.askWhoisLocked(w, a, true)
			c.mu.Unlock()
		}
	}
	if len(answer) > 0 {
		c.SendOK(w, from, src, packet.VerbWhois, p.ID(), answer)
	}
	c.heard(w, from, &src, packet.VerbWhois, false, false)
}
