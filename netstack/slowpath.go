package netstack

import (
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
)

// unknown judges a packet that belongs to no flow. It returns the flow it opened,
// nil if the packet goes no further.
func (w *worker) unknown(side Side, at *attachment, v *ipkt.View, k *nat.Key) (*nat.Flow, int) {
	e := w.e
	t := tupleOf(v)
	if f, ended := w.resume(side, at, v, &t); f != nil || ended {
		return f, nat.FromServer
	}
	d := e.decide(w.set, side, at, &t)
	if d.do == actOpen || d.do == actHost || d.do == actReject && d.reason == dropPolicy {
		if v.TTL <= 1 { // before the policy answers: traceroute shows this hop
			w.refuse(at, dropTTL, ipkt.TimeExceeded, v)
			return nil, 0
		}
	}
	switch d.do {
	case actLocal:
		w.toLocal(at, v)
		return nil, 0
	case actHost:
		w.handOver(at, []*ipkt.View{v}, &d)
		return nil, 0
	case actDrop:
		w.set.countRule(&d)
		w.drop(d.reason)
		if d.reason == dropNoFlow {
			w.over(at, v)
		}
		return nil, 0
	case actReject:
		w.set.countRule(&d)
		if d.reason == dropPolicy && v.Proto == ipkt.TCP {
			w.reset(at, v)
		} else {
			w.refuse(at, d.reason, d.answer, v)
		}
		return nil, 0
	}
	if !v.ChecksumOK() {
		w.drop(dropChecksum)
		return nil, 0
	}
	d.flow.Generation, d.flow.Member = w.set.generation, w.member
	f, dir, why := e.table.Open(w.now, k, v, &d.flow)
	if why != nat.Accepted {
		w.refused(at, v, why, d.hidden)
		return nil, 0
	}
	e.kept.forget(f)
	w.set.countRule(&d)
	return f, dir
}

func (s *netSet) countRule(d *decision) {
	if d.rule != ruleNone {
		s.policy.Count(d.rule)
	}
}

// refused counts why a flow couldn't be opened and tells the sender, if it came
// from the VPC or is hidden from it, that there is no room (decision D3).
func (w *worker) refused(from *attachment, v *ipkt.View, why nat.Refusal, hidden bool) {
	d, full := dropOfRefusal(v.Proto, why)
	if full {
		w.e.logRefusals(w.now, d)
	}
	if full && (from == nil || hidden) {
		w.refuse(from, d, ipkt.HostUnreachable, v)
		return
	}
	w.drop(d)
	if why == nat.NotFirst {
		w.tell(from, v)
	}
}

// dropOfRefusal returns why a flow couldn't be opened, and whether that is for want of
// room.
func dropOfRefusal(proto uint8, why nat.Refusal) (d drop, full bool) {
	switch why {
	case nat.TableFull:
		return dropTableFull, true
	case nat.ClientFull, nat.ClientPorts, nat.ClientRate, nat.MemberFull, nat.MemberPorts:
		return dropClientLimit, true
	case nat.NoPort, nat.Clash:
		return dropNoPort, true
	case nat.NotFirst:
		return dropNotFirst, false
	}
	return dropOfProtocol(proto), false
}

func (w *worker) refuse(from *attachment, d drop, kind ipkt.ErrorKind, v *ipkt.View) {
	w.drop(d)
	w.e.sendError(w.now, from, kind, v, 0)
}

// reset refuses a TCP connection as its opener understands it best.
func (w *worker) reset(from *attachment, v *ipkt.View) {
	w.drop(dropPolicy)
	if v.Flags&ipkt.RST == 0 {
		w.e.sendReset(w.now, from, v)
	}
}

// tell says at once to the sender of a TCP segment without a flow that the connection is
// over; to connections that begin nothing is said (RFC 5382 REQ-4). On a network only
// in the name of addresses that are the gateway's there.
func (w *worker) tell(from *attachment, v *ipkt.View) {
	if v.Proto != ipkt.TCP || !v.First || v.Flags&(ipkt.RST|ipkt.ACK) != ipkt.ACK || v.Flags&(ipkt.SYN|ipkt.FIN) == ipkt.SYN|ipkt.FIN || !v.ChecksumOK() {
		return
	}
	if from != nil && !w.set.answersFor(from, v.Destination()) {
		return
	}
	w.e.sendReset(w.now, from, v)
}

// over tells the ends of a connection whose flow is gone, as far as they are known. A
// bare acknowledgement wants no answer: if its receiver sends on, the flow is back.
func (w *worker) over(from *attachment, v *ipkt.View) {
	if v.Proto != ipkt.TCP || !v.First || v.Flags&(ipkt.SYN|ipkt.FIN) == 0 && v.TCPData() == 0 {
		return
	}
	w.tell(from, v)
	if from == nil {
		return
	}
	if host, port, ok := w.e.table.Quarantined(v.Dst, v.Proto, v.DPort); ok {
		server, _ := w.set.seen(from, v.Source())
		w.tellClient(nil, v, netip.AddrPortFrom(server, v.SPort), netip.AddrPortFrom(ipkt.Addr(host), port))
	}
}

