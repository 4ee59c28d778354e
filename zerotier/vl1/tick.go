package vl1

import (
	"cmp"
	"math"
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
	c.clock.look.Store(&look{now, w.t})
	c.mu.Lock()
	c.nextSize = math.MaxInt64
	c.followLocalLocked(w)
	c.tickRootsLocked(w)
	c.updateBestLocked(w.t)
	every := pingCheckEvery
	if c.cfg.LowBandwidth {
		every *= 5
	}
	ping := c.lastPing == 0 || since(w.t, c.lastPing) >= every
	if ping {
		c.lastPing = w.t
		c.contactSeedsLocked(w)
		c.keepContactsLocked(w)
	}
	strange := c.strangeContactsLocked(w.t)
	var flush []*Peer
	waiting := make(map[identity.Address]bool)
	for _, q := range c.queue.list {
		waiting[q.dst] = true
	}
	c.eachPeer(func(p *Peer) {
		c.tickPeerLocked(w, p, ping)
		if waiting[p.addr] {
			flush = append(flush, p)
		}
	})
	c.tickQueuesLocked(w)
	if c.lastHouse == 0 || since(w.t, c.lastHouse) >= housekeeping {
		c.lastHouse = w.t
		c.keepHouseLocked(w.t)
	}
	revive := c.reviveDueLocked(w.t)
	wait := tickEvery
	if c.best.Load() == nil && len(c.roots) > 0 {
		wait = tickEvery / 4
	}
	wait = min(wait, max(time.Duration(c.nextSize-w.t), sizeTick))
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

// tickRootsLocked keeps the roots within reach.
func (c *Core) tickRootsLocked(w *Worker) {
	for a, rs := range c.roots {
		p := c.Peer(a)
		if p == nil {
			continue
		}
		c.checkPathsLocked(w, p, true)
		c.sizePathsLocked(w, p)
		pa := p.bestPathLocked(w.t)
		if pa != nil && !pa.silent(w.t) {
			rs.attempts = 0
			if last := max(rs.lastProbe, p.lastReceive.Load()); rs.lastProbe == 0 || since(w.t, last) >= rootProbeEvery || since(w.t, rs.lastProbe) >= rootProbeEvery {
				rs.lastProbe = w.t
				c.probePathsLocked(w, p)
			}
			continue
		}
		if rs.attempts == 0 && pa != nil {
			c.log.Warn("root is silent, trying all its addresses", "root", a)
		}
		if rs.lastHello != 0 && since(w.t, rs.lastHello) < retryAfter(rs.attempts) {
			continue
		}
		rs.attempts++
		rs.lastHello, rs.lastProbe = w.t, w.t
		for _, ep := range c.worlds.Load().upstreams[a].endpoints {
			c.sendHelloLocked(w, p, 0, ep)
		}
		if pa == nil {
			c.relayHelloLocked(w, p)
		}
	}
}

// followLocalLocked reacts to new and gone local addresses: the roots must learn where
// we are, and paths from closed sockets are no more.
func (c *Core) followLocalLocked(w *Worker) {
	if c.cfg.LocalEndpoints == nil {
		return
	}
	eps := c.cfg.LocalEndpoints()
	if slices.Equal(eps, c.local) || c.lastLocal != 0 && since(w.t, c.lastLocal) < localEvery {
		return
	}
	first := c.local == nil
	c.local, c.lastLocal = slices.Clone(eps), w.t
	if first {
		return
	}
	c.log.Info("local addresses changed", "endpoints", len(eps))
	for a, rs := range c.roots {
		rs.attempts, rs.lastHello = 0, 0
		if p := c.Peer(a); p != nil {
			for _, ep := range c.worlds.Load().upstreams[a].endpoints {
				c.sendHelloLocked(w, p, 0, ep)
			}
		}
	}
	c.eachPeer(func(p *Peer) {
		for _, pa := range p.paths {
			pa.noteProbeLocked(w.t)
			p.noteProbeLocked(pa.ep, w.t)
			c.probeLocked(w, p, 0, pa.ep) // from the new sockets too
		}
		if c.cfg.SocketOpen != nil {
			p.paths = slices.DeleteFunc(p.paths, func(pa *path) bool { return !c.cfg.SocketOpen(pa.sock) })
			p.forgetLastLocked()
		}
		p.nextPush.Store(0)
		c.updateRouteLocked(p, w.t)
	})
}

// contactSeedsLocked asks for the moons we wait for.
func (c *Core) contactSeedsLocked(w *Worker) {
	for _, seed := range c.waiting {
		p := c.Peer(seed)
		if p == nil {
			c.askWhoisLocked(w, seed, false)
			continue
		}
		if pa := p.bestPathLocked(w.t); pa != nil {
			c.sendHelloLocked(w, p, pa.sock, pa.ep)
		} else {
			c.relayHelloLocked(w, p)
		}
	}
}

// KeepContact replaces the list of leaves that are kept in contact even if nothing is
// sent to them: those that networks mark as relays, anchors or multicast replicators
// (chapter 03 §2.4, chapter 06 §5.1). Of more than 64 the last ones are left out; it
// returns how many.
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
	c.contacts, c.strange = contacts, nil
	return refused
}

