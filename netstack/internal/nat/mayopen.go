package nat

import "ztgate/netstack/internal/ipkt"

// MayOpen returns what Open would, and changes and counts nothing. It errs only where
// flows that are over would be cleared away first, and in a full table where a client's
// own flow makes way first: whose would be next then isn't known.
func (t *Table) MayOpen(now int64, k *Key, v *ipkt.View, n *NewFlow) Refusal {
	if why := t.mayBegin(k, v, n, n.Source != Keep || n.Server != [16]byte{}); why != Accepted {
		return why
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if f, _ := t.lookup(k); f != nil {
		return Accepted
	}
	var c client
	key := keyOfClient(k.src, k.side, n.Slot)
	if known := t.clients[key]; known != nil {
		c = *known // a copy: tokens are taken from it
	} else {
		t.newClient(&c, key, n.Member)
	}
	if why := t.mayHave(Coarse(now), &c); why != Accepted {
		return why
	}
	var f Flow
	t.fill(Coarse(now), &f, k, v, n)
	return t.mayTranslate(&c, &f, n)
}

// mayHave reports whether a client may have one more flow, see openFor.
func (t *Table) mayHave(now uint32, c *client) Refusal {
	own := 0 // of its own half-open flows that make room
	if int(c.live) >= t.set.MaxFlowsPerClient {
		if c.half.Count() == 0 {
			return ClientFull
		}
		own++
	}
	others := 0
	if t.memberFull(c) && own == 0 {
		switch id := t.oldestOf(c, true); {
		case id == 0:
			return MemberFull
		case t.clientOf(t.flow(id)).key == c.key:
			own = 1
		default:
			others = 1
		}
	}
	if !t.allowRate(now, c) {
		return ClientRate
	}
	if t.set.MaxHalfOpen > 0 && c.half.Count()-own >= t.set.MaxHalfOpen {
		own++
	}
	c.live -= int32(own)
	if t.count-own-others >= t.bound(c) && t.expendableFor(c) == 0 {
		return TableFull
	}
	return Accepted
}

// mayTranslate reports whether there is a source for a flow, see translate.
func (t *Table) mayTranslate(c *client, f *Flow, n *NewFlow) Refusal {
	switch n.Source {
	case Map:
		f.setAddr(endExternal, n.Address)
		if n.Port != 0 {
			f.setPort(endExternal, n.Port)
		}
	case Masquerade:
		f.setAddr(endExternal, t.addressOf(f, n))
		sharing := t.set.PortSharing == ByDestination
		why, free := t.mayAcquire(c, f, !sharing)
		if why == NoPort && sharing {
			if t.share(c, f) {
				return Accepted
			}
			why, free = t.mayAcquire(c, f, true)
		}
		if why != Accepted || free {
			return why
		}
		if other, _ := t.taker(f); sharing && other != nil && (t.yields(f, other) || t.share(c, f)) {
			return Accepted
		}
	}
	if other, _ := t.taker(f); other != nil {
		return Clash
	}
	return Accepted
}

// mayAcquire gives a flow that isn't in the table the port that acquire would; free
// means that those who have used it make way.
func (t *Table) mayAcquire(c *client, f *Flow, take bool) (why Refusal, free bool) {
	clientPort, class := f.ClientPort(), ClassOf(f.Proto())
	i, ok := t.byAddr[poolKey{f.External(), f.Proto()}]
	if !ok {
		return Accepted, true // with a pool of its own
	}
	p, pc := t.pools[i], portClass(f.Proto(), clientPort)
	f.pool = i
	port := p.find(t, &c.key, clientPort)
	if port != 0 && p.quarantined.has(port) && p.reserved.has(port) {
		port = 0
	}
	if port != 0 && !p.quarantined.has(port) {
		f.setPort(endExternal, port)
		return Accepted, false
	}
	if limit := t.set.MaxPortsPerClient; limit > 0 && c.portsOf(class) >= limit {
		return ClientPorts, false
	}
	why = t.overPorts(p, c, pc)
	switch {
	case why != Accepted && !take:
		return NoPort, false
	case why != Accepted && !t.mayTake(p, t.ownShare(p, c, pc, why)):
		return why, false
	case port != 0:
		f.setPort(endExternal, port)
		return Accepted, false
	case why != Accepted:
		return Accepted, true
	}
	if p.left[pc] > t.keptPorts(p, c, pc) {
		client := f.Client()
		f.setPort(endExternal, p.choose(t, &client, clientPort))
		return Accepted, false
	}
	if !t.mayReuse(p, pc, take) {
		return NoPort, false
	}
	return Accepted, true
}

// mayReuse reports whether expire or reuse would free a port.
func (t *Table) mayReuse(p *pool, pc int, take bool) bool {
	for id, n := p.closed.first, 0; id != 0 && n < reuseTries; id, n = t.flow(id).lnext, n+1 {
		port := t.flow(id).ExtPort()
		if portClass(p.key.proto, port) == pc && !p.reserved.has(port) && t.links(id).next == 0 {
			return true
		}
	}
	for port, n := p.quarantine[pc].first, 0; port != 0 && n < reuseTries; port, n = p.at(port).link, n+1 {
		if !p.reserved.has(port) {
			return true
		}
	}
	return take && t.mayTake(p, t.greediest(p, pc))
}

// mayTake reports whether takePort would free a port of a share.
func (t *Table) mayTake(p *pool, s *portShare) bool {
	if s == nil {
		return false
	}
	for port, n := s.ports.first, 0; port != 0 && n < takeTries; port, n = p.at(port).link, n+1 {
		flows, first := 1, p.at(port).flows
		for id := t.links(first).next; id != 0 && id != first && flows <= takeFlows; id = t.links(id).next {
			flows++
		}
		if flows <= takeFlows && !p.reserved.has(port) {
			return true
		}
	}
	return false
}
