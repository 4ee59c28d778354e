package vl1

import (
	"net/netip"

	"ztgate/zerotier/packet"
)

// Receive handles one datagram. It may change the datagram's bytes.
func (c *Core) Receive(w *Worker, sock SocketID, from netip.AddrPort, datagram []byte) {
	w.stats.rxPackets.Add(1)
	w.stats.rxBytes.Add(uint64(len(datagram)))
	src := Source{Socket: sock, Endpoint: from, size: len(datagram)}
	switch packet.Classify(datagram) {
	case packet.KindFragment:
		c.receiveFragment(w, src, datagram)
	case packet.KindPacket:
		p := packet.Packet(datagram)
		if p.Source() == c.self {
			w.stats.rejects[RejectOwnAddress].Add(1)
			return
		}
		if p.Destination() != c.self {
			c.relayPacket(w, src, p)
			return
		}
		if p.Fragmented() {
			w.stats.fragmentsIn.Add(1)
			b, ok := c.frags.AddHead(w.now, from.Addr(), p, w.joined)
			if !ok {
				return
			}
			w.joined, p = b[:0], b
		}
		c.receivePacket(w, &src, p)
	default:
		w.stats.rejects[RejectShort].Add(1)
	}
}

func (c *Core) receiveFragment(w *Worker, src Source, datagram []byte) {
	f, err := packet.ParseFragment(datagram)
	if err != nil {
		w.stats.rejects[RejectFragment].Add(1)
		return
	}
	if f.Destination() != c.self {
		c.relayFragment(w, src, f)
		return
	}
	w.stats.fragmentsIn.Add(1)
	b, ok := c.frags.AddFragment(w.now, src.Endpoint.Addr(), f, w.joined)
	if !ok {
		return
	}
	w.joined = b[:0]
	if len(b) >= packet.HeaderLen {
		c.receivePacket(w, &src, packet.Packet(b))
	}
}