// keepContactsLocked says HELLO, through a root, to contacts without a path: tickPeerLocked keeps
// the paths of the others. Those that aren't known are to be looked up.
func (c *Core) keepContactsLocked(w *Worker) {
	all := len(c.strange) == 0
	for a := range c.contacts {
		p := c.Peer(a)
		switch {
		case p == nil && all:
			c.strange = append(c.strange, a)
		case p == nil:
		case c.IsUpstream(a) || p.bestPathLocked(w.t) != nil:
		case c.best.Load() != nil && (p.lastFullHello == 0 || since(w.t, p.lastFullHello) >= contactEvery):
			p.lastFullHello = w.t
			c.relayHelloLocked(w, p)
		}
	}
}

// strangeContactsLocked returns the contacts to look up now: only a few a second, since it
// is others who say how many there are.
func (c *Core) strangeContactsLocked(t int64) (now []identity.Address) {
	for len(c.strange) > 0 && c.asks.Take(t, contactAskEvery, contactAskBurst) {
		now = append(now, c.strange[0])
		c.strange = c.strange[1:]
	}
	return now
}

// staysLocked reports whether a peer is needed however long it is silent.
func (c *Core) staysLocked(p *Peer) bool {
	return c.IsUpstream(p.addr) || c.isSeedLocked(p.addr) || c.contacts[p.addr]
}

// checkPathsLocked removes expired paths, and probes those in doubt.
func (c *Core) checkPathsLocked(w *Worker, p *Peer, active bool) {
	p.paths = slices.DeleteFunc(p.paths, func(pa *path) bool { return pa.expired(w.t) })
	p.forgetLastLocked()
	doubt := false
	for _, pa := range p.paths {
		probe := pa.checkLocked(w.t, active)
		// What ails one path often ails the others: know before they are needed.
		probe = probe || doubt && pa.suspect == 0 && since(w.t, pa.lastIn.Load()) >= pathProbeEvery
		if probe {
			pa.noteProbeLocked(w.t)
			c.probeLocked(w, p, pa.sock, pa.ep)
		}
		doubt = doubt || pa.suspect != 0 && !pa.dead.Load()
	}
}

// probePathsLocked probes every path of a root; a full HELLO now and then keeps its
// knowledge of us fresh.
func (c *Core) probePathsLocked(w *Worker, p *Peer) {
	full := since(w.t, p.lastFullHello) >= fullHelloEvery
	if full {
		p.lastFullHello = w.t
	}
	for _, pa := range p.paths {
		pa.noteProbeLocked(w.t)
		if full {
			c.sendHelloLocked(w, p, pa.sock, pa.ep)
		} else {
			c.probeLocked(w, p, pa.sock, pa.ep)
		}
	}
}

// tickPeerLocked keeps the paths of a peer alive and notices dead ones.
func (c *Core) tickPeerLocked(w *Worker, p *Peer, ping bool) {
	if c.IsUpstream(p.addr) {
		return
	}
	used := max(p.lastNontrivial.Load(), p.lastData.Load()) // also if we only send
	active := used != 0 && since(w.t, used) < peerActive || c.contacts[p.addr]
	c.checkPathsLocked(w, p, active)
	c.sizePathsLocked(w, p)
	if active {
		c.tryConfiguredLocked(w, p)
	} else {
		c.updateRouteLocked(p, w.t)
		return
	}
	full := ping && since(w.t, p.lastFullHello) >= fullHelloEvery && len(p.paths) > 0
	if full {
		p.lastFullHello = w.t
	}
	for _, pa := range p.paths {
		switch {
		case full:
			c.sendHelloLocked(w, p, pa.sock, pa.ep)
		case ping && since(w.t, pa.lastOut.Load()) >= pathHeartbeat:
			c.probeLocked(w, p, pa.sock, pa.ep)
		default:
			continue
		}
		pa.noteProbeLocked(w.t)
	}
	c.updateRouteLocked(p, w.t)
}

// tickQueuesLocked repeats questions and drops what waited too long.
func (c *Core) tickQueuesLocked(w *Worker) {
	c.queue.expire(w.t)
	for _, q := range c.queue.list {
		if c.Peer(q.dst) == nil {
			c.askWhoisLocked(w, q.dst, false)
		}
	}
	for _, a := range c.held.due(w.t) {
		c.askWhoisLocked(w, a, true)
	}
	c.whois.expire(w.t)
	c.hints.expire(w.t)
}

// keepHouseLocked forgets what is old.
func (c *Core) keepHouseLocked(t int64) {
	c.surface.expire(t)
	c.intros.expire(t)
	c.replies.expire(t)
	c.eachPeer(func(p *Peer) {
		if !c.staysLocked(p) && since(t, p.lastReceive.Load()) >= peerAlive {
			c.forgetLocked(p)
		}
	})
	c.evictLocked(t, maxUntrustedPeers)
	for a, at := range c.recalled {
		if since(t, at) >= recallEvery {
			delete(c.recalled, a)
		}
	}
}

// evictLocked forgets the longest silent of the peers that share no network with us, so
// that most are left.
func (c *Core) evictLocked(t int64, most int) {
	var untrusted []*Peer
	c.eachPeer(func(p *Peer) {
		if !c.staysLocked(p) && !p.trusted(t) {
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

// forgetLocked removes a peer and keeps what the cache wants of it.
func (c *Core) forgetLocked(p *Peer) {
	c.removePeer(p)
	if r, ok := c.recordLocked(p); ok && c.cfg.OnForgotten != nil {
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
