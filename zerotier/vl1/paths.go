package vl1

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/packet"
)

// doubt probes the paths of a peer that sends through a root although we have a
// direct path to it: it may have left that path for a reason.
func (c *Core) doubt(w *Worker, p *Peer) {
	t := w.t
	p.nextDoubt.Store(t + int64(doubtEvery))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pa := range p.paths {
		if pa.suspect == 0 && since(t, pa.lastIn.Load()) >= pathProbeEvery {
			pa.noteProbe(t)
			c.probe(w, p, pa.sock, pa.ep)
		}
	}
	c.routesChanged(p, t)
}

// heardElsewhere handles a direct packet that came on another path than the last
// one, or after a silence.
func (c *Core) heardElsewhere(w *Worker, p *Peer, src Source, verb packet.Verb, confirmed bool) {
	t := w.t
	c.mu.Lock()
	defer c.mu.Unlock()
	var alias *path
	for _, pa := range p.paths {
		if pa.sock != src.Socket {
			continue
		}
		if pa.ep == src.Endpoint {
			pa.alive(t)
			p.lastPath.Store(pa)
			c.routesChanged(p, t)
			return
		}
		if pa.ep.Addr() == src.Endpoint.Addr() && !pa.silent(t) && !pa.doubted(t) {
			alias = pa
		}
	}
	if alias != nil {
		// Another port of the same host: the peer has several, or was started again.
		quiet := pathSuspectAfter
		if verb == packet.VerbHello {
			quiet = 0
		}
		if alias.suspect == 0 && since(t, alias.probed) >= pathProbeEvery && since(t, alias.lastIn.Load()) >= quiet {
			alias.noteProbe(t)
			c.probe(w, p, alias.sock, alias.ep)
		}
		return
	}
	if !c.allowed(p, src.Endpoint) {
		return
	}
	if verb == packet.VerbOK {
		if confirmed {
			pa := c.learnPath(p, src.Socket, src.Endpoint, t)
			p.lastPath.Store(pa)
			c.greet(w, p, pa)
			for _, old := range p.paths { // the peer may have moved: are they still good?
				if old != pa && old.suspect == 0 && old.lastIn.Load() != t {
					old.noteProbe(t)
					c.probe(w, p, old.sock, old.ep)
				}
			}
			c.routesChanged(p, t)
		}
		return
	}
	if last, ok := p.confirmed[src.Endpoint]; ok && since(t, last) < time.Second {
		return
	}
	if verb == packet.VerbHello && p.ProtocolVersion() < 5 {
		return // such old releases know no ECHO, and a HELLO gives more than was sent
	}
	if !p.confirms.Take(t, 2*time.Second, 5) {
		return
	}
	p.noteProbe(src.Endpoint, t)
	c.probe(w, p, src.Socket, src.Endpoint)
}

// noteProbe remembers that an endpoint was probed. Core.mu is held.
func (p *Peer) noteProbe(ep netip.AddrPort, t int64) {
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

// routesChanged recomputes the routes that a changed path of p affects. Core.mu
// is held.
func (c *Core) routesChanged(p *Peer, t int64) {
	if c.IsUpstream(p.addr) {
		c.updateBest(t)
	}
	c.updateRoute(p, t)
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
		if t := w.t; (peer.lastRedirect == 0 || since(t, peer.lastRedirect) >= 5*time.Second) && c.met.Take(t, 100*time.Millisecond, 50) {
			peer.lastRedirect = t
			c.punch(w, peer, src.Socket, v.at)
		}
		c.mu.Unlock()
	} else if !v.peer.Reserved() {
		c.mu.Lock()
		if len(c.hints) < maxHints {
			c.hints[v.peer] = hint{src.Socket, v.at, w.t}
		}
		c.mu.Unlock()
	}
	c.heard(w, from, src, packet.VerbRendezvous, false, false)
}

// punch opens the own NAT towards an endpoint and probes it. Core.mu is held.
func (c *Core) punch(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort) {
	if !c.allowed(p, ep) {
		return
	}
	if ep.Addr().Is4() {
		junk := w.random.Uint64()
		w.out.SendTTL(sock, ep, []byte{byte(junk), byte(junk >> 8), byte(junk >> 16), byte(junk >> 24)}, 2)
	}
	p.noteProbe(ep, w.t)
	c.probe(w, p, sock, ep)
}

// Bounds of PUSH_DIRECT_PATHS (chapter 02 §2.7, §9).
const (
	maxPushProbes      = 16
	maxPushProbesClass = 8
)

func (c *Core) receivePush(w *Worker, from *Peer, p packet.Packet, src Source) {
	t := w.t
	c.mu.Lock()
	if from.pushes.Take(t, 30*time.Second/8, 8) {
		type class struct {
			scope packet.Scope
			v4    bool
		}
		count := make(map[class]int)
		probes := 0
		for _, ep := range parsePush(p.Payload()) {
			cl := class{packet.ScopeOf(ep.Addr()), ep.Addr().Is4()}
			known := slices.ContainsFunc(from.paths, func(pa *path) bool { return pa.ep == ep && !pa.silent(t) })
			last, tried := from.confirmed[ep]
			if known || tried && since(t, last) < 10*time.Second || !c.allowed(from, ep) || count[cl] >= maxPushProbesClass || probes >= maxPushProbes {
				continue
			}
			count[cl]++
			probes++
			from.noteProbe(ep, t)
			c.probe(w, from, 0, ep)
		}
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	c.heard(w, from, src, packet.VerbPushDirectPaths, false, false)
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
	for _, ep := range c.surfaceLocked() {
		add(ep)
	}
	c.mu.Unlock()
	for len(eps) > 0 {
		var b []byte
		b, eps = appendPush(nil, eps)
		c.reply(w, p, src, packet.VerbPushDirectPaths, b, true, p.suite())
	}
}
