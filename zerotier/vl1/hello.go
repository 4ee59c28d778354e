package vl1

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// sendHelloLocked sends HELLO to an endpoint.
func (c *Core) sendHelloLocked(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort) {
	c.helloLocked(w, p, sock, ep, ep)
}

// relayHelloLocked sends HELLO through the best root.
func (c *Core) relayHelloLocked(w *Worker, p *Peer) {
	if best := c.best.Load(); best != nil {
		if pa := best.directPath(); pa != nil {
			c.helloLocked(w, p, pa.sock, pa.ep, netip.AddrPort{})
		}
	}
}

func (c *Core) helloLocked(w *Worker, p *Peer, sock SocketID, ep, sentTo netip.AddrPort) {
	set := c.worlds.Load()
	e, ok := c.envelopeLocked(w, p)
	if !ok {
		return
	}
	h := hello{
		version: c.version, timestamp: c.clock.stamp(w.t), identity: c.id, sentTo: sentTo,
		planetID: set.planet.ID, planetTimestamp: set.planet.Timestamp,
	}
	h.moons = c.moonRefsLocked()
	b := packet.Packet(h.append(make([]byte, packet.HeaderLen, 256)))
	id := packet.ID(w.random.Uint64())
	for e != nil && !e.Suits(id, p.addr) {
		id = packet.ID(w.random.Uint64())
	}
	packet.PutHeader(b, id, p.addr, c.self, packet.VerbHello)
	p.keys.MaskHello(b, h.masked, w.scratch)
	if e == nil {
		p.keys.Seal(b, packet.SuitePoly1305, w.scratch)
	} else {
		b = p.keys.SealHello(b, e, w.scratch)
		w.stats.sealedHellosOut.Add(1)
	}
	w.stats.sealed[packet.SuitePoly1305].add(false, len(b))
	w.stats.txPackets.Add(1)
	c.replies.expect(b.ID(), &expectation{peer: p.addr, verb: packet.VerbHello, ep: ep, sent: w.t, timestamp: h.timestamp})
	w.out.Send(sock, ep, nil, b)
}

// greetLocked completes what was held back while a new path was unproven: worlds that
// are owed, and a HELLO, which tells the peer its external address.
func (c *Core) greetLocked(w *Worker, p *Peer, pa *path) {
	if o := p.owed; o != nil && o.src.Endpoint == pa.ep {
		p.owed = nil
		if since(w.t, o.at) < owedLifetime {
			c.answerHelloLocked(w, p, o.src, o.id, &o.hello, o.moons, true)
		}
	}
	if o := p.owedEcho; o.at != 0 && o.src.Endpoint == pa.ep && since(w.t, o.at) < owedLifetime {
		p.owedEcho = owedEcho{}
		c.okEchoLocked(w, p, o.src, o.id, nil)
	}
	if since(w.t, p.lastFullHello) >= time.Second {
		p.lastFullHello = w.t
		c.sendHelloLocked(w, p, pa.sock, pa.ep)
	}
}

// helloSizeLocked is at least the size of the HELLO that we send.
func (c *Core) helloSizeLocked() int {
	const fixed = 13 + 19 + 16 + 2
	size := packet.HeaderLen + fixed + len(c.id.AppendBinary(nil)) + 17*len(c.moonRefsLocked())
	if c.SealedHello() != ztnode.SealedHelloOff {
		size += packet.EnvelopeLen
	}
	return size
}

// receiveHello handles HELLO in suite 0, the only packet a stranger may send
// (chapter 01 §7.2, chapter 02 §2.2). It may have been in an envelope.
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
	if peer == nil && !p.Enveloped() {
		peer = c.recallSender(w, p.Source()) // its identity was checked before
	}
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
		if peer.keys.Open(p, w.scratch) != nil {
			w.stats.rejects[RejectMAC].Add(1)
			return
		}
	}
	if c.repeat.look(p.ID()).seen() {
		w.stats.rejects[RejectReplay].Add(1)
		return
	}
	w.stats.opened[packet.SuitePoly1305].add(src.Hops > 0, len(p))
	if p.Enveloped() {
		w.stats.sealedHellosIn.Add(1)
	}
	c.deposit(w, peer, &src)
	c.authenticHello(w, peer, src, p, &h)
	if known {
		c.cfg.Upper.PeerLearned(w, peer)
	}
}

