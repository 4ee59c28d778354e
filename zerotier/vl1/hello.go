package vl1

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// sendHello sends HELLO to an endpoint. Core.mu is held.
func (c *Core) sendHello(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort) {
	c.hello(w, p, sock, ep, ep)
}

// relayHello sends HELLO through the best root. Core.mu is held.
func (c *Core) relayHello(w *Worker, p *Peer) {
	if best := c.best.Load(); best != nil {
		if pa := best.bestPathLockedOrRoute(); pa != nil {
			c.hello(w, p, pa.sock, pa.ep, netip.AddrPort{})
		}
	}
}

func (c *Core) hello(w *Worker, p *Peer, sock SocketID, ep, sentTo netip.AddrPort) {
	set := c.worlds.Load()
	h := hello{
		version: c.version, timestamp: w.now.UnixMilli(), identity: c.id, sentTo: sentTo,
		planetID: set.planet.ID, planetTimestamp: set.planet.Timestamp,
	}
	h.moons = c.moonRefs()
	b := packet.Packet(h.append(make([]byte, packet.HeaderLen, 256)))
	packet.PutHeader(b, packet.ID(w.random.Uint64()), p.addr, c.self, packet.VerbHello)
	p.keys.MaskHello(b, h.masked, &w.scratch)
	p.keys.Seal(b, packet.SuitePoly1305, &w.scratch)
	w.stats.sealed[packet.SuitePoly1305].Add(uint64(len(b)))
	w.stats.txPackets.Add(1)
	w.stats.txBytes.Add(uint64(len(b)))
	c.expect(b.ID(), &expectation{peer: p.addr, verb: packet.VerbHello, ep: ep, sent: w.t, timestamp: h.timestamp})
	w.out.Send(sock, ep, nil, b)
}

// greet completes what was held back while a new path was unproven: worlds that
// are owed, and a HELLO, which tells the peer its external address. Core.mu is held.
func (c *Core) greet(w *Worker, p *Peer, pa *path) {
	t := w.t
	if o := p.owed; o != nil && o.src.Endpoint == pa.ep {
		p.owed = nil
		if since(t, o.at) < owedLifetime {
			c.answerHello(w, p, o.src, o.id, &o.hello, o.moons, true)
		}
	}
	if since(t, p.lastFullHello) >= time.Second {
		p.lastFullHello = t
		c.sendHello(w, p, pa.sock, pa.ep)
	}
}

