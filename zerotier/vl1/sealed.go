package vl1

import (
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// Limits of sealed HELLOs (chapter 06 §3.6).
const (
	provenEvery = time.Second // opened of one peer, on its paths
	provenBurst = 5

	envelopeLifetime = time.Minute
	unansweredRounds = 3
	unansweredAfter  = 2 * time.Second
)

// SealedHello returns which of our HELLOs are sealed.
func (c *Core) SealedHello() ztnode.SealedHello { return ztnode.SealedHello(c.seals.Load()) }

// SetSealedHello changes which of our HELLOs are sealed, from the next one on.
func (c *Core) SetSealedHello(s ztnode.SealedHello) { c.seals.Store(int32(s)) }

// receiveSealedHello opens a sealed HELLO, whoever sent it. That takes a key agreement before
// anything is known of the sender, so that there is a budget before it, and neither
// state nor an answer before the MAC of what is inside is right.
func (c *Core) receiveSealedHello(w *Worker, src Source, p packet.Packet) {
	work, ok := c.mayOpen(w, src, p.Source())
	if !ok {
		w.stats.rejects[RejectSealedRate].Add(1)
		return
	}
	p, err := p.OpenEnvelope(c.id)
	work.Done()
	if err != nil || p.Verb() != packet.VerbHello || p.Compressed() {
		w.stats.rejects[RejectSealed].Add(1)
		return
	}
	c.receiveHello(w, src, p)
}

// mayOpen decides whether a sealed HELLO may cost a key agreement. What comes on a path
// of the peer that it names has a small budget of its own, which strangers can't use up.
func (c *Core) mayOpen(w *Worker, src Source, from identity.Address) (work budget.Work, ok bool) {
	peer := c.Peer(from)
	c.mu.Lock()
	proven := peer != nil && c.provenLocked(peer, src, w.t) && peer.sealed.Take(w.t, provenEvery, provenBurst)
	ok = proven || c.strangers.mayOpen(w.t, src.Endpoint.Addr())
	c.mu.Unlock()
	if !ok {
		return work, false
	}
	if proven {
		if work, ok = c.budget.Take(w.t, budget.Sender{Address: from}, budget.Agreement, 1); ok {
			return work, true
		}
	}
	return c.budget.Take(w.t, budget.Sender{}, budget.Agreement, 1)
}

// unanswered are sealed HELLOs to a peer that wasn't heard since.
type unanswered struct {
	rounds      int
	first, last int64
	said        bool
}

// vain reports whether a peer seems not to open sealed HELLOs, as after a change to an older
// release.
func (u *unanswered) vain(t, heard int64) bool {
	return u.rounds >= unansweredRounds && heard <= u.last && since(t, u.first) >= unansweredAfter
}

// add notes a sealed HELLO. Those to several endpoints at a time are one round.
func (u *unanswered) add(t, heard int64) {
	if heard > u.last {
		u.rounds = 0
	}
	if u.rounds == 0 {
		u.first = t
	}
	if u.rounds == 0 || u.last != t {
		u.rounds++
	}
	u.last = t
}

// sealsLocked reports whether a HELLO to a peer is sealed.
func (c *Core) sealsLocked(p *Peer, t int64) bool {
	switch c.SealedHello() {
	case ztnode.SealedHelloAlways:
		return true
	case ztnode.SealedHelloAuto:
		if p.ProtocolVersion() < packet.SealedProtocolVersion {
			return false
		}
		u := &p.unanswered
		if !u.vain(t, p.lastReceive.Load()) {
			return true
		}
		if !u.said {
			u.said = true
			c.log.Warn("a peer answers no sealed HELLO, saying plain ones until it is heard", "peer", p.addr)
		}
	}
	return false
}

// envelopeLocked returns the envelope for a HELLO to a peer, nil for a plain one; false if
// the time for it is used up. An envelope serves for a while, so that whoever makes us
// say many HELLOs to a peer costs us little.
func (c *Core) envelopeLocked(w *Worker, p *Peer) (e *packet.Envelope, ok bool) {
	if !c.sealsLocked(p, w.t) {
		return nil, true
	}
	if p.envelope == nil || since(w.t, p.envelopeMade) >= envelopeLifetime {
		work, ok := c.Afford(w, p, budget.Agreement, 2)
		if !ok {
			return nil, false
		}
		e, err := packet.NewEnvelope(p.id)
		work.Done()
		if err != nil {
			return nil, false // not with a peer that keys were agreed on with
		}
		p.envelope, p.envelopeMade = e, w.t
	}
	p.unanswered.add(w.t, p.lastReceive.Load())
	return p.envelope, true
}
