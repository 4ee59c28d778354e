package vl1

import (
	"hash/maphash"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// Receive handles one datagram. It may change the datagram's bytes.
func (c *Core) Receive(w *Worker, out Out, now time.Time, sock SocketID, from netip.AddrPort, datagram []byte) {
	w.stats.rxPackets.Add(1)
	w.stats.rxBytes.Add(uint64(len(datagram)))
	src := Source{Socket: sock, Endpoint: from, Worker: w}
	switch packet.Classify(datagram) {
	case packet.KindFragment:
		c.receiveFragment(w, out, now, src, datagram)
	case packet.KindPacket:
		p := packet.Packet(datagram)
		if p.Source() == c.self {
			w.stats.rejects[RejectOwnAddress].Add(1)
			return
		}
		if p.Destination() != c.self {
			c.relayPacket(w, out, now, src, p)
			return
		}
		if p.Fragmented() {
			w.stats.fragmentsIn.Add(1)
			b, ok := c.frags.AddHead(now, from.Addr(), p, w.joined)
			if !ok {
				return
			}
			w.joined, p = b[:0], b
		}
		c.receivePacket(w, out, now, src, p)
	default:
		w.stats.rejects[RejectShort].Add(1)
	}
}

func (c *Core) receiveFragment(w *Worker, out Out, now time.Time, src Source, datagram []byte) {
	f, err := packet.ParseFragment(datagram)
	if err != nil {
		w.stats.rejects[RejectFragment].Add(1)
		return
	}
	if f.Destination() != c.self {
		c.relayFragment(w, out, now, src, f)
		return
	}
	w.stats.fragmentsIn.Add(1)
	b, ok := c.frags.AddFragment(now, src.Endpoint.Addr(), f, w.joined)
	if !ok {
		return
	}
	w.joined = b[:0]
	if len(b) >= packet.HeaderLen {
		c.receivePacket(w, out, now, src, packet.Packet(b))
	}
}

// receivePacket handles a whole packet for us.
func (c *Core) receivePacket(w *Worker, out Out, now time.Time, src Source, p packet.Packet) {
	src.Hops = p.Hops()
	if p.Source() == c.self || p.Source().Reserved() {
		w.stats.rejects[RejectOwnAddress].Add(1)
		return
	}
	suite := p.Suite()
	if suite == packet.SuitePoly1305 {
		if p.Verb() == packet.VerbHello && !p.Compressed() {
			c.receiveHello(w, out, now, src, p)
		} else {
			c.receiveClear(w, p)
		}
		return
	}
	peer := c.sender(w, p.Source())
	if peer == nil {
		peer = c.recallSender(w, out, now, p.Source())
	}
	if peer == nil {
		c.hold(w, out, now, src, p)
		return
	}
	if suite == packet.SuiteTrusted && c.onTrustedPath(p, src) {
		// Neither encrypted nor authenticated, by the operator's wish.
	} else if err := peer.keys.Open(p, &w.scratch); err != nil {
		if err == packet.ErrSuite {
			w.stats.rejects[RejectSuite].Add(1)
		} else {
			w.stats.rejects[RejectMAC].Add(1)
		}
		return
	}
	w.stats.opened[suite].Add(uint64(len(p)))
	p, err := packet.Decompress(p, w.inflated)
	if err != nil {
		w.stats.rejects[RejectCompression].Add(1)
		return
	}
	c.dispatch(w, out, now, peer, p, src)
}

// onTrustedPath reports whether a packet of suite 2 came directly from a network
// with the trusted path ID that it carries (chapter 01 §5.7).
func (c *Core) onTrustedPath(p packet.Packet, src Source) bool {
	if len(c.cfg.Physical) == 0 || src.Hops != 0 {
		return false
	}
	id := c.trustedPath(src.Endpoint.Addr())
	return id != 0 && id == p.TrustedPath()
}

// receiveClear handles suite 0 packets other than HELLO: bonding measurements,
// which a node without bonding drops, and nothing else (chapter 02 §2.11, §9).
func (c *Core) receiveClear(w *Worker, p packet.Packet) {
	switch p.Verb() {
	case packet.VerbAck, packet.VerbQoSMeasurement, packet.VerbPathNegotiationRequest:
	default:
		w.stats.rejects[RejectSuite].Add(1)
	}
}

// dispatch acts on an authentic packet.
func (c *Core) dispatch(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	verb := p.Verb()
	switch verb {
	case packet.VerbFrame, packet.VerbExtFrame, packet.VerbMulticastFrame, packet.VerbNetworkConfigRequest, packet.VerbNetworkConfig:
		touch(&from.lastNontrivial, c.at(now))
		c.toUpper(w, out, now, from, p, src)
	case packet.VerbMulticastLike, packet.VerbNetworkCredentials, packet.VerbMulticastGather:
		c.toUpper(w, out, now, from, p, src)
	case packet.VerbOK:
		c.receiveOK(w, out, now, from, p, src)
	case packet.VerbError:
		c.receiveError(w, out, now, from, p, src)
	case packet.VerbWhois:
		c.receiveWhois(w, out, now, from, p, src)
	case packet.VerbRendezvous:
		c.receiveRendezvous(w, out, now, from, p, src)
	case packet.VerbEcho:
		c.receiveEcho(w, out, now, from, p, src)
	case packet.VerbPushDirectPaths:
		c.receivePush(w, out, now, from, p, src)
	case packet.VerbHello:
		w.stats.rejects[RejectSuite].Add(1) // its masked part is unreadable in suite 3 and never sent in suite 1
	case packet.VerbAck, packet.VerbQoSMeasurement, packet.VerbPathNegotiationRequest:
	default: // NOP, USER_MESSAGE, REMOTE_TRACE and unknown verbs: a sign of life only
		c.heard(w, out, now, from, src, verb, false, false)
	}
}

func (c *Core) toUpper(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	verb := p.Verb()
	res := c.cfg.Upper.HandlePacket(out, now, from, p, src)
	if res.Retry {
		c.keepForRetry(w, now, from, p, src)
	}
	if !res.Skip {
		c.heard(w, out, now, from, src, verb, res.Trust, false)
	}
	if verb == packet.VerbNetworkCredentials && res.Trust {
		c.retry(w, out, now, from)
	}
}

// heard is the bookkeeping after an authentic packet (chapter 02 §4.4).
// confirmed says that the packet answers a probe sent to the endpoint it came
// from.
func (c *Core) heard(w *Worker, out Out, now time.Time, p *Peer, src Source, verb packet.Verb, trust, confirmed bool) {
	t := c.at(now)
	touch(&p.lastReceive, t)
	if trust {
		touch(&p.lastTrust, t)
	}
	if src.Hops == 0 {
		pa := p.lastPath.Load()
		if pa != nil && pa.sock == src.Socket && pa.ep == src.Endpoint && !pa.silent(t) {
			touch(&pa.lastIn, t)
		} else {
			c.heardElsewhere(w, out, now, p, src, verb, confirmed)
		}
	} else {
		touch(&p.lastRelayed, t)
		if r := p.route.Load(); r != nil && !r.relay && t >= p.nextDoubt.Load() {
			c.doubt(w, out, now, p)
		}
	}
	if t >= p.nextPush.Load() && p.trusted(t) {
		c.pushPaths(w, out, now, p, src)
	}
}

// doubt probes the paths of a peer that sends through a root although we have a
// direct path to it: it may have left that path for a reason.
func (c *Core) doubt(w *Worker, out Out, now time.Time, p *Peer) {
	t := c.at(now)
	p.nextDoubt.Store(t + int64(doubtEvery))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pa := range p.paths {
		if pa.suspect == 0 && since(t, pa.lastIn.Load()) >= pathProbeEvery {
			pa.noteProbe(t)
			c.probe(w, out, now, p, pa.sock, pa.ep)
		}
	}
	c.routesChanged(p, t)
}

// heardElsewhere handles a direct packet that came on another path than the last
// one, or after a silence.
func (c *Core) heardElsewhere(w *Worker, out Out, now time.Time, p *Peer, src Source, verb packet.Verb, confirmed bool) {
	t := c.at(now)
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
			c.probe(w, out, now, p, alias.sock, alias.ep)
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
			c.greet(w, out, now, p, pa)
			for _, old := range p.paths { // the peer may have moved: are they still good?
				if old != pa && old.suspect == 0 && old.lastIn.Load() != t {
					old.noteProbe(t)
					c.probe(w, out, now, p, old.sock, old.ep)
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
	if !p.confirms.take(t, 2*time.Second, 5) {
		return
	}
	p.noteProbe(src.Endpoint, t)
	c.probe(w, out, now, p, src.Socket, src.Endpoint)
}

// greet completes what was held back while a new path was unproven: worlds that
// are owed, and a HELLO, which tells the peer its external address. Core.mu is held.
func (c *Core) greet(w *Worker, out Out, now time.Time, p *Peer, pa *path) {
	t := c.at(now)
	if o := p.owed; o != nil && o.src.Endpoint == pa.ep {
		p.owed = nil
		if since(t, o.at) < owedLifetime {
			c.answerHello(w, out, now, p, o.src, o.id, &o.hello, o.moons, true)
		}
	}
	if since(t, p.lastFullHello) >= time.Second {
		p.lastFullHello = t
		c.sendHello(w, out, now, p, pa.sock, pa.ep)
	}
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

var endpointSeed = maphash.MakeSeed()

// receiveHello handles HELLO in suite 0, the only packet a stranger may send
// (chapter 01 §7.2, chapter 02 §2.2).
func (c *Core) receiveHello(w *Worker, out Out, now time.Time, src Source, p packet.Packet) {
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
		if peer = c.acquaint(w, now, src, p, h.identity); peer == nil {
			return
		}
		c.peerLearned(w, out, now, peer)
	case !peer.id.Equal(h.identity):
		c.collision(w, out, now, src, p, h.identity)
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
		c.noteSurface(w, out, now, peer, src, h.sentTo)
	}
	c.mu.Lock()
	if c.mayAnswerHello(src, now) {
		c.answerHello(w, out, now, peer, src, p.ID(), &h, moons, c.proven(peer, src, c.at(now)))
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	peer.version.Store(packVersion(h.version))
	c.heard(w, out, now, peer, src, packet.VerbHello, false, false)
	if known {
		c.cfg.Upper.PeerLearned(out, now, peer)
	}
}

// acquaint checks a stranger's HELLO, cheap checks first, and makes a peer.
func (c *Core) acquaint(w *Worker, now time.Time, src Source, p packet.Packet, id *identity.Identity) *Peer {
	if !c.identityGate(src, now) {
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
	if !c.roomForPeer(now) {
		w.stats.rejects[RejectPeerLimit].Add(1)
		return nil
	}
	t := c.at(now)
	c.mu.Lock()
	inline := c.cfg.Background == nil || c.inline.take(t, inlineEvery, inlineBurst)
	busy := !inline && (c.checking || len(c.held) >= maxHeld)
	if busy || !c.validated.take(t, validateEvery, validateBurst) {
		c.mu.Unlock()
		w.stats.rejects[RejectRate].Add(1)
		return nil
	}
	if !inline {
		c.checking = true
		src.Worker = nil
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
func (c *Core) identityGate(src Source, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.at(now)
	return c.gates[packet.SourceBucket(src.Endpoint.Addr())].take(t, 2*time.Second, 8) && c.agreed.take(t, agreeEvery, agreeBurst)
}

// roomForPeer reports whether another peer may be remembered, after forgetting
// silent ones if need be.
func (c *Core) roomForPeer(now time.Time) bool {
	if c.count.Load() < maxUntrustedPeers {
		return true
	}
	t := c.at(now)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lastEvict == 0 || since(t, c.lastEvict) >= time.Second { // it looks at all peers
		c.lastEvict = t
		c.evict(t, maxUntrustedPeers-maxUntrustedPeers/16)
	}
	return c.untrusted < maxUntrustedPeers && c.count.Load() < maxPeers
}

// mayAnswerHello limits OK(HELLO) per address (chapter 02 §9). Core.mu is held.
func (c *Core) mayAnswerHello(src Source, now time.Time) bool {
	h := maphash.Comparable(endpointSeed, src.Endpoint.Addr())
	return c.okGates[h%uint64(len(c.okGates))].take(c.at(now), 250*time.Millisecond, 20)
}

// collision answers a HELLO whose address belongs to another key.
func (c *Core) collision(w *Worker, out Out, now time.Time, src Source, p packet.Packet, id *identity.Identity) {
	w.stats.rejects[RejectCollision].Add(1)
	if !c.identityGate(src, now) {
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
	c.reply(w, out, now, other, src, packet.VerbError, b, false, packet.SuiteSalsa)
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
func (c *Core) answerHello(w *Worker, out Out, now time.Time, peer *Peer, src Source, id packet.ID, h *hello, moons []worldRef, proven bool) {
	o := okHello{timestamp: h.timestamp, version: c.version, sentTo: src.Endpoint}
	if h.version.protocol < 5 {
		o.sentTo = netip.AddrPortFrom(src.Endpoint.Addr(), 0)
	}
	t := c.at(now)
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
	c.reply(w, out, now, peer, src, packet.VerbOK, b, false, peer.suite())
}

// receiveOK handles an answer; one that nobody waits for is dropped.
func (c *Core) receiveOK(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	re, rest, ok := parseReply(p.Payload())
	if !ok {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	c.mu.Lock()
	e := c.expectedReply(re.id, from, re.verb, c.at(now))
	c.mu.Unlock()
	if e == nil {
		w.stats.rejects[RejectUnexpectedReply].Add(1)
		return
	}
	confirmed := false
	switch re.verb {
	case packet.VerbHello:
		if !c.okHello(w, out, now, from, rest, src, e) {
			w.stats.rejects[RejectMalformed].Add(1)
			return
		}
		confirmed = e.ep == src.Endpoint
	case packet.VerbEcho:
		confirmed = e.ep == src.Endpoint
		if confirmed && src.Hops == 0 {
			c.noteLatency(from, src, since(c.at(now), e.sent))
		}
	case packet.VerbWhois:
		c.heard(w, out, now, from, src, packet.VerbOK, false, false)
		c.okWhois(w, out, now, from, rest, e)
		return
	default:
		c.toUpper(w, out, now, from, p, src)
		return
	}
	c.heard(w, out, now, from, src, packet.VerbOK, false, confirmed)
	if confirmed && src.Hops == 0 && re.verb == packet.VerbHello {
		c.noteLatency(from, src, since(c.at(now), e.sent))
	}
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

func (c *Core) okHello(w *Worker, out Out, now time.Time, from *Peer, b []byte, src Source, e *expectation) bool {
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
		c.noteSurface(w, out, now, from, src, o.sentTo)
	}
	return true
}

// okWhois learns the identities that answer our question.
func (c *Core) okWhois(w *Worker, out Out, now time.Time, from *Peer, b []byte, e *expectation) {
	if !c.IsUpstream(from.addr) {
		w.stats.rejects[RejectNotUpstream].Add(1)
		return
	}
	r := reader{Reader: wire.Reader{Buf: b}}
	for r.Left() > 0 {
		id := r.identity()
		if r.Failed {
			w.stats.rejects[RejectMalformed].Add(1)
			return
		}
		if id.Address() != e.asked {
			continue
		}
		if c.count.Load() >= maxPeers {
			w.stats.rejects[RejectPeerLimit].Add(1)
		} else if p, err := c.addPeer(id, c.at(now)); err == nil {
			c.peerLearned(w, out, now, p)
		}
	}
}

// peerLearned retries whatever waited for an identity.
func (c *Core) peerLearned(w *Worker, out Out, now time.Time, p *Peer) {
	t := c.at(now)
	c.mu.Lock()
	delete(c.whois, p.addr)
	c.updateRoute(p, t)
	h, hinted := c.hints[p.addr]
	delete(c.hints, p.addr)
	if hinted && since(t, h.born) < queueTimeout {
		c.punch(w, out, now, p, h.sock, h.at)
	}
	var mine []heldPacket
	c.held = slices.DeleteFunc(c.held, func(q heldPacket) bool {
		if q.from == p.addr {
			mine = append(mine, q)
			return true
		}
		return false
	})
	c.mu.Unlock()
	c.cfg.Upper.PeerLearned(out, now, p)
	c.flushQueue(w, out, now, p)
	for _, q := range mine {
		src := q.src
		src.Worker = w
		c.receivePacket(w, out, now, src, packet.Packet(q.data))
	}
}

// flushQueue sends what waited for p.
func (c *Core) flushQueue(w *Worker, out Out, now time.Time, p *Peer) {
	if p.route.Load() == nil {
		return
	}
	var mine []queued
	c.mu.Lock()
	c.outQueue = slices.DeleteFunc(c.outQueue, func(q queued) bool {
		if q.dst == p.addr {
			mine = append(mine, q)
			return true
		}
		return false
	})
	c.mu.Unlock()
	for _, q := range mine {
		c.sendNow(w, out, now, p, q.verb, q.payload, q.opts)
	}
}

// maxAsked marks held packets that cause no question.
const maxAsked = 3

// heldPacket is a packet whose sender isn't known yet (chapter 01 §7.3).
type heldPacket struct {
	from  identity.Address
	src   Source
	data  []byte
	born  int64
	asked int
}

func (c *Core) hold(w *Worker, out Out, now time.Time, src Source, p packet.Packet) {
	t := c.at(now)
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, q := range c.held {
		if q.src.Endpoint.Addr() == src.Endpoint.Addr() && q.from == p.Source() {
			n++
		}
	}
	if n >= maxHeldSource {
		w.stats.rejects[RejectUnknownSender].Add(1)
		return
	}
	if len(c.held) >= maxHeld {
		w.stats.rejects[RejectUnknownSender].Add(1)
		c.held = slices.Delete(c.held, 0, 1)
	}
	src.Worker = nil
	c.held = append(c.held, heldPacket{from: p.Source(), src: src, data: slices.Clone(p), born: t, asked: 1})
	c.askWhois(w, out, t, p.Source(), true)
}

// retryPacket is one that the network layer wants to see again.
type retryPacket struct {
	from *Peer
	src  Source
	data []byte
	born int64
}

func (c *Core) keepForRetry(w *Worker, now time.Time, from *Peer, p packet.Packet, src Source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, q := range c.retries {
		if q.from == from {
			n++
		}
	}
	if n >= maxRetryPeer || len(c.retries) >= maxRetry {
		w.stats.rejects[RejectQueueFull].Add(1)
		return
	}
	src.Worker = nil
	c.retries = append(c.retries, retryPacket{from, src, slices.Clone(p), c.at(now)})
}

// retry hands kept packets of a peer (nil: of all) to the network layer again.
func (c *Core) retry(w *Worker, out Out, now time.Time, from *Peer) {
	t := c.at(now)
	c.mu.Lock()
	var mine []retryPacket
	c.retries = slices.DeleteFunc(c.retries, func(q retryPacket) bool {
		if since(t, q.born) >= queueTimeout {
			return true
		}
		if from == nil || q.from == from {
			mine = append(mine, q)
			return true
		}
		return false
	})
	c.mu.Unlock()
	for _, q := range mine {
		src := q.src
		src.Worker = w
		res := c.cfg.Upper.HandlePacket(out, now, q.from, packet.Packet(slices.Clone(q.data)), src)
		if res.Trust {
			q.from.lastTrust.Store(t)
		}
		if res.Retry {
			c.mu.Lock()
			c.retries = append(c.retries, q)
			c.mu.Unlock()
		}
	}
}

// receiveError handles a refusal.
func (c *Core) receiveError(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	re, rest, ok := parseReply(p.Payload())
	if !ok || len(rest) == 0 {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	code := packet.ErrorCode(rest[0])
	switch code {
	case packet.ErrorNeedMembershipCertificate, packet.ErrorUnwantedMulticast:
		c.toUpper(w, out, now, from, p, src)
		return
	}
	c.mu.Lock()
	e := c.expectedReply(re.id, from, re.verb, c.at(now))
	c.mu.Unlock()
	if e == nil {
		w.stats.rejects[RejectUnexpectedReply].Add(1)
		return
	}
	if code == packet.ErrorIdentityCollision {
		if c.IsUpstream(from.addr) {
			c.log.Error("another node uses the address of our identity; this node is not reachable until one of them gets a new identity",
				"address", c.self, "root", from.addr)
		}
		c.heard(w, out, now, from, src, packet.VerbError, false, false)
		return
	}
	c.toUpper(w, out, now, from, p, src)
}

// Bounds of WHOIS (chapter 02 §9).
const (
	maxWhoisAnswer  = 16
	maxWhoisForward = 4

	// Identities that one peer may ask for, also of a root.
	whoisEvery = 50 * time.Millisecond
	whoisBurst = 64
)

func (c *Core) receiveWhois(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	t := c.at(now)
	c.mu.Lock()
	gated := !c.IsRoot() && from.lastWhois != 0 && since(t, from.lastWhois) < whoisGate
	most := len(p.Payload()) / identity.AddressLen
	for range min(most, maxWhoisAnswer) {
		gated = gated || !from.whoisBytes.take(t, whoisEvery, whoisBurst)
	}
	if !gated {
		from.lastWhois = t
	}
	c.mu.Unlock()
	if gated {
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	var answer []byte
	forwarded := 0
	b := p.Payload()
	for n := 0; len(b) >= identity.AddressLen && n < maxWhoisAnswer; n++ {
		a := identity.AddressFromBytes(b)
		b = b[identity.AddressLen:]
		if a == c.self {
			answer = c.id.AppendBinary(answer)
		} else if known := c.Peer(a); known != nil {
			answer = known.id.AppendBinary(answer)
		} else if forwarded < maxWhoisForward && !c.IsUpstream(from.addr) {
			forwarded++
			c.mu.Lock()
			c.askWhois(w, out, t, a, true)
			c.mu.Unlock()
		}
	}
	if len(answer) > 0 {
		c.SendOK(w, out, now, from, src, packet.VerbWhois, p.ID(), answer)
	}
	c.heard(w, out, now, from, src, packet.VerbWhois, false, false)
}

const maxEcho = 1300 // bytes of payload answered

func (c *Core) receiveEcho(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	t := c.at(now)
	c.mu.Lock()
	gated := from.lastEcho != 0 && since(t, from.lastEcho) < echoGate && p.Hops() == 0 && len(from.paths) <= 1
	if !gated {
		from.lastEcho = t
	}
	c.mu.Unlock()
	if gated || len(p.Payload()) > maxEcho {
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	c.SendOK(w, out, now, from, src, packet.VerbEcho, p.ID(), p.Payload())
	c.heard(w, out, now, from, src, packet.VerbEcho, false, false)
}

// hint is a RENDEZVOUS for a peer that isn't known yet (chapter 02 §2.8).
type hint struct {
	sock SocketID
	at   netip.AddrPort
	born int64
}

func (c *Core) receiveRendezvous(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	v, ok := parseRendezvous(p.Payload())
	if !ok {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	if !c.IsUpstream(from.addr) {
		w.stats.rejects[RejectNotUpstream].Add(1)
	} else if peer := c.Peer(v.peer); peer != nil {
		c.mu.Lock()
		if t := c.at(now); (peer.lastRedirect == 0 || since(t, peer.lastRedirect) >= 5*time.Second) && c.met.take(t, 100*time.Millisecond, 50) {
			peer.lastRedirect = t
			c.punch(w, out, now, peer, src.Socket, v.at)
		}
		c.mu.Unlock()
	} else if !v.peer.Reserved() {
		c.mu.Lock()
		if len(c.hints) < maxHints {
			c.hints[v.peer] = hint{src.Socket, v.at, c.at(now)}
		}
		c.mu.Unlock()
	}
	c.heard(w, out, now, from, src, packet.VerbRendezvous, false, false)
}

// punch opens the own NAT towards an endpoint and probes it. Core.mu is held.
func (c *Core) punch(w *Worker, out Out, now time.Time, p *Peer, sock SocketID, ep netip.AddrPort) {
	if !c.allowed(p, ep) {
		return
	}
	if ep.Addr().Is4() {
		junk := w.random.Uint64()
		out.SendTTL(sock, ep, []byte{byte(junk), byte(junk >> 8), byte(junk >> 16), byte(junk >> 24)}, 2)
	}
	p.noteProbe(ep, c.at(now))
	c.probe(w, out, now, p, sock, ep)
}

// Bounds of PUSH_DIRECT_PATHS (chapter 02 §2.7, §9).
const (
	maxPushProbes      = 16
	maxPushProbesClass = 8
)

func (c *Core) receivePush(w *Worker, out Out, now time.Time, from *Peer, p packet.Packet, src Source) {
	t := c.at(now)
	c.mu.Lock()
	if from.pushes.take(t, 30*time.Second/8, 8) {
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
			c.probe(w, out, now, from, 0, ep)
		}
	} else {
		w.stats.rejects[RejectRate].Add(1)
	}
	c.mu.Unlock()
	c.heard(w, out, now, from, src, packet.VerbPushDirectPaths, false, false)
}

// pushPaths tells a trusted peer where we may be reached.
func (c *Core) pushPaths(w *Worker, out Out, now time.Time, p *Peer, src Source) {
	every := pushDirect
	if c.cfg.LowBandwidth {
		every *= 16
	}
	if src.Hops > 0 {
		every = pushRelayed
	}
	p.nextPush.Store(c.at(now) + int64(every))
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
		c.reply(w, out, now, p, src, packet.VerbPushDirectPaths, b, true, p.suite())
	}
}

// surfaceKey and surfaceEntry hold reports of our external addresses (chapter 02
// §4.9).
type surfaceKey struct {
	reporter identity.Address
	sock     SocketID
	ep       netip.AddrPort
	scope    packet.Scope
}

type surfaceEntry struct {
	addr    netip.AddrPort
	at      int64
	trusted bool
}

// noteSurface handles a report of our own external address.
func (c *Core) noteSurface(w *Worker, out Out, now time.Time, from *Peer, src Source, mine netip.AddrPort) {
	t := c.at(now)
	scope := packet.ScopeOf(mine.Addr())
	if scope != packet.ScopeOf(src.Endpoint.Addr()) || scope <= packet.ScopeLoopback {
		return
	}
	root := c.IsUpstream(from.addr)
	if !root && !from.trusted(t) {
		return // a stranger must not make us advertise a victim's address
	}
	key := surfaceKey{from.addr, src.Socket, src.Endpoint, scope}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, had := c.surface[key]
	if !had && len(c.surface) >= maxSurface {
		if !root {
			return
		}
		for k, e := range c.surface { // roots count for more
			if !e.trusted {
				delete(c.surface, k)
				break
			}
		}
		if len(c.surface) >= maxSurface {
			return
		}
	}
	c.surface[key] = surfaceEntry{mine, t, root}
	if !had || !root || since(t, old.at) >= surfaceLifetime || old.addr.Addr() == mine.Addr() {
		return
	}
	c.log.Info("external address changed", "old", old.addr.Addr(), "new", mine.Addr())
	for k := range c.surface {
		if k.scope == scope && k.ep != src.Endpoint {
			delete(c.surface, k)
		}
	}
	c.eachPeer(func(p *Peer) {
		for _, pa := range p.paths {
			if pa.scope == scope && pa.ep.Addr().Is4() == mine.Addr().Is4() && pa.ep != src.Endpoint {
				pa.dead.Store(true) // unproven until a packet arrives again
				pa.noteProbe(t)
				c.probe(w, out, now, p, pa.sock, pa.ep)
			}
		}
		c.updateRoute(p, t)
	})
}

func (c *Core) surfaceLocked() (out []netip.AddrPort) {
	for _, e := range c.surface {
		if !slices.Contains(out, e.addr) {
			out = append(out, e.addr)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}