// receiveHello handles HELLO in suite 0, the only packet a stranger may send
// (chapter 01 §7.2, chapter 02 §2.2).
func (c *Core) receiveHello(w *Worker, src Source, p packet.Packet) {
	h, ok := parseHello(p.Payload())
	switch {
	case !ok:
		w.stats.rejects[RejectMalformed].Add(1)
		return
	case h.version.protocol < packet.MinProtocolVersion:
		w.stats.rejects[RejectVersion].Add(1)
		return
	case h.identity.Address() != p.Source():
		w.stats.rejects[RejectIdentity].Add(1)
		return
	}
	peer := c.Peer(p.Source())
	known := peer != nil
	switch {
	case !known:
		if peer = c.acquaint(w, src, p, h.identity); peer == nil {
			return
		}
		c.peerLearned(w, peer)
	case !peer.id.Equal(h.identity):
		c.collision(w, src, p, h.identity)
		return
	default:
		if peer.keys.Open(p, &w.scratch) != nil {
			w.stats.rejects[RejectMAC].Add(1)
			return
		}
	}
	w.stats.opened[packet.SuitePoly1305].Add(uint64(len(p)))
	var moons []worldRef
	if h.masked != 0 {
		peer.keys.MaskHello(p, h.masked, &w.scratch)
		moons = parseMoons(p[h.masked:])
	}
	if src.Hops == 0 && h.sentTo.IsValid() {
		c.noteSurface(w, peer, src, h.sentTo)
	}
	c.mu.Lock()
	if c.mayAnswerHello(src, w.t) {
		c.answerHello(w, peer, src, p.ID(), &h, moons, c.proven(peer, src, w.t))
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	peer.version.Store(packVersion(h.version))
	c.heard(w, peer, src, packet.VerbHello, false, false)
	if known {
		c.cfg.Upper.PeerLearned(w, peer)
	}
}

// acquaint checks a stranger's HELLO, cheap checks first, and makes a peer.
func (c *Core) acquaint(w *Worker, src Source, p packet.Packet, id *identity.Identity) *Peer {
	if !c.identityGate(src, w.t) {
		w.stats.rejects[RejectRate].Add(1)
		return nil
	}
	session, err := c.id.Agree(id)
	if err != nil {
		w.stats.rejects[RejectIdentity].Add(1)
		return nil
	}
	if packet.NewKeys(session).Open(p, &w.scratch) != nil {
		w.stats.rejects[RejectMAC].Add(1)
		return nil
	}
	if !c.roomForPeer(w.t) {
		w.stats.rejects[RejectPeerLimit].Add(1)
		return nil
	}
	t := w.t
	c.mu.Lock()
	inline := c.cfg.Background == nil || c.inline.Take(t, inlineEvery, inlineBurst)
	busy := !inline && (c.checking || len(c.held) >= maxHeld)
	if busy || !c.validated.Take(t, validateEvery, validateBurst) {
		c.mu.Unlock()
		w.stats.rejects[RejectRate].Add(1)
		return nil
	}
	if !inline {
		c.checking = true
		c.held = append(c.held, heldPacket{from: id.Address(), src: src, data: slices.Clone(p), born: t, asked: maxAsked})
	}
	c.mu.Unlock()
	if !inline {
		c.cfg.Background(func() { c.checkInBackground(w.stats, id, t) })
		return nil
	}
	if c.cfg.Validate(id) != nil { // slow: only after the MAC, and rate-limited
		w.stats.rejects[RejectIdentity].Add(1)
		return nil
	}
	peer, err := c.addPeer(id, t)
	if err != nil || !peer.id.Equal(id) {
		w.stats.rejects[RejectIdentity].Add(1)
		return nil
	}
	return peer
}

// checkInBackground makes a peer of a stranger whose HELLO is held. The next tick
// goes on with it.
func (c *Core) checkInBackground(st *workerStats, id *identity.Identity, t int64) {
	err := c.cfg.Validate(id)
	var p *Peer
	if err == nil {
		p, err = c.addPeer(id, t)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.checking = false
	if err != nil || !p.id.Equal(id) {
		st.rejects[RejectIdentity].Add(1)
		c.held = slices.DeleteFunc(c.held, func(q heldPacket) bool { return q.from == id.Address() && q.asked == maxAsked })
		return
	}
	c.newcomers = append(c.newcomers, p)
}

// Limits of what strangers cost in all: a key agreement takes about 0.1 ms, an
// identity check about 15 ms of a processor.
const (
	agreeEvery    = time.Millisecond
	agreeBurst    = 500
	validateEvery = 50 * time.Millisecond
	validateBurst = 100
	inlineEvery   = time.Second
	inlineBurst   = 16
)

// identityGate limits identity checks per source network and in all.
func (c *Core) identityGate(src Source, t int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gates[packet.SourceBucket(src.Endpoint.Addr())].Take(t, 2*time.Second, 8) && c.agreed.Take(t, agreeEvery, agreeBurst)
}

// roomForPeer reports whether another peer may be remembered, after forgetting
// silent ones if need be.
func (c *Core) roomForPeer(t int64) bool {
	if c.count.Load() < maxUntrustedPeers {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lastEvict == 0 || since(t, c.lastEvict) >= time.Second { // it looks at all peers
		c.lastEvict = t
		c.evict(t, maxUntrustedPeers-maxUntrustedPeers/16)
	}
	return c.untrusted < maxUntrustedPeers && c.count.Load() < maxPeers
}

// mayAnswerHello limits OK(HELLO) per address (chapter 02 §9). Core.mu is held.
func (c *Core) mayAnswerHello(src Source, t int64) bool {
	return c.okGates.Of(src.Endpoint.Addr()).Take(t, 1, 250*time.Millisecond, 20)
}

// collision answers a HELLO whose address belongs to another key.
func (c *Core) collision(w *Worker, src Source, p packet.Packet, id *identity.Identity) {
	w.stats.rejects[RejectCollision].Add(1)
	if !c.identityGate(src, w.t) {
		return
	}
	session, err := c.id.Agree(id)
	if err != nil {
		return
	}
	other := &Peer{id: id, addr: id.Address(), keys: packet.NewKeys(session)}
	if other.keys.Open(p, &w.scratch) != nil {
		return
	}
	b := append(reply{packet.VerbHello, p.ID()}.append(nil), byte(packet.ErrorIdentityCollision))
	c.reply(w, other, src, packet.VerbError, b, false, packet.SuiteSalsa)
}

const (
	maxWorldsInOK = 1300 // bytes, so that the packet stays one datagram
	worldsEvery   = 10 * time.Second
	owedLifetime  = 5 * time.Second
)

// owedWorlds is a HELLO that is to be answered again, with worlds, once its
// endpoint is proven: a stranger must not get more than he sends.
type owedWorlds struct {
	at    int64
	src   Source
	id    packet.ID
	hello hello
	moons []worldRef
}

// proven reports whether the endpoint of a packet is that of a path. Core.mu is
// held.
func (c *Core) proven(p *Peer, src Source, t int64) bool {
	return src.Hops > 0 || slices.ContainsFunc(p.paths, func(pa *path) bool { return pa.ep == src.Endpoint && !pa.expired(t) })
}

// newerWorlds returns the worlds of which the sender of a HELLO has older
// revisions.
func (c *Core) newerWorlds(h *hello, moons []worldRef) (b []byte) {
	set := c.worlds.Load()
	if h.planetID != 0 && h.planetID == set.planet.ID && h.planetTimestamp < set.planet.Timestamp {
		if p := set.planet.Append(nil); len(p) <= maxWorldsInOK {
			b = p
		}
	}
	for _, m := range set.moons {
		if slices.ContainsFunc(moons, func(r worldRef) bool { return r.id == m.ID && r.timestamp < m.Timestamp }) {
			if more := m.Append(b); len(more) <= maxWorldsInOK {
				b = more
			}
		}
	}
	return b
}

// answerHello sends OK(HELLO). Core.mu is held.
func (c *Core) answerHello(w *Worker, peer *Peer, src Source, id packet.ID, h *hello, moons []worldRef, proven bool) {
	o := okHello{timestamp: h.timestamp, version: c.version, sentTo: src.Endpoint}
	if h.version.protocol < 5 {
		o.sentTo = netip.AddrPortFrom(src.Endpoint.Addr(), 0)
	}
	t := w.t
	if worlds := c.newerWorlds(h, moons); len(worlds) > 0 && (peer.lastWorlds == 0 || since(t, peer.lastWorlds) >= worldsEvery) {
		if proven {
			peer.lastWorlds = t
			o.worlds = worlds
		} else {
			peer.owed = &owedWorlds{at: t, src: Source{Socket: src.Socket, Endpoint: src.Endpoint}, id: id, hello: *h, moons: moons}
			peer.owed.hello.identity = nil
		}
	}
	b := o.append(reply{packet.VerbHello, id}.append(nil))
	c.reply(w, peer, src, packet.VerbOK, b, false, peer.suite())
}

func (c *Core) okHello(w *Worker, from *Peer, b []byte, src Source, e *expectation) bool {
	o, ok := parseOKHello(b)
	if !ok || o.version.protocol < packet.MinProtocolVersion || o.timestamp != e.timestamp {
		return false
	}
	from.version.Store(packVersion(o.version))
	c.mu.Lock()
	believed := c.IsUpstream(from.addr) || c.isSeed(from.addr)
	c.mu.Unlock()
	if believed {
		for worlds := o.worlds; len(worlds) > 0; {
			world, n, err := ParseWorld(worlds)
			if err != nil {
				return false
			}
			c.offer(world)
			worlds = worlds[n:]
		}
	}
	if src.Hops == 0 && o.sentTo.IsValid() {
		c.noteSurface(w, from, src, o.sentTo)
	}
	return true
}
