package vl1

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
)

// rootState is how we keep in contact with one root (chapter 02 §4.6). A root
// without a path that is alive gets HELLO on all its endpoints, at first quickly,
// then every 5 s.
type rootState struct {
	attempts  int
	lastHello int64
	lastProbe int64
}

// retryAfter is the pause after the n-th round of HELLOs.
func retryAfter(n int) time.Duration {
	steps := [...]time.Duration{0, 250 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, time.Second, 2 * time.Second}
	if n < len(steps) {
		return steps[n]
	}
	return pingCheckEvery
}

// Tick does what is due and returns when it wants to be called next.
func (c *Core) Tick(out Out, now time.Time) (next time.Time) {
	w := c.tick.Begin(out, now)
	t := w.t
	c.mu.Lock()
	c.followLocal(w)
	c.tickRoots(w)
	c.updateBest(t)
	every := pingCheckEvery
	if c.cfg.LowBandwidth {
		every *= 5
	}
	var strange []identity.Address
	ping := c.lastPing == 0 || since(t, c.lastPing) >= every
	if ping {
		c.lastPing = t
		c.contactSeeds(w)
		strange = c.keepContacts(w)
	}
	var flush []*Peer
	waiting := make(map[identity.Address]bool)
	for _, q := range c.outQueue {
		waiting[q.dst] = true
	}
	c.eachPeer(func(p *Peer) {
		c.tickPeer(w, p, ping)
		if waiting[p.addr] {
			flush = append(flush, p)
		}
	})
	c.tickQueues(w)
	if c.lastHouse == 0 || since(t, c.lastHouse) >= housekeeping {
		c.lastHouse = t
		c.keepHouse(t)
	}
	revive := c.reviveDue(t)
	wait := tickEvery
	if c.best.Load() == nil && len(c.roots) > 0 {
		wait = tickEvery / 4
	}
	forgotten, newcomers := c.forgotten, c.newcomers
	c.forgotten, c.newcomers = nil, nil
	c.mu.Unlock()
	for _, p := range newcomers {
		c.peerLearned(w, p)
	}
	for _, r := range forgotten {
		c.cfg.OnForgotten(r)
	}
	for _, a := range strange {
		c.Lookup(w, a)
	}
	for _, p := range flush {
		c.flushQueue(w, p)
	}
	if revive {
		c.revivePeers(w)
	}
	c.retry(w, nil)
	return now.Add(wait)
}

// tickRoots keeps the roots within reach. Core.mu is held.
func (c *Core) tickRoots(w *Worker) {
	t := w.t
	for a, rs := range c.roots {
		p := c.Peer(a)
		if p == nil {
			continue
		}
		c.checkPaths(w, p, true)
		pa := p.bestPath(t)
		if pa != nil && !pa.silent(t) {
			rs.attempts = 0
			if last := max(rs.lastProbe, p.lastReceive.Load()); rs.lastProbe == 0 || since(t, last) >= rootProbeEvery || since(t, rs.lastProbe) >= rootProbeEvery {
				rs.lastProbe = t
				c.probePaths(w, p)
			}
			continue
		}
		if rs.attempts == 0 && pa != nil {
			c.log.Warn("root is silent, trying all its addresses", "root", a)
		}
		if rs.lastHello != 0 && since(t, rs.lastHello) < retryAfter(rs.attempts) {
			continue
		}
		rs.attempts++
		rs.lastHello, rs.lastProbe = t, t
		for _, ep := range c.worlds.Load().upstreams[a].endpoints {
			c.sendHello(w, p, 0, ep)
		}
		if pa == nil {
			c.relayHello(w, p)
		}
	}
}

