package vl1

import (
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// SendOpts says how a control packet is sent.
type SendOpts struct {
	Compress    bool
	ExpectReply bool // remember the packet, so that its OK is accepted
}

// queued is a packet that cannot be sent yet (chapter 02 §5.1).
type queued struct {
	dst     identity.Address
	verb    packet.Verb
	payload []byte
	opts    SendOpts
	born    int64
}

// expectation is a request whose reply we wait for.
type expectation struct {
	peer      identity.Address
	verb      packet.Verb
	ep        netip.AddrPort // where a HELLO or ECHO went
	sent      int64
	timestamp int64 // of a HELLO
	asked     identity.Address
}

// SendData sends a data packet to p in place: buf[:packet.HeaderLen] is room for
// the header, the rest is the payload. It reports false, without having sent, if
// p has no route right now. It allocates nothing and takes no shared lock.
func (c *Core) SendData(w *Worker, out Out, now time.Time, p *Peer, v packet.Verb, buf []byte) bool {
	r := p.route.Load()
	if r == nil {
		return false
	}
	buf[packet.HeaderLen-1] = 0 // else what was there, e.g. of a MAC, could mark it as compressed
	t := c.at(now)
	c.emit(w, out, t, p, r.path.sock, r.path.ep, v, packet.Packet(buf), c.suiteFor(p, r))
	touch(&r.path.lastOut, t)
	touch(&p.lastData, t)
	return true
}

// emit puts the header into b, seals it and hands the datagrams to out. It
// returns the wire packet ID.
func (c *Core) emit(w *Worker, out Out, _ int64, p *Peer, sock SocketID, ep netip.AddrPort, v packet.Verb, b packet.Packet, suite packet.Suite) packet.ID {
	compressed := b[packet.HeaderLen-1] & 0x80 // set by packet.Compress
	packet.PutHeader(b, packet.ID(w.random.Uint64()), p.addr, c.self, v)
	b[packet.HeaderLen-1] |= compressed
	mtu := packet.DefaultMTU
	if len(c.cfg.Physical) > 0 {
		mtu = c.mtu(ep.Addr())
	}
	split := packet.NeedsSplit(len(b), mtu)
	b.SetFragmented(split)
	if suite == packet.SuiteTrusted {
		b.SetTrusted(c.trustedPath(ep.Addr()))
	} else {
		p.keys.Seal(b, suite, &w.scratch)
	}
	w.stats.sealed[suite].Add(uint64(len(b)))
	w.stats.txPackets.Add(1)
	w.stats.txBytes.Add(uint64(len(b)))
	if !split {
		out.Send(sock, ep, nil, b)
		return b.ID()
	}
	packet.Split(b, mtu, true, &w.hdr, func(head, data []byte) {
		w.stats.fragmentsOut.Add(1)
		out.Send(sock, ep, head, data)
	})
	return b.ID()
}

// control builds a control packet in the worker's buffer.
func (w *Worker) control(payload []byte, compress bool) packet.Packet {
	b := append(w.build[:0], make([]byte, packet.HeaderLen)...)
	b = append(b, payload...)
	w.build = b[:0]
	if compress {
		if p, ok := packet.Compress(packet.Packet(b), w.packed[:0]); ok {
			return p
		}
	}
	return packet.Packet(b)
}

// Send sends a control packet, or queues it for some seconds if the peer is
// unknown or unreachable. payload is copied.
func (c *Core) Send(w *Worker, out Out, now time.Time, dst identity.Address, v packet.Verb, payload []byte, opts SendOpts) {
	if dst == c.self || dst.Reserved() || len(payload) > packet.MaxPayload {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	p := c.Peer(dst)
	if p == nil {
		p = c.recall(w, out, now, dst)
	}
	if p != nil && c.sendNow(w, out, now, p, v, payload, opts) {
		return
	}
	t := c.at(now)
	c.mu.Lock()
	defer c.mu.Unlock()
	mine := 0
	for _, q := range c.outQueue {
		if q.dst == dst {
			mine++
		}
	}
	if mine >= maxOutQueuePeer {
		w.stats.rejects[RejectQueueFull].Add(1)
		return
	}
	if len(c.outQueue) >= maxOutQueue {
		w.stats.rejects[RejectQueueFull].Add(1)
		c.outQueue = slices.Delete(c.outQueue, 0, 1)
	}
	c.outQueue = append(c.outQueue, queued{dst, v, slices.Clone(payload), opts, t})
	if p == nil {
		c.askWhois(w, out, t, dst, false)
	}
}

// sendNow sends over the peer's route; false without one.
func (c *Core) sendNow(w *Worker, out Out, now time.Time, p *Peer, v packet.Verb, payload []byte, opts SendOpts) bool {
	r := p.route.Load()
	if r == nil {
		return false
	}
	t := c.at(now)
	id := c.emit(w, out, t, p, r.path.sock, r.path.ep, v, w.control(payload, opts.Compress), c.suiteFor(p, r))
	r.path.lastOut.Store(t)
	if opts.ExpectReply {
		c.mu.Lock()
		c.expect(id, &expectation{peer: p.addr, verb: v, sent: t})
		c.mu.Unlock()
	}
	return true
}

// expect remembers a request. Core.mu is held.
func (c *Core) expect(id packet.ID, e *expectation) {
	for len(c.expectLog) > 0 {
		old := c.expected[c.expectLog[0]]
		if len(c.expectLog) < maxExpected && (old != nil && since(e.sent, old.sent) < expectTimeout) {
			break
		}
		delete(c.expected, c.expectLog[0])
		c.expectLog = c.expectLog[1:]
	}
	c.expected[id] = e
	c.expectLog = append(c.expectLog, id)
}

// expectedReply returns the request that a reply answers, nil if there is none.
func (c *Core) expectedReply(id packet.ID, from *Peer, v packet.Verb, t int64) *expectation {
	e := c.expected[id]
	if e == nil || e.peer != from.addr || e.verb != v || since(t, e.sent) >= expectTimeout {
		return nil
	}
	return e
}

// reply answers a packet on the path it came from (chapter 02 §1).
func (c *Core) reply(w *Worker, out Out, now time.Time, to *Peer, src Source, v packet.Verb, payload []byte, compress bool, suite packet.Suite) {
	c.emit(w, out, c.at(now), to, src.Socket, src.Endpoint, v, w.control(payload, compress), suite)
}

// SendOK answers a request on the path it came from.
func (c *Core) SendOK(w *Worker, out Out, now time.Time, to *Peer, src Source, inRe packet.Verb, id packet.ID, payload []byte) {
	b := reply{inRe, id}.append(make([]byte, 0, replyLen+len(payload)))
	c.reply(w, out, now, to, src, packet.VerbOK, append(b, payload...), false, to.suite())
}

// SendError refuses a request on the path it came from.
func (c *Core) SendError(w *Worker, out Out, now time.Time, to *Peer, src Source, inRe packet.Verb, id packet.ID, code packet.ErrorCode, payload []byte) {
	b := append(reply{inRe, id}.append(make([]byte, 0, replyLen+1+len(payload))), byte(code))
	c.reply(w, out, now, to, src, packet.VerbError, append(b, payload...), false, to.suite())
}

// sendHello sends HELLO to an endpoint. Core.mu is held.
func (c *Core) sendHello(w *Worker, out Out, now time.Time, p *Peer, sock SocketID, ep netip.AddrPort) {
	c.hello(w, out, now, p, sock, ep, ep)
}

// relayHello sends HELLO through the best root. Core.mu is held.
func (c *Core) relayHello(w *Worker, out Out, now time.Time, p *Peer) {
	if best := c.best.Load(); best != nil {
		if pa := best.bestPathLockedOrRoute(); pa != nil {
			c.hello(w, out, now, p, pa.sock, pa.ep, netip.AddrPort{})
		}
	}
}

func (c *Core) hello(w *Worker, out Out, now time.Time, p *Peer, sock SocketID, ep, sentTo netip.AddrPort) {
	set := c.worlds.Load()
	h := hello{
		version: c.version, timestamp: now.UnixMilli(), identity: c.id, sentTo: sentTo,
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
	c.expect(b.ID(), &expectation{peer: p.addr, verb: packet.VerbHello, ep: ep, sent: c.at(now), timestamp: h.timestamp})
	out.Send(sock, ep, nil, b)
}

// probe sends ECHO, or HELLO to a peer whose version isn't known. Core.mu is held.
func (c *Core) probe(w *Worker, out Out, now time.Time, p *Peer, sock SocketID, ep netip.AddrPort) {
	if v := p.version.Load(); p.ProtocolVersion() < 5 || v>>8&0xffffff == 0x010100 {
		c.sendHello(w, out, now, p, sock, ep)
		return
	}
	t := c.at(now)
	b := packet.Packet(make([]byte, packet.HeaderLen))
	id := c.emit(w, out, t, p, sock, ep, packet.VerbEcho, b, p.suite())
	c.expect(id, &expectation{peer: p.addr, verb: packet.VerbEcho, ep: ep, sent: t})
}

// whoisState paces the questions for one address (chapter 02 §5.2).
type whoisState struct {
	first, last int64
}

// askWhois asks the best root for an identity, with pacing. Core.mu is held.
// stranger marks questions that an unauthenticated packet caused.
func (c *Core) askWhois(w *Worker, out Out, t int64, a identity.Address, stranger bool) {
	if a.Reserved() || a == c.self {
		return
	}
	st := c.whois[a]
	if st == nil {
		if len(c.whois) >= maxWhois {
			w.stats.rejects[RejectQueueFull].Add(1)
			return
		}
		st = &whoisState{first: t}
	}
	if st.last != 0 && since(t, st.last) < whoisPacing {
		return
	}
	if stranger && !c.strangers.take(t, 50*time.Millisecond, 50) {
		w.stats.rejects[RejectRate].Add(1)
		return
	}
	c.whois[a] = st
	best := c.best.Load()
	if best == nil {
		return // asked again by the queues
	}
	pa := best.bestPathLockedOrRoute()
	if pa == nil {
		return
	}
	st.last = t
	b := packet.Packet(a.Append(make([]byte, packet.HeaderLen, packet.HeaderLen+identity.AddressLen)))
	id := c.emit(w, out, t, best, pa.sock, pa.ep, packet.VerbWhois, b, best.suite())
	pa.lastOut.Store(t)
	c.expect(id, &expectation{peer: best.addr, verb: packet.VerbWhois, sent: t, asked: a})
}

// Lookup asks for the identity of a if it isn't known.
func (c *Core) Lookup(w *Worker, out Out, now time.Time, a identity.Address) {
	if c.Peer(a) != nil || c.recall(w, out, now, a) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.askWhois(w, out, c.at(now), a, false)
}