// receivePacket handles a whole packet for us.
func (c *Core) receivePacket(w *Worker, src *Source, p packet.Packet) {
	src.Hops = p.Hops()
	if p.Source() == c.self || p.Source().Reserved() {
		w.stats.rejects[RejectOwnAddress].Add(1)
		return
	}
	suite := p.Suite()
	if suite == packet.SuitePoly1305 {
		switch {
		case p.Enveloped(): // its verb can't be read
			c.receiveSealedHello(w, *src, p)
		case p.Verb() == packet.VerbHello && !p.Compressed():
			c.receiveHello(w, *src, p)
		default:
			c.receiveClear(w, p)
		}
		return
	}
	peer := c.sender(w, p.Source())
	if peer == nil {
		peer = c.recallSender(w, p.Source())
	}
	if peer == nil {
		c.hold(w, *src, p)
		return
	}
	trace := c.repeat.look(p.ID())
	if suite == packet.SuiteTrusted && c.onTrustedPath(p, *src) {
		// Neither encrypted nor authenticated, by the operator's wish.
	} else if err := peer.keys.Open(p, w.scratch); err != nil {
		if err == packet.ErrSuite {
			w.stats.rejects[RejectSuite].Add(1)
		} else {
			w.stats.rejects[RejectMAC].Add(1)
		}
		return
	}
	if suite != packet.SuiteTrusted && trace.seen() {
		w.stats.rejects[RejectReplay].Add(1)
		return
	}
	w.stats.opened[suite].add(src.Hops > 0, len(p))
	c.deposit(w, peer, src)
	if p, ok := c.inflate(w, peer, p); ok {
		c.dispatch(w, peer, p, src)
	}
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

// receiveClear handles suite 0 packets other than HELLO: bonding measurements of older
// releases, which a node without bonding drops, and nothing else (chapter 02 §2.11, §9).
func (c *Core) receiveClear(w *Worker, p packet.Packet) {
	switch p.Verb() {
	case packet.VerbAck, packet.VerbQoSMeasurement, packet.VerbPathNegotiationRequest:
	default:
		w.stats.rejects[RejectSuite].Add(1)
	}
}

// dispatch acts on an authentic packet.
func (c *Core) dispatch(w *Worker, from *Peer, p packet.Packet, src *Source) {
	verb := p.Verb()
	switch verb {
	case packet.VerbFrame, packet.VerbExtFrame, packet.VerbMulticastFrame, packet.VerbNetworkConfigRequest, packet.VerbNetworkConfig:
		touch(&from.lastNontrivial, w.t)
		c.toUpper(w, from, p, src)
	case packet.VerbMulticastLike, packet.VerbNetworkCredentials, packet.VerbMulticastGather:
		c.toUpper(w, from, p, src)
	case packet.VerbOK:
		c.receiveOK(w, from, p, *src)
	case packet.VerbError:
		c.receiveError(w, from, p, *src)
	case packet.VerbWhois:
		c.receiveWhois(w, from, p, *src)
	case packet.VerbRendezvous:
		c.receiveRendezvous(w, from, p, *src)
	case packet.VerbEcho:
		c.receiveEcho(w, from, p, *src)
	case packet.VerbPushDirectPaths:
		c.receivePush(w, from, p, *src)
	case packet.VerbHello:
		c.receiveEncryptedHello(w, from, p, *src)
	case packet.VerbAck, packet.VerbQoSMeasurement, packet.VerbPathNegotiationRequest: // in suites 1 and 3 since 1.16
	default: // NOP, USER_MESSAGE, REMOTE_TRACE and unknown verbs: a sign of life only
		c.heard(w, from, src, verb, false, false)
	}
}

func (c *Core) toUpper(w *Worker, from *Peer, p packet.Packet, src *Source) {
	verb := p.Verb()
	res := c.cfg.Upper.HandlePacket(w, from, p, *src)
	if res.Retry {
		c.keepForRetry(w, from, p, *src)
	}
	if !res.Skip {
		c.heard(w, from, src, verb, res.Trust, false)
	}
	if verb == packet.VerbNetworkCredentials && res.Trust {
		c.retry(w, from)
	}
}

// heard is the bookkeeping after an authentic packet (chapter 02 §4.4).
// confirmed says that the packet answers a probe sent to the endpoint it came
// from.
func (c *Core) heard(w *Worker, p *Peer, src *Source, verb packet.Verb, trust, confirmed bool) {
	touch(&p.lastReceive, w.t)
	if trust {
		c.trusts(w, p)
	}
	if src.Hops == 0 {
		pa := p.lastPath.Load()
		if pa != nil && pa.sock == src.Socket && pa.ep == src.Endpoint && !pa.silent(w.t) {
			touch(&pa.lastIn, w.t)
		} else {
			c.heardElsewhere(w, p, *src, verb, confirmed)
		}
	} else {
		touch(&p.lastRelayed, w.t)
		if r := p.route.Load(); r != nil && !r.relay && w.t >= p.nextDoubt.Load() {
			c.doubt(w, p)
		}
	}
	if w.t >= p.nextPush.Load() && p.trusted(w.t) {
		c.pushPaths(w, p, *src)
	}
}

// receiveOK handles an answer; one that nobody waits for is dropped. Configurations that we
// never asked for are shown to the network layer: they are a sign of a copy of our identity.
func (c *Core) receiveOK(w *Worker, from *Peer, p packet.Packet, src Source) {
	re, rest, ok := parseReply(p.Payload())
	if !ok {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	c.mu.Lock()
	e := c.replies.find(re.id, from.addr, re.verb, w.t)
	src.Unasked = e == nil && re.verb == packet.VerbNetworkConfigRequest && !c.requests.has(re.id)
	c.mu.Unlock()
	if e == nil {
		w.stats.rejects[RejectUnexpectedReply].Add(1)
		if src.Unasked {
			c.cfg.Upper.HandlePacket(w, from, p, src)
		}
		return
	}
	confirmed := false
	switch re.verb {
	case packet.VerbHello:
		if !c.okHello(w, from, rest, src, e) {
			w.stats.rejects[RejectMalformed].Add(1)
			return
		}
		confirmed = e.ep == src.Endpoint
	case packet.VerbEcho:
		confirmed = e.ep == src.Endpoint
		if confirmed && src.Hops == 0 {
			c.noteLatency(from, src, since(w.t, e.sent))
			c.noteSize(w, from, src, e, len(rest))
		}
	case packet.VerbWhois:
		c.heard(w, from, &src, packet.VerbOK, false, false)
		c.okWhois(w, from, rest, e)
		return
	default:
		c.toUpper(w, from, p, &src)
		return
	}
	c.heard(w, from, &src, packet.VerbOK, false, confirmed)
	if confirmed && src.Hops == 0 && re.verb == packet.VerbHello {
		c.noteLatency(from, src, since(w.t, e.sent))
	}
}

// receiveError handles a refusal.
func (c *Core) receiveError(w *Worker, from *Peer, p packet.Packet, src Source) {
	re, rest, ok := parseReply(p.Payload())
	if !ok || len(rest) == 0 {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	code := packet.ErrorCode(rest[0])
	switch code {
	case packet.ErrorNeedMembershipCertificate, packet.ErrorUnwantedMulticast:
		c.toUpper(w, from, p, &src)
		return
	}
	c.mu.Lock()
	e := c.replies.find(re.id, from.addr, re.verb, w.t)
	c.mu.Unlock()
	if e == nil {
		w.stats.rejects[RejectUnexpectedReply].Add(1)
		return
	}
	if code == packet.ErrorIdentityCollision {
		if c.IsUpstream(from.addr) {
			c.mu.Lock()
			c.seeTwinLocked(w.t)
			c.mu.Unlock()
		}
		c.heard(w, from, &src, packet.VerbError, false, false)
		return
	}
	c.toUpper(w, from, p, &src)
}

// Bytes of an ECHO's payload that are answered: directly as much as any path may carry.
const (
	maxEcho        = packet.MaxPayload - replyLen
	maxEchoRelayed = 1300
)

func (c *Core) receiveEcho(w *Worker, from *Peer, p packet.Packet, src Source) {
	c.mu.Lock()
	most := maxEcho
	if src.Hops > 0 {
		most = maxEchoRelayed
	}
	if len(p.Payload()) > most || !from.echoes.Take(w.t, echoEvery, echoBurst) {
		c.mu.Unlock()
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	c.mu.Unlock()
	c.heard(w, from, &src, packet.VerbEcho, false, false) // what is left after our own probe is for the answer
	c.mu.Lock()
	defer c.mu.Unlock()
	payload := p.Payload()
	if !c.provenLocked(from, src, w.t) { // nobody looks at what comes back
		payload = payload[:max(0, len(payload)-probePayload)]
	}
	if !c.okEchoLocked(w, from, src, p.ID(), payload) {
		from.owedEcho = owedEcho{w.t, src, p.ID()}
	}
}

// okEchoLocked answers in one datagram, however large: that it arrives is what the
// sender may want to know.
func (c *Core) okEchoLocked(w *Worker, to *Peer, src Source, id packet.ID, payload []byte) bool {
	b := reply{packet.VerbEcho, id}.append(make([]byte, 0, replyLen+len(payload)))
	return c.answerLocked(w, to, way{sock: src.Socket, ep: src.Endpoint, relay: src.Hops > 0}, src, packet.VerbOK, w.control(append(b, payload...), false), to.suite())
}