// receiveEncryptedHello handles a HELLO of a known peer in another suite, which nobody is
// known to send (chapter 06 §3.7).
func (c *Core) receiveEncryptedHello(w *Worker, from *Peer, p packet.Packet, src Source) {
	h, ok := parseHello(p.Payload())
	switch {
	case !ok:
		w.stats.rejects[RejectMalformed].Add(1)
	case h.version.protocol < packet.MinProtocolVersion:
		w.stats.rejects[RejectVersion].Add(1)
	case !from.id.Equal(h.identity):
		w.stats.rejects[RejectIdentity].Add(1)
	default:
		c.authenticHello(w, from, src, p, &h)
		c.cfg.Upper.PeerLearned(w, from)
	}
}

// authenticHello learns from a HELLO and answers it.
func (c *Core) authenticHello(w *Worker, peer *Peer, src Source, p packet.Packet, h *hello) {
	var moons []worldRef
	if h.masked != 0 && p.Suite() < packet.SuiteTrusted { // suite 3 spoils what is masked
		peer.keys.MaskHello(p, h.masked, w.scratch)
		moons = parseMoons(p[h.masked:])
	}
	if src.Hops == 0 && h.sentTo.IsValid() {
		c.noteSurface(w, peer, src, h.sentTo)
	}
	c.mu.Lock()
	if c.strangers.mayAnswer(w.t, src.Endpoint.Addr()) {
		c.answerHelloLocked(w, peer, src, p.ID(), h, moons, c.provenLocked(peer, src, w.t))
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	peer.version.Store(packVersion(h.version))
	c.heard(w, peer, &src, packet.VerbHello, false, false)
}

// acquaint checks a stranger's HELLO, cheap checks first, and makes a peer. It returns
// nil without, also while the identity is checked in the background.
func (c *Core) acquaint(w *Worker, src Source, p packet.Packet, id *identity.Identity) *Peer {
	if why, ok := c.authenticate(w, src, p, id); !ok {
		w.stats.rejects[why].Add(1)
		return nil
	}
	if p.Enveloped() { // of a plain one this was done at the start
		if peer := c.recallSender(w, p.Source()); peer != nil {
			if peer.id.Equal(id) {
				return peer
			}
			w.stats.rejects[RejectCollision].Add(1)
			return nil
		}
		c.mu.Lock()
		ok := c.strangers.mayAgree(w.t, src.Endpoint.Addr())
		c.mu.Unlock()
		if !ok {
			w.stats.rejects[RejectRate].Add(1)
			return nil
		}
	}
	work, ok := c.budget.Take(w.t, budget.Sender{}, budget.Identity, 1) // slow: only after the MAC
	if !ok {
		w.stats.rejects[RejectBudget].Add(1)
		return nil
	}
	switch c.checkWhere(w, src, p, id) {
	case checkHere:
		peer, ok := c.checkIdentity(id, w.t)
		work.Done()
		if !ok {
			w.stats.rejects[RejectIdentity].Add(1)
			return nil
		}
		return peer
	case checkBackground:
		t := w.t
		c.cfg.Background(func() {
			c.checkInBackground(w.stats, id, t)
			work.Done()
		})
	default:
		work.Cancel()
		w.stats.rejects[RejectRate].Add(1)
	}
	return nil
}

// authenticate reports whether a stranger's HELLO was sealed by the identity in it, and
// whether there is room for a peer; else why it is refused.
func (c *Core) authenticate(w *Worker, src Source, p packet.Packet, id *identity.Identity) (why Reject, ok bool) {
	var work budget.Work
	if p.Enveloped() {
		work, ok = c.budget.Take(w.t, budget.Sender{}, budget.Agreement, 1)
		why = RejectBudget
	} else {
		work, why, ok = c.mayAgree(w, src)
	}
	if !ok {
		return why, false
	}
	session, err := c.id.Agree(id)
	work.Done()
	switch {
	case err != nil:
		return RejectIdentity, false
	case packet.NewKeys(session).Open(p, w.scratch) != nil:
		return RejectMAC, false
	case !c.roomForPeer(w.t):
		return RejectPeerLimit, false
	}
	return 0, true
}

// checkWhere decides where an identity is checked. Its HELLO is held if that is in
// the background.
func (c *Core) checkWhere(w *Worker, src Source, p packet.Packet, id *identity.Identity) checking {
	c.mu.Lock()
	defer c.mu.Unlock()
	where := c.strangers.check(w.t, c.cfg.Background != nil, !c.held.full())
	if where == checkBackground {
		c.held.addChecked(heldPacket{from: id.Address(), src: src, data: p, born: w.t, opened: p.Enveloped()})
	}
	return where
}

// checkIdentity makes a peer of an identity if its address follows from its keys.
func (c *Core) checkIdentity(id *identity.Identity, t int64) (*Peer, bool) {
	if c.cfg.Validate(id) != nil {
		return nil, false
	}
	p, err := c.addPeer(id, t)
	return p, err == nil && p.id.Equal(id)
}

// checkInBackground makes a peer of a stranger whose HELLO is held. The next tick
// goes on with it.
func (c *Core) checkInBackground(st *workerStats, id *identity.Identity, t int64) {
	p, ok := c.checkIdentity(id, t)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.strangers.checked()
	if !ok {
		st.rejects[RejectIdentity].Add(1)
		c.held.dropChecked(id.Address())
		return
	}
	c.newcomers = append(c.newcomers, p)
}

// mayAgree decides whether a stranger may cause a key agreement, else why not.
func (c *Core) mayAgree(w *Worker, src Source) (work budget.Work, why Reject, ok bool) {
	c.mu.Lock()
	ok = c.strangers.mayAgree(w.t, src.Endpoint.Addr())
	c.mu.Unlock()
	if !ok {
		return work, RejectRate, false
	}
	work, ok = c.budget.Take(w.t, budget.Sender{}, budget.Agreement, 1)
	return work, RejectBudget, ok
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
		c.evictLocked(t, maxUntrustedPeers-maxUntrustedPeers/16)
	}
	return c.untrusted < maxUntrustedPeers && c.count.Load() < maxPeers
}