// followLocal reacts to new and gone local addresses: the roots must learn where
// we are, and paths from closed sockets are no more. Core.mu is
// held.
func (c *Core) followLocal(w *Worker) {
	if c.cfg.LocalEndpoints == nil {
		return
	}
	eps := c.cfg.LocalEndpoints()
	t := w.t
	if slices.Equal(eps, c.local) || c.lastLocal != 0 && since(t, c.lastLocal) < localEvery {
		return
	}
	first := c.local == nil
	c.local, c.lastLocal = slices.Clone(eps), t
	if first {
		return
	}
	c.log.Info("local addresses changed", "endpoints", len(eps))
	for a, rs := range c.roots {
		rs.attempts, rs.lastHello = 0, 0
		if p := c.Peer(a); p != nil {
			for _, ep := range c.worlds.Load().upstreams[a].endpoints {
				c.sendHello(w, p, 0, ep)
			}
		}
	}
	c.eachPeer(func(p *Peer) {
		for _, pa := range p.paths {
			pa.noteProbe(t)
			p.noteProbe(pa.ep, t)
			c.probe(w, p, 0, pa.ep) // from the new sockets too
		}
		if c.cfg.SocketOpen != nil {
			p.paths = slices.DeleteFunc(p.paths, func(pa *path) bool { return !c.cfg.SocketOpen(pa.sock) })
		}
		p.nextPush.Store(0)
		c.updateRoute(p, t)
	})
}

// contactSeeds asks for the moons we wait for. Core.mu is held.
func (c *Core) contactSeeds(w *Worker) {
	t := w.t
	for _, seed := range c.waiting {
		p := c.Peer(seed)
		if p == nil {
			c.askWhois(w, seed, false)
			continue
		}
		if pa := p.bestPath(t); pa != nil {
			c.sendHello(w, p, pa.sock, pa.ep)
		} else {
			c.relayHello(w, p)
		}
	}
}

