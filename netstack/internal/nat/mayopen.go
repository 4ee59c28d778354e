package nat

import "ztgate/netstack/internal/ipkt"

// MayOpen returns what Open would, and changes and counts nothing. It errs only where
// flows that are over would be cleared away first.
func (t *Table) MayOpen(now int64, k *Key, v *ipkt.View, n *NewFlow) Refusal {
	if why := t.mayBegin(k, v, n, n.Source != Keep || n.Server != [16]byte{}); why != Accepted {
		return why
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if f, _ := t.lookup(k); f != nil {
		return Accepted
	}
	c := client{addr: k.src, tokens: float32(t.set.FlowRatePerClient), filled: Coarse(now)}
	if known := t.clients[k.src]; known != nil {
		c = *known // a copy: tokens are taken from it
	}
	if why := t.mayHave(Coarse(now), &c); why != Accepted {
		return why
	}
	var f Flow
	t.fill(Coarse(now), &f, k, v, n)
	return t.mayTranslate(Coarse(now), &c, &f, n)
}

// mayHave reports whether a client may have one more flow, see openFor.
func (t *Table) mayHave(now uint32, c *client) Refusal {
	own := 0 // of its own flows that make room
	if c.live >= t.set.MaxFlowsPerClient {
		if c.halfOpen == 0 {
			return ClientFull
		}
		own++
	}
	if !t.allowRate(now, c) {
		return ClientRate
	}
	if t.set.MaxHalfOpen > 0 && c.halfOpen-own >= t.set.MaxHalfOpen {
		own++
	}
	if t.count-own >= t.set.MaxFlows && t.expendable() == 0 {
		return TableFull
	}
	return Accepted
}

// mayTranslate reports whether there is a source for a flow, see translate.
func (t *Table) mayTranslate(now uint32, c *client, f *Flow, n *NewFlow) Refusal {
	switch n.Source {
	case Map:
		f.setAddr(endExternal, n.Address)
		if n.Port != 0 {
			f.setPort(endExternal, n.Port)
		}
	case Masquerade:
		f.setAddr(endExternal, n.Address)
		why, free := t.mayAcquire(now, c, f)
		switch {
		case why == NoPort && t.set.PortSharing == ByDestination:
			return t.share(f)
		case why != Accepted || free:
			return why
		}
	}
	if t.taken(f) {
		return Clash
	}
	return Accepted
}

// mayAcquire gives a flow that isn't in the table the port that acquire would; free
// means that those who have used it make way.
func (t *Table) mayAcquire(now uint32, c *client, f *Flow) (why Refusal, free bool) {
	client, clientPort, class := f.Client(), f.ClientPort(), ClassOf(f.Proto())
	i, ok := t.byAddr[poolKey{f.External(), f.Proto()}]
	if !ok {
		return Accepted, true // with a pool of its own
	}
	p := t.pools[i]
	f.pool = i
	if port := p.find(t, &client, clientPort); port != 0 && !(p.quarantined.has(port) && p.reserved.has(port)) {
		f.setPort(endExternal, port)
		return Accepted, false
	}
	if limit := t.set.MaxPortsPerClient; limit > 0 && c.ports[class] >= limit {
		return ClientPorts, false
	}
	if port := p.choose(t, &client, clientPort); port != 0 {
		f.setPort(endExternal, port)
		return Accepted, false
	}
	if !t.mayReuse(now, p, f) {
		return NoPort, false
	}
	return Accepted, true
}

// mayReuse reports whether expire or reuse would free a port.
func (t *Table) mayReuse(now uint32, p *pool, f *Flow) bool {
	const tries = 64
	fits := func(port uint16) bool { return sameClass(f.Proto(), port, f.ClientPort()) && !p.reserved.has(port) }
	for id, n := p.closed.first, 0; id != 0 && n < tries; id, n = t.flow(id).lnext, n+1 {
		if port := t.flow(id).ExtPort(); fits(port) && p.at(port).n == 1 {
			return true
		}
	}
	waits := t.Filter(f.Proto()) == EndpointIndependent
	for port, n := p.quarantine.first, 0; port != 0 && n < tries; port, n = p.at(port).link, n+1 {
		if over := int32(p.at(port).n-now) <= 0; fits(port) && (over || !waits) {
			return true
		}
	}
	return false
}
