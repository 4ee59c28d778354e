package vl1

import (
	"math"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// doubt probes the paths of a peer that sends through a root although we have a
// direct path to it: it may have left that path for a reason.
func (c *Core) doubt(w *Worker, p *Peer) {
	p.nextDoubt.Store(w.t + int64(doubtEvery))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pa := range p.paths {
		if pa.suspect == 0 && since(w.t, pa.lastIn.Load()) >= pathProbeEvery {
			pa.noteProbeLocked(w.t)
			c.probeLocked(w, p, pa.sock, pa.ep)
		}
	}
	c.routesChangedLocked(p, w.t)
}

// heardElsewhere handles a direct packet that came on another path than the last
// one, or after a silence.
func (c *Core) heardElsewhere(w *Worker, p *Peer, src Source, verb packet.Verb, confirmed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, alias := p.pathFromLocked(src, w.t)
	switch {
	case known != nil:
		known.aliveLocked(w.t)
		p.lastPath.Store(known)
		c.routesChangedLocked(p, w.t)
	case alias != nil:
		c.doubtAliasLocked(w, p, alias, verb)
	case !c.allowed(p, src.Endpoint):
	case verb != packet.VerbOK:
		c.probeNewLocked(w, p, src, verb)
	case confirmed:
		c.newPathLocked(w, p, src)
	}
}

// pathFromLocked returns the path on which a packet came, else one in good order to
// another port of the same host.
func (p *Peer) pathFromLocked(src Source, t int64) (known, alias *path) {
	for _, pa := range p.paths {
		if pa.sock != src.Socket {
			continue
		}
		if pa.ep == src.Endpoint {
			return pa, nil
		}
		if pa.ep.Addr() == src.Endpoint.Addr() && !pa.silent(t) && !pa.doubtedLocked(t) {
			alias = pa
		}
	}
	return nil, alias
}

// doubtAliasLocked probes a path to a host whose packet came from another port: the
// peer has several, or was started again.
func (c *Core) doubtAliasLocked(w *Worker, p *Peer, alias *path, verb packet.Verb) {
	quiet := pathSuspectAfter
	if verb == packet.VerbHello {
		quiet = 0
	}
	if alias.suspect == 0 && since(w.t, alias.probed) >= pathProbeEvery && since(w.t, alias.lastIn.Load()) >= quiet {
		alias.noteProbeLocked(w.t)
		c.probeLocked(w, p, alias.sock, alias.ep)
	}
}

// newPathLocked adds a path that a reply to a probe proved.
func (c *Core) newPathLocked(w *Worker, p *Peer, src Source) {
	pa := c.learnPathLocked(p, src.Socket, src.Endpoint, w.t)
	p.lastPath.Store(pa)
	c.greetLocked(w, p, pa)
	for _, old := range p.paths { // the peer may have moved: are they still good?
		if old != pa && old.suspect == 0 && old.lastIn.Load() != w.t {
			old.noteProbeLocked(w.t)
			c.probeLocked(w, p, old.sock, old.ep)
		}
	}
	c.routesChangedLocked(p, w.t)
}

// probeNewLocked probes an endpoint from which a packet came, at most so often: the
// packet may be a copy.
func (c *Core) probeNewLocked(w *Worker, p *Peer, src Source, verb packet.Verb) {
	if last, ok := p.confirmed[src.Endpoint]; ok && since(w.t, last) < time.Second {
		return
	}
	if verb == packet.VerbHello && p.ProtocolVersion() < 5 {
		return // such old releases know no ECHO, and a HELLO gives more than was sent
	}
	if !p.confirms.Take(w.t, 2*time.Second, 5) {
		return
	}
	echo := p.knowsEcho() || verb == packet.VerbEcho
	size := packet.HeaderLen
	if !echo {
		size = c.helloSizeLocked()
	}
	if !c.mayAnswerLocked(w, p, src, size) {
		return
	}
	p.noteProbeLocked(src.Endpoint, w.t)
	if echo {
		c.echoLocked(w, p, src.Socket, src.Endpoint, 0)
	} else {
		c.sendHelloLocked(w, p, src.Socket, src.Endpoint)
	}
}

// noteProbeLocked remembers that an endpoint was probed.
func (p *Peer) noteProbeLocked(ep netip.AddrPort, t int64) {
	const most = 32
	if len(p.confirmed) >= most {
		for old, at := range p.confirmed {
			if since(t, at) >= 10*time.Second {
				delete(p.confirmed, old)
			}
		}
		if len(p.confirmed) >= most {
			clear(p.confirmed)
		}
	}
	p.confirmed[ep] = t
}

// routesChangedLocked recomputes the routes that a changed path of p affects.
func (c *Core) routesChangedLocked(p *Peer, t int64) {
	if c.IsUpstream(p.addr) {
		c.updateBestLocked(t)
	}
	c.updateRouteLocked(p, t)
}

// noteLatency folds a round trip into the latency of the path it was measured on.
func (c *Core) noteLatency(p *Peer, src Source, rtt time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pa := range p.paths {
		if pa.ep != src.Endpoint || pa.sock != src.Socket {
			continue
		}
		if old := pa.latency.Load(); old > 0 {
			rtt = (rtt + time.Duration(old)) / 2
		}
		pa.latency.Store(int64(max(rtt, 1)))
	}
}

// hint is a RENDEZVOUS for a peer that isn't known yet (chapter 02 §2.8).
type hint struct {
	sock SocketID
	at   netip.AddrPort
	born int64
}

// hints are the latest RENDEZVOUS of peers that aren't known yet.
type hints struct {
	m map[identity.Address]hint
}

// add remembers a hint if there is room for another.
func (h *hints) add(a identity.Address, x hint) {
	if len(h.m) < maxHints {
		h.m[a] = x
	}
}

// take removes the hint for a peer; false if there is none or it is too old.
func (h *hints) take(a identity.Address, t int64) (hint, bool) {
	x, ok := h.m[a]
	delete(h.m, a)
	return x, ok && since(t, x.born) < queueTimeout
}

func (h *hints) expire(t int64) {
	for a, x := range h.m {
		if since(t, x.born) >= queueTimeout {
			delete(h.m, a)
		}
	}
}

func (c *Core) receiveRendezvous(w *Worker, from *Peer, p packet.Packet, src Source) {
	v, ok := parseRendezvous(p.Payload())
	if !ok {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	if !c.IsUpstream(from.addr) {
		w.stats.rejects[RejectNotUpstream].Add(1)
	} else if peer := c.Peer(v.peer); peer != nil {
		c.mu.Lock()
		if t := w.t; (peer.lastRedirect == 0 || since(t, peer.lastRedirect) >= 5*time.Second) && c.met.Take(t, 100*time.Millisecond, 50) && c.credit.mayProbe(t, v.at.Addr()) {
			peer.lastRedirect = t
			c.punchLocked(w, peer, src.Socket, v.at)
		}
		c.mu.Unlock()
	} else if !v.peer.Reserved() && v.peer != c.self {
		c.mu.Lock()
		c.hints.add(v.peer, hint{src.Socket, v.at, w.t})
		c.mu.Unlock()
	}
	c.heard(w, from, &src, packet.VerbRendezvous, false, false)
}

// punchLocked opens the own NAT towards an endpoint and probes it.
func (c *Core) punchLocked(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort) {
	if !c.allowed(p, ep) {
		return
	}
	if ep.Addr().Is4() {
		junk := w.random.Uint64()
		w.out.SendTTL(sock, ep, []byte{byte(junk), byte(junk >> 8), byte(junk >> 16), byte(junk >> 24)}, 2)
	}
	p.noteProbeLocked(ep, w.t)
	c.probeLocked(w, p, sock, ep)
}

// Bounds of PUSH_DIRECT_PATHS (chapter 02 §2.7, §9).
const (
	maxPushProbes      = 16
	maxPushProbesClass = 8
)

func (c *Core) receivePush(w *Worker, from *Peer, p packet.Packet, src Source) {
	c.mu.Lock()
	if from.pushes.Take(w.t, 30*time.Second/8, 8) {
		from.pushed = parsePush(p.Payload())
		budget := math.MaxInt
		if !from.trusted(w.t) {
			budget = len(p) // a stranger gets no more sent about than it sends
		}
		c.probePushedLocked(w, from, budget)
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	c.heard(w, from, &src, packet.VerbPushDirectPaths, false, false)
}

// probePushedLocked probes the endpoints that a peer told us, and sends at most so many
// bytes; the others wait until it is trusted.
func (c *Core) probePushedLocked(w *Worker, from *Peer, budget int) {
	type class struct {
		scope packet.Scope
		v4    bool
	}
	count := make(map[class]int)
	probes, size := 0, c.probeSizeLocked(from)
	list := from.pushed
	from.pushed = nil
	for i, ep := range list {
		cl := class{packet.ScopeOf(ep.Addr()), ep.Addr().Is4()}
		known := slices.ContainsFunc(from.paths, func(pa *path) bool { return pa.ep == ep && !pa.silent(w.t) })
		last, tried := from.confirmed[ep]
		if known || tried && since(w.t, last) < 10*time.Second || !c.allowed(from, ep) || count[cl] >= maxPushProbesClass || probes >= maxPushProbes {
			continue
		}
		if size > budget {
			from.pushed = list[i:]
			return
		}
		if !c.credit.mayProbe(w.t, ep.Addr()) {
			w.stats.rejects[RejectRate].Add(1)
			continue
		}
		budget -= size
		count[cl]++
		probes++
		from.noteProbeLocked(ep, w.t)
		c.probeLocked(w, from, 0, ep)
	}
}

// trusts notes that a peer proved to be a member.
func (c *Core) trusts(w *Worker, p *Peer) {
	fresh := !p.trusted(w.t)
	touch(&p.lastTrust, w.t)
	if fresh {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.probePushedLocked(w, p, math.MaxInt)
	}
}

// pushPaths tells a trusted peer where we may be reached.
func (c *Core) pushPaths(w *Worker, p *Peer, src Source) {
	every := pushDirect
	if c.cfg.LowBandwidth {
		every *= 16
	}
	if src.Hops > 0 {
		every = pushRelayed
	}
	p.nextPush.Store(w.t + int64(every))
	var eps []netip.AddrPort
	add := func(ep netip.AddrPort) {
		if ep.Port() != 0 && !slices.Contains(eps, ep) {
			eps = append(eps, ep)
		}
	}
	if c.cfg.LocalEndpoints != nil {
		for _, ep := range c.cfg.LocalEndpoints() {
			switch packet.ScopeOf(ep.Addr()) {
			case packet.ScopePrivate, packet.ScopePseudoPrivate, packet.ScopeShared, packet.ScopeGlobal:
				if c.cfg.PathAllowed == nil || c.cfg.PathAllowed(ep.Addr()) {
					add(ep)
				}
			}
		}
	}
	c.mu.Lock()
	for _, ep := range c.surface.list() {
		add(ep)
	}
	c.mu.Unlock()
	for len(eps) > 0 {
		var b []byte
		b, eps = appendPush(nil, eps)
		if !c.reply(w, p, src, packet.VerbPushDirectPaths, b, true, p.suite()) {
			p.nextPush.Store(w.t + int64(pushAgain))
			return
		}
	}
}
