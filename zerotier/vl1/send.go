package vl1

import (
	"net/netip"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// SendOpts says how a control packet is sent.
type SendOpts struct {
	Compress    bool
	ExpectReply bool // remember the packet, so that its OK is accepted
}

// SendData sends a data packet to p in place: buf[:packet.HeaderLen] is room for
// the header, the rest is the payload. It reports false, without having sent, if
// p has no route right now. It allocates nothing and takes no shared lock.
func (c *Core) SendData(w *Worker, p *Peer, v packet.Verb, buf []byte) bool {
	r := p.route.Load()
	if r == nil {
		return false
	}
	buf[packet.HeaderLen-1] = 0 // else what was there, e.g. of a MAC, could mark it as compressed
	to := r.way()
	c.emit(w, p, &to, v, packet.Packet(buf), c.suiteFor(p, r))
	r.path.size.noteSent(len(buf), to.size, w.t)
	touch(&r.path.lastOut, w.t)
	touch(&p.lastData, w.t)
	return true
}

// emit puts the header into b, seals it and hands the datagrams to out. It
// returns the wire packet ID.
func (c *Core) emit(w *Worker, p *Peer, to *way, v packet.Verb, b packet.Packet, suite packet.Suite) packet.ID {
	compressed := b[packet.HeaderLen-1] & 0x80 // set by packet.Compress
	packet.PutHeader(b, packet.ID(w.random.Uint64()), p.addr, c.self, v)
	b[packet.HeaderLen-1] |= compressed
	split := packet.NeedsSplit(len(b), to.size)
	if split && packet.Datagrams(len(b), to.size) > packet.MaxFragments {
		w.stats.rejects[RejectTooLong].Add(1)
		if said := c.saidTooLong.Load(); (said == 0 || since(w.t, said) >= sayAgain) && c.saidTooLong.CompareAndSwap(said, w.t) {
			c.log.Warn("a packet is too long for a path: lower the MTU of the network, or raise physical.mtu if the path carries more",
				"peer", p.addr, "endpoint", to.ep, "bytes", len(b), "datagrams", to.size, "most", packet.MaxFragments)
		}
		return b.ID()
	}
	b.SetFragmented(split)
	if suite == packet.SuiteTrusted {
		b.SetTrusted(c.trustedPath(to.ep.Addr()))
	} else {
		p.keys.Seal(b, suite, w.scratch)
	}
	w.stats.sealed[suite].add(to.relay, len(b))
	w.stats.txPackets.Add(1)
	if !split {
		w.out.Send(to.sock, to.ep, nil, b)
		return b.ID()
	}
	packet.Split(b, to.size, true, &w.hdr, func(head, data []byte) {
		w.stats.fragmentsOut.Add(1)
		w.out.Send(to.sock, to.ep, head, data)
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
func (c *Core) Send(w *Worker, dst identity.Address, v packet.Verb, payload []byte, opts SendOpts) {
	if dst == c.self || dst.Reserved() || len(payload) > packet.MaxPayload {
		w.stats.rejects[RejectMalformed].Add(1)
		return
	}
	p := c.Peer(dst)
	if p == nil {
		p = c.recall(w, dst)
	}
	if p != nil && c.sendNow(w, p, v, payload, opts) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ok, lost := c.queue.add(queued{dst, v, payload, opts, w.t})
	if lost {
		w.stats.rejects[RejectQueueFull].Add(1)
	}
	if ok && p == nil {
		c.askWhoisLocked(w, dst, false)
	}
}

// sendNow sends over the peer's route; false without one.
func (c *Core) sendNow(w *Worker, p *Peer, v packet.Verb, payload []byte, opts SendOpts) bool {
	r := p.route.Load()
	if r == nil {
		return false
	}
	to := r.way()
	b := w.control(payload, opts.Compress)
	id := c.emit(w, p, &to, v, b, c.suiteFor(p, r))
	r.path.size.noteSent(len(b), to.size, w.t)
	r.path.lastOut.Store(w.t)
	if opts.ExpectReply {
		touch(&p.lastAsked, w.t)
		c.mu.Lock()
		c.replies.expect(id, &expectation{peer: p.addr, verb: v, sent: w.t})
		if v == packet.VerbNetworkConfigRequest {
			c.requests.add(id)
		}
		c.mu.Unlock()
	}
	return true
}

// reply answers a packet on the path it came from (chapter 02 §1), if that is proven or
// the answer is no longer than what came. It is all that is ever sent to where a packet
// came from, but probes.
func (c *Core) reply(w *Worker, to *Peer, src Source, v packet.Verb, payload []byte, compress bool, suite packet.Suite) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.replyLocked(w, to, src, v, payload, compress, suite)
}

func (c *Core) replyLocked(w *Worker, to *Peer, src Source, v packet.Verb, payload []byte, compress bool, suite packet.Suite) bool {
	at := way{sock: src.Socket, ep: src.Endpoint, size: c.sizeTo(to, src.Socket, src.Endpoint), relay: src.Hops > 0}
	return c.answerLocked(w, to, at, src, v, w.control(payload, compress), suite)
}

// answerLocked sends an answer if its address may get as much. A size of 0 means one
// datagram.
func (c *Core) answerLocked(w *Worker, to *Peer, at way, src Source, v packet.Verb, b []byte, suite packet.Suite) bool {
	if !c.mayAnswerLocked(w, to, src, len(b)) {
		return false
	}
	if at.size == 0 {
		at.size = len(b)
	}
	c.emit(w, to, &at, v, b, suite)
	return true
}

// SendOK answers a request on the path it came from.
func (c *Core) SendOK(w *Worker, to *Peer, src Source, inRe packet.Verb, id packet.ID, payload []byte) {
	b := reply{inRe, id}.append(make([]byte, 0, replyLen+len(payload)))
	c.reply(w, to, src, packet.VerbOK, append(b, payload...), false, to.suite())
}

// SendError refuses a request on the path it came from.
func (c *Core) SendError(w *Worker, to *Peer, src Source, inRe packet.Verb, id packet.ID, code packet.ErrorCode, payload []byte) {
	b := append(reply{inRe, id}.append(make([]byte, 0, replyLen+1+len(payload))), byte(code))
	c.reply(w, to, src, packet.VerbError, append(b, payload...), false, to.suite())
}

// knowsEcho reports whether a peer answers ECHO.
func (p *Peer) knowsEcho() bool {
	return p.ProtocolVersion() >= 5 && p.version.Load()>>8&0xffffff != 0x010100
}

const probePayload = replyLen + packet.HeaderLen

// probeSizeLocked is at least the size of a probe.
func (c *Core) probeSizeLocked(p *Peer) int {
	if p.knowsEcho() {
		return packet.HeaderLen + probePayload
	}
	return c.helloSizeLocked()
}

// probeLocked sends ECHO, or HELLO to a peer whose version isn't known. The ECHO is as long
// as its answer and another ECHO: who hears it from an unproven endpoint need not
// send more than came.
func (c *Core) probeLocked(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort) {
	if p.knowsEcho() {
		c.echoLocked(w, p, sock, ep, probePayload)
	} else {
		c.sendHelloLocked(w, p, sock, ep)
	}
}

func (c *Core) echoLocked(w *Worker, p *Peer, sock SocketID, ep netip.AddrPort, payload int) {
	b := packet.Packet(make([]byte, packet.HeaderLen+payload))
	id := c.emit(w, p, &way{sock: sock, ep: ep, size: safeDatagram}, packet.VerbEcho, b, p.suite())
	c.replies.expect(id, &expectation{peer: p.addr, verb: packet.VerbEcho, ep: ep, sent: w.t})
}