// answersFor reports an address at which members of a network reach the gateway, or
// through it the VPC.
func (s *netSet) answersFor(at *attachment, a netip.Addr) bool {
	return at.isOwn(a) || s.standsFor(at, a) || s.isServed(OverlaySide, a) && s.mayServe(at, a)
}

// toLocal hands a packet to the gateway's own stack. From the overlay only what is
// expected there: the stack would answer everything else.
func (w *worker) toLocal(at *attachment, v *ipkt.View) {
	if !w.e.takesLocal(at, v) {
		w.drop(dropNoFlow)
		w.over(at, v)
		return
	}
	if !w.e.local.inject(at.nic(), v.B) {
		w.drop(dropLocal)
		return
	}
	w.countLocal(at, uint16(v.Proto), len(v.B), v.V6)
}

// takesLocal reports whether the gateway's own stack may see a packet for us.
func (e *Engine) takesLocal(at *attachment, v *ipkt.View) bool {
	return at == nil || !v.First || v.Proto != ipkt.TCP && v.Proto != ipkt.UDP || e.local.expects(at.nic(), v)
}

// countLocal counts a packet for ourselves.
func (w *worker) countLocal(at *attachment, proto uint16, n int, v6 bool) {
	fwd := &w.e.stats.vpc
	if at != nil {
		fwd = at.fwd
	}
	class := nat.ClassOther
	if proto < 256 {
		class = nat.ClassOf(uint8(proto))
	}
	fwd.countClass(makeClass(pathLocal, v6, class), 1, uint64(n))
}

func isNDP(v *ipkt.View) bool { return neigh.IsNDP(v) }

// group handles what came to all members of a network, and neighbour discovery:
// nothing of it is forwarded (RFC 1812 §5.3.4).
func (w *worker) group(at *attachment, v *ipkt.View) {
	if !isNDP(v) {
		w.drop(dropForbidden)
		return
	}
	ready, from, verdict := at.neigh.HandleNDP(w.now, macBytes(w.who.mac), v)
	w.neighbour(at, ipkt.ICMPv6, len(v.B), ready, from, verdict)
}

// untupled handles fragments and ICMP messages that are no queries.
func (w *worker) untupled(side Side, at *attachment, v *ipkt.View) {
	switch {
	case v.Fragment:
		w.fragment(side, at, v)
	case v.IsICMPError():
		w.icmpError(side, at, v)
	default:
		w.drop(dropICMPType)
	}
}

// serverOf returns where packets of a direction go on the overlay.
func serverOf(f *nat.Flow, dir int) netip.Addr {
	if dir == nat.FromClient {
		return ipkt.Addr(f.Server())
	}
	return ipkt.Addr(f.Client())
}

// jumboMSS is what a VPC client with a large MTU announces: its segments then
// fill the overlay's MTU, which is two full datagrams.
const jumboMSS = 2760

// leastMSS is the least that any path is taken for (RFC 9293 §3.7.1, less some options).
const leastMSS = 400

// clamp lowers the MSS of a SYN so that segments of both directions fit both
// sides.
func (w *worker) clamp(side Side, at *attachment, f *nat.Flow, dir int, v *ipkt.View) {
	mac := f.Hop.Load() >> 16
	if mac == 0 { // it is the first packet
		end := serverOf(f, dir)
		if side == OverlaySide {
			end = serverOf(f, 1-dir)
		}
		if owner, ok := at.neigh.Lookup(w.now, at.hop(end)); ok {
			mac = macNumber(owner)
		}
	}
	if w.e.clampFor(at, mac, min(at.MTU, w.set.vpc.MTU), v) {
		w.e.stats.clamped[side].Add(1)
	}
}

// clampFor lowers the MSS of a SYN so that segments fit packets of mtu bytes, and one
// datagram on the wire to a member: unless a client's MTU allows whole frames. If the
// path to the member carries less than usual, nothing larger is allowed: the member may
// not know that, and what it sent would be lost. mac is 0 if the member isn't known.
func (e *Engine) clampFor(at *attachment, mac uint64, mtu int, v *ipkt.View) bool {
	headers := 40
	if v.V6 {
		headers = 60
	}
	limit := mtu - headers
	if at.Direct > headers && v.MSS() < jumboMSS {
		limit = min(limit, at.Direct-headers)
	}
	if e.cfg.PathMTU != nil && mac != 0 {
		if path := e.cfg.PathMTU(at.ID, macBytes(mac)); path > 0 && path < at.Direct {
			limit = min(limit, max(path-headers, leastMSS))
		}
	}
	return v.ClampMSS(uint16(min(limit, 65535)))
}
