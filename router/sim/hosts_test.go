package sim

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/gateway/gatewaytest"
)

// What the ICMP types of an echo are.
const (
	echoReply   = 0
	echoRequest = 8
)

// answer is what a server says: to everything that it was sent the same again.
func (s *service) answer(p *packet) []byte {
	s.hear(p)
	switch {
	case p.proto == unix.IPPROTO_ICMP && p.icmp == echoRequest:
		return echo(echoReply, netip.AddrPortFrom(p.dst.Addr(), p.src.Port()), p.src.Addr(), p.payload)
	case p.proto == unix.IPPROTO_UDP:
		return gatewaytest.UDP(p.dst, p.src, p.payload)
	case p.proto != unix.IPPROTO_TCP || p.flags&gatewaytest.RST != 0:
	case p.flags&gatewaytest.SYN != 0:
		return gatewaytest.TCP(p.dst, p.src, gatewaytest.SYN|gatewaytest.ACK, serverSeq, p.seq+1, nil)
	case p.flags&gatewaytest.FIN != 0:
		delete(s.heard, served{p.proto, p.src, p.dst}) // its port may go to another client (RFC 6888 REQ-8 A)
		return gatewaytest.TCP(p.dst, p.src, gatewaytest.FIN|gatewaytest.ACK, p.ack, p.seq+uint32(len(p.payload))+1, nil)
	case len(p.payload) > 0:
		return gatewaytest.TCP(p.dst, p.src, gatewaytest.PSH|gatewaytest.ACK, p.ack, p.seq+uint32(len(p.payload)), p.payload)
	}
	return nil
}

const serverSeq, clientSeq = 5000, 1000

// shareWindow is for how long an external port is its client's alone, less than any
// timeout of an answered flow.
const shareWindow = 20 * time.Second

// token is the payload that says whose a packet is: "c" or another mark of the kind of
// traffic, the client's endpoint, and a number.
func token(mark string, client netip.AddrPort, n int) []byte {
	return fmt.Appendf(nil, "%s %s %d", mark, client, n)
}

// hear checks what comes to a server.
func (s *service) hear(p *packet) {
	mark, rest, ok := bytes.Cut(p.payload, []byte(" "))
	client, _, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 {
		return
	}
	s.w.heard(s.name, string(mark), p)
	if string(mark) != clientMark {
		return
	}
	k := served{p.proto, p.src, p.dst}
	now := s.w.net.Now
	if c, ok := s.heard[k]; ok && c.client != string(client) && now.Sub(c.at) < shareWindow && !c.at.Before(s.since) {
		s.w.found("port", "%s sees %s and, %v later, %s as %s by protocol %d", s.name, c.client, now.Sub(c.at), client, p.src, p.proto)
	}
	if len(s.heard) > 10000 {
		clear(s.heard)
	}
	s.heard[k] = claim{string(client), now}
}

// client is a host of the VPC that makes connections.
type client struct {
	w     *world
	addr  netip.Addr
	port  uint16
	conns map[uint16]*conn
	held  []netip.AddrPort // endpoints of connections that it keeps, see hoard
}

// conn is a connection that a client makes: it is answered, or it fails.
type conn struct {
	c       *client
	proto   byte
	local   netip.AddrPort
	to      netip.AddrPort
	token   []byte
	began   time.Time
	calm    bool // whether it should succeed
	open    bool // TCP: the server agreed
	done    bool
	attempt int
	report  func(ok bool)
}

// connPatience is how soon a connection is made while nothing is wrong.
const connPatience = time.Second

// probePatience is what the gateway's own probes have.
const probePatience = 3 * time.Second

func (w *world) newClient(addr string) *client {
	c := &client{w: w, addr: netip.MustParseAddr(addr), port: 20000, conns: map[uint16]*conn{}}
	w.clients = append(w.clients, c)
	return c
}