// KeepContact replaces the list of leaves that are kept in contact even if nothing is
// sent to them: those that networks mark as anchors or multicast replicators (chapter
// 03 §2.4). Of more than 64 the last ones are left out; it returns how many.
func (c *Core) KeepContact(list []identity.Address) (refused int) {
	refused = max(0, len(list)-maxContacts)
	contacts := make(map[identity.Address]bool)
	for _, a := range list[:len(list)-refused] {
		if a != c.self && !a.Reserved() {
			contacts[a] = true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.contacts = contacts
	return refused
}

// keepContacts says HELLO, through a root, to contacts without a path: tickPeer keeps
// the paths of the others. It returns those that must be looked up. Core.mu is held.
func (c *Core) keepContacts(w *Worker) (strange []identity.Address) {
	t := w.t
	for a := range c.contacts {
		p := c.Peer(a)
		switch {
		case p == nil:
			strange = append(strange, a)
		case c.IsUpstream(a) || p.bestPath(t) != nil:
		case c.best.Load() != nil && (p.lastFullHello == 0 || since(t, p.lastFullHello) >= contactEvery):
			p.lastFullHello = t
			c.relayHello(w, p)
		}
	}
	return strange
}

// stays reports whether a peer is needed however long it is silent. Core.mu is held.
func (c *Core) stays(p *Peer) bool {
	return c.IsUpstream(p.addr) || c.isSeed(p.addr) || c.contacts[p.addr]
}

// checkPaths removes expired paths, and probes those in doubt. Core.mu is held.
func (c *Core) checkPaths(w *Worker, p *Peer, active bool) {
	t := w.t
	p.paths = slices.DeleteFunc(p.paths, func(pa *path) bool { return pa.expired(t) })
	doubt := false
	for _, pa := range p.paths {
		probe := pa.check(t, active)
		// What ails one path often ails the others: know before they are needed.
		probe = probe || doubt && pa.suspect == 0 && since(t, pa.lastIn.Load()) >= pathProbeEvery
		if probe {
			pa.noteProbe(t)
			c.probe(w, p, pa.sock, pa.ep)
		}
		doubt = doubt || pa.suspect != 0 && !pa.dead.Load()
	}
}

// probePaths probes every path of a root; a full HELLO now and then keeps its
// knowledge of us fresh. Core.mu is held.
func (c *Core) probePaths(w *Worker, p *Peer) {
	t := w.t
	full := since(t, p.lastFullHello) >= fullHelloEvery
	if full {
		p.lastFullHello = t
	}
	for _, pa := range p.paths {
		pa.noteProbe(t)
		if full {
			c.sendHello(w, p, pa.sock, pa.ep)
		} else {
			c.probe(w, p, pa.sock, pa.ep)
		}
	}
}

// tickPeer keeps the paths of a peer alive and notices dead ones. Core.mu is held.
func (c *Core) tickPeer(w *Worker, p *Peer, ping bool) {
	t := w.t
	if c.IsUpstream(p.addr) {
		return
	}
	used := max(p.lastNontrivial.Load(), p.lastData.Load()) // also if we only send
	active := used != 0 && since(t, used) < peerActive || c.contacts[p.addr]
	c.checkPaths(w, p, active)
	if active {
		c.tryConfigured(w, p)
	} else {
		c.updateRoute(p, t)
		return
	}
	full := ping && since(t, p.lastFullHello) >= fullHelloEvery && len(p.paths) > 0
	if full {
		p.lastFullHello = t
	}
	for _, pa := range p.paths {
		switch {
		case full:
			c.sendHello(w, p, pa.sock, pa.ep)
		case ping && since(t, pa.lastOut.Load()) >= pathHeartbeat:
			c.probe(w, p, pa.sock, pa.ep)
		default:
			continue
		}
		pa.noteProbe(t)
	}
	c.updateRoute(p, t)
}

// tickQueues repeats questions and drops what waited too long. Core.mu is held.
func (c *Core) tickQueues(w *Worker) {
	c.outQueue = slices.DeleteFunc(c.outQueue, func(q queued) bool { return since(w.t, q.born) >= queueTimeout })
	for _, q := range c.outQueue {
		if c.Peer(q.dst) == nil {
			c.askWhois(w, q.dst, false)
		}
	}
	c.held = slices.DeleteFunc(c.held, func(q heldPacket) bool { return since(w.t, q.born) >= queueTimeout })
	for i := range c.held {
		q := &c.held[i]
		age := since(w.t, q.born)
		if q.asked == 1 && age >= time.Second || q.asked == 2 && age >= 3*time.Second {
			q.asked++
			c.askWhois(w, q.from, true)
		}
	}
	for a, st := range c.whois {
		if since(w.t, max(st.last, st.first)) >= 2*whoisPacing {
			delete(c.whois, a)
		}
	}
	for a, h := range c.hints {
		if since(w.t, h.born) >= queueTimeout {
			delete(c.hints, a)
		}
	}
}

// keepHouse forgets what is old. Core.mu is held.
func (c *Core) keepHouse(t int64) {
	for k, e := range c.surface {
		if since(t, e.at) >= surfaceLifetime {
			delete(c.surface, k)
		}
	}
	for k, at := range c.intros {
		if since(t, at) >= introduceEvery {
			delete(c.intros, k)
		}
	}
	for len(c.expectLog) > 0 {
		if e := c.expected[c.expectLog[0]]; e != nil && since(t, e.sent) < expectTimeout {
			break
		}
		delete(c.expected, c.expectLog[0])
		c.expectLog = c.expectLog[1:]
	}
	c.eachPeer(func(p *Peer) {
		if !c.stays(p) && since(t, p.lastReceive.Load()) >= peerAlive {
			c.forget(p)
		}
	})
	c.evict(t, maxUntrustedPeers)
	for a, at := range c.recalled {
		if since(t, at) >= recallEvery {
			delete(c.recalled, a)
		}
	}
}

// evict forgets the longest silent of the peers that share no network with us, so
// that most are left. Core.mu is held.
func (c *Core) evict(t int64, most int) {
	var untrusted []*Peer
	c.eachPeer(func(p *Peer) {
		if !c.stays(p) && !p.trusted(t) {
			untrusted = append(untrusted, p)
		}
	})
	c.untrusted = len(untrusted)
	if c.untrusted <= most {
		return
	}
	slices.SortFunc(untrusted, func(a, b *Peer) int { return cmp.Compare(a.lastReceive.Load(), b.lastReceive.Load()) })
	for _, p := range untrusted[:c.untrusted-most] {
		c.removePeer(p)
	}
	c.untrusted = most
}

// forget removes a peer and keeps what the cache wants of it. Core.mu is held.
func (c *Core) forget(p *Peer) {
	c.removePeer(p)
	if r, ok := p.record(); ok && c.cfg.OnForgotten != nil {
		c.forgotten = append(c.forgotten, r)
	}
}

// Endpoints lists the endpoints at which peers reach us now, for diagnostics.
func (p *Peer) Endpoints(c *Core) (out []netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pa := range p.paths {
		out = append(out, pa.ep)
	}
	return out
}