// collision answers a HELLO whose address belongs to another key.
func (c *Core) collision(w *Worker, src Source, p packet.Packet, id *identity.Identity) {
	w.stats.rejects[RejectCollision].Add(1)
	work, why, ok := c.mayAgree(w, src)
	if !ok {
		w.stats.rejects[why].Add(1)
		return
	}
	session, err := c.id.Agree(id)
	work.Done()
	if err != nil {
		return
	}
	other := &Peer{id: id, addr: id.Address(), keys: packet.NewKeys(session)}
	if other.keys.Open(p, w.scratch) != nil {
		return
	}
	c.deposit(w, other, &src)
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

// answerHelloLocked sends OK(HELLO).
func (c *Core) answerHelloLocked(w *Worker, peer *Peer, src Source, id packet.ID, h *hello, moons []worldRef, proven bool) {
	o := okHello{timestamp: h.timestamp, version: c.version, sentTo: src.Endpoint}
	if worlds := c.newerWorlds(h, moons); len(worlds) > 0 && (peer.lastWorlds == 0 || since(w.t, peer.lastWorlds) >= worldsEvery) {
		if proven {
			peer.lastWorlds = w.t
			o.worlds = worlds
		} else {
			peer.owed = &owedWorlds{at: w.t, src: Source{Socket: src.Socket, Endpoint: src.Endpoint}, id: id, hello: *h, moons: moons}
			peer.owed.hello.identity = nil
		}
	}
	b := o.append(reply{packet.VerbHello, id}.append(nil))
	c.replyLocked(w, peer, src, packet.VerbOK, b, false, peer.suite())
}

func (c *Core) okHello(w *Worker, from *Peer, b []byte, src Source, e *expectation) bool {
	o, ok := parseOKHello(b)
	if !ok || o.version.protocol < packet.MinProtocolVersion || o.timestamp != e.timestamp {
		return false
	}
	from.version.Store(packVersion(o.version))
	c.mu.Lock()
	believed := c.IsUpstream(from.addr) || c.isSeedLocked(from.addr)
	c.mu.Unlock()
	if believed {
		for worlds := o.worlds; len(worlds) > 0; {
			world, n, err := ParseWorld(worlds)
			if err != nil {
				return false
			}
			if work, ok := c.Afford(w, from, budget.Signature, 1); ok {
				c.offer(world)
				work.Done()
			}
			worlds = worlds[n:]
		}
	}
	if src.Hops == 0 && o.sentTo.IsValid() {
		c.noteSurface(w, from, src, o.sentTo)
	}
	return true
}