// connect makes a connection and checks what comes of it.
func (c *client) connect(proto byte, to netip.AddrPort, report func(ok bool)) {
	c.port++
	if c.port > 60000 {
		c.port = 20001
	}
	if c.conns[c.port] != nil {
		return
	}
	x := &conn{c: c, proto: proto, local: netip.AddrPortFrom(c.addr, c.port), to: to, began: c.w.net.Now, calm: c.w.calm(), report: report}
	x.token = token(clientMark, x.local, int(c.port))
	c.conns[c.port] = x
	c.w.connections++
	x.try()
	patience := connPatience
	if report != nil {
		patience = probePatience
	}
	c.w.net.After(patience, x.judge)
}

// try sends the first packet, and again after a while.
func (x *conn) try() {
	if x.done || x.c.conns[x.local.Port()] != x {
		return
	}
	x.send()
	x.attempt++
	x.c.w.net.After(300*time.Millisecond, x.try)
}

func (x *conn) send() {
	var b []byte
	switch {
	case x.proto == unix.IPPROTO_UDP:
		b = gatewaytest.UDP(x.local, x.to, x.token)
	case x.proto == unix.IPPROTO_ICMP:
		b = echo(echoRequest, x.local, x.to.Addr(), x.token)
	case x.open:
		b = gatewaytest.TCP(x.local, x.to, gatewaytest.PSH|gatewaytest.ACK, clientSeq+1, serverSeq+1, x.token)
	default:
		b = gatewaytest.TCP(x.local, x.to, gatewaytest.SYN, clientSeq, 0, nil)
	}
	x.c.w.fromVPC(b)
}

// judge ends the connection.
func (x *conn) judge() {
	delete(x.c.conns, x.local.Port())
	w := x.c.w
	if !x.done && x.calm && w.calm() {
		w.found("starve", "%s gets no answer by protocol %d from %s within %v", x.local, x.proto, x.to, w.net.Now.Sub(x.began))
	}
	if x.done {
		w.answered++
		w.latest = w.net.Now
	}
	if x.report != nil {
		x.report(x.done)
	}
}

// receive takes a packet that comes to the client.
func (c *client) receive(p *packet) {
	if bytes.HasPrefix(p.payload, []byte(clientMark+" ")) && p.proto != unix.IPPROTO_ICMP && !bytes.Contains(p.payload, []byte(" "+c.addr.String()+":")) {
		c.w.found("cross", "%s gets what is meant for another: %q from %s", c.addr, p.payload, p.src)
	}
	if bytes.HasPrefix(p.payload, []byte(spoofMark+" ")) && p.src.Addr() == officeAddr && c.w.calm() {
		c.w.found("spoof", "%s gets a packet of %s, which a member without that address sent", c.addr, p.src)
	}
	if slices.Contains(c.w.hoarders, c) {
		c.hold(p)
		return
	}
	x := c.conns[p.dst.Port()]
	if x == nil || p.proto != x.proto || x.proto != unix.IPPROTO_ICMP && p.src != x.to {
		return
	}
	switch {
	case x.proto == unix.IPPROTO_TCP && p.flags&gatewaytest.RST != 0:
	case x.proto == unix.IPPROTO_TCP && p.flags&gatewaytest.SYN != 0 && !x.open:
		x.open = true
		x.send()
	case bytes.Equal(p.payload, x.token) && !(x.proto == unix.IPPROTO_ICMP && p.icmp != echoReply):
		if x.proto == unix.IPPROTO_TCP && !x.done {
			n := uint32(len(x.token))
			c.w.fromVPC(gatewaytest.TCP(x.local, x.to, gatewaytest.FIN|gatewaytest.ACK, clientSeq+1+n, serverSeq+1+n, nil))
		}
		x.done = true
	}
}

// hold finishes a handshake, and keeps the connection.
func (c *client) hold(p *packet) {
	if p.proto == unix.IPPROTO_TCP && p.flags&gatewaytest.SYN != 0 {
		c.held = append(c.held, p.dst)
		c.w.fromVPC(gatewaytest.TCP(p.dst, p.src, gatewaytest.ACK, p.ack, p.seq+1, nil))
	}
}

// fromVPC carries a packet of a VPC host to the gateway's machine.
func (w *world) fromVPC(b []byte) {
	w.net.After(vpcLatency, func() { w.gate.fromEth(b) })
}

