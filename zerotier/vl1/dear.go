package vl1

import (
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
)

// askedLifetime is how long a peer that we asked has a budget of its own: who floods us
// must not keep a controller's answers from us.
const askedLifetime = trustLifetime

// senderOf says for whom dear work is done.
func (c *Core) senderOf(p *Peer, t int64) budget.Sender {
	asked := p.lastAsked.Load()
	return budget.Sender{Address: p.addr, Member: p.trusted(t) || asked != 0 && since(t, asked) < askedLifetime || c.IsUpstream(p.addr)}
}

// Afford begins dear work for a peer; false, counted, if the peer's time is used up.
func (c *Core) Afford(w *Worker, from *Peer, k budget.Kind, pieces int) (budget.Work, bool) {
	work, ok := c.budget.Take(w.t, c.senderOf(from, w.t), k, pieces)
	if !ok {
		w.stats.rejects[RejectBudget].Add(1)
	}
	return work, ok
}

// inflate decompresses an authentic packet. That of a member costs no more than what
// the member may send anyway; a stranger pays with its budget.
func (c *Core) inflate(w *Worker, from *Peer, p packet.Packet) (packet.Packet, bool) {
	if !p.Compressed() {
		return p, true
	}
	if s := c.senderOf(from, w.t); !s.Member {
		work, ok := c.budget.Take(w.t, s, budget.Inflation, 1)
		if !ok {
			w.stats.rejects[RejectBudget].Add(1)
			return nil, false
		}
		defer work.Done()
	}
	p, err := packet.Decompress(p, w.inflated)
	if err != nil {
		w.stats.rejects[RejectCompression].Add(1)
		return nil, false
	}
	return p, true
}