const vpcLatency = 500 * time.Microsecond

// fromTUN takes a packet that the gateway sends to the VPC.
func (w *world) fromTUN(b []byte) {
	p, ok := parse(b)
	if !ok {
		w.found("malformed", "the VPC gets %x", b)
		return
	}
	w.trace("tun %d %s %s %d", p.proto, p.src, p.dst, len(p.payload))
	if vpcPrefix.Contains(p.src.Addr()) && !w.hairpin(&p) {
		w.found("spoof", "the VPC gets a packet of its own %s to %s from the gateway: %q", p.src, p.dst, p.payload)
	}
	switch way := w.gate.kernel.way(p.dst.Addr()); {
	case way == ethIndex && vpcPrefix.Contains(p.dst.Addr()):
	case way == tunIndex || way == wayBlackhole:
		return
	default:
		w.found("stray", "the gateway sends %s a packet to %s, which leaves by interface %d", p.src, p.dst, way)
		return
	}
	w.net.After(vpcLatency, func() {
		if p.dst.Addr() == w.server.addr {
			if answer := w.server.svc.answer(&p); answer != nil {
				w.fromVPC(answer)
			}
			return
		}
		for _, c := range w.clients {
			if c.addr == p.dst.Addr() {
				c.receive(&p)
				return
			}
		}
	})
}

// hairpin reports a packet that the gateway rightly sends back into the VPC.
func (w *world) hairpin(*packet) bool { return false }

// toOverlay looks at a frame that the gateway sends.
func (w *world) toOverlay(nwid networkID, f []byte) {
	if len(f) < ethernetLen {
		w.found("malformed", "the overlay gets %x", f)
		return
	}
	b := f[ethernetLen:]
	switch typ := uint16(f[12])<<8 | uint16(f[13]); typ {
	case unix.ETH_P_ARP:
		if len(b) < 28 {
			return
		}
		w.trace("arp %s %s %d", addrOf(b[14:18]), addrOf(b[24:28]), b[7])
		if a := addrOf(b[14:18]); !a.IsUnspecified() && !w.ownAddress(nwid, a) {
			w.found("leak", "network %s learns by ARP of %s, which it hasn't given the gateway", nwid, a)
		}
	case unix.ETH_P_IP:
		p, ok := parse(b)
		if !ok {
			w.found("malformed", "the overlay gets %x", b)
			return
		}
		w.trace("out %x %d %s %s %d", uint64(nwid)&0xff, p.proto, p.src, p.dst, len(p.payload))
		if nwid == w.netA && w.claimed && [6]byte(f) == w.rogue.mac() && p.dst.Addr() != rogueAddr {
			w.found("stray", "what is for %s goes to a member that only says it has that address", p.dst)
		}
		w.checkOut(nwid, &p)
	}
}

func (w *world) checkOut(nwid networkID, p *packet) {
	src, dst := p.src.Addr(), p.dst.Addr()
	switch {
	case vpcPrefix.Contains(src):
		w.found("leak", "network %s sees the inside address %s in a packet to %s", nwid, src, dst)
	case !w.ownAddress(nwid, src) && (nwid != w.netA || !routedPrefix.Contains(src)):
		w.found("leak", "network %s sees a packet of %s, an address that it hasn't given the gateway, to %s", nwid, src, dst)
	}
	good := overlayPrefix.Contains(dst) || behindPrefix.Contains(dst)
	switch {
	case nwid == w.netA && !good, nwid == w.netB && good:
		w.found("stray", "network %s gets a packet to %s", nwid, dst)
	case behindPrefix.Contains(dst) && w.behindGone != 0 && w.net.Now.Sub(epoch) > w.behindGone:
		w.found("stale", "a packet to %s follows a route that was withdrawn", dst)
	}
	if bytes.HasPrefix(p.payload, []byte(sidesMark+" ")) {
		w.found("sides", "the gateway sends what an overlay member sent it to %s of the overlay: %q", dst, p.payload)
	}
}
