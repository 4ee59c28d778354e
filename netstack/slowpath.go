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
	d := e.decide(w.set, side, at, &t)
	if d.do == actOpen || d.do == actReject && d.reason == dropPolicy {
		if v.TTL <= 1 { // before the policy answers: traceroute shows this hop
			e.refuse(w.now, at, dropTTL, ipkt.TimeExceeded, v)
			return nil, 0
		}
	}
	switch d.do {
	case actLocal:
		w.toLocal(at, v)
		return nil, 0
	case actDrop:
		w.set.countRule(&d)
		e.drop(side, d.reason)
		return nil, 0
	case actReject:
		w.set.countRule(&d)
		if d.reason == dropPolicy && v.Proto == ipkt.TCP {
			e.reset(w.now, at, v)
		} else {
			e.refuse(w.now, at, d.reason, d.answer, v)
		}
		return nil, 0
	}
	if !v.ChecksumOK() {
		e.drop(side, dropChecksum)
		return nil, 0
	}
	d.flow.Generation = w.set.generation
	f, dir, why := e.table.Open(w.now, k, v, &d.flow)
	if why != nat.Accepted {
		e.refused(w.now, at, v, why)
		return nil, 0
	}
	w.set.countRule(&d)
	return f, dir
}

func (s *netSet) countRule(d *decision) {
	if d.rule != ruleNone {
		s.policy.Count(d.rule)
	}
}

// refused counts why a flow couldn't be opened and tells the sender, if it came
// from the VPC, that there is no room (decision D3).
func (e *Engine) refused(now int64, from *attachment, v *ipkt.View, why nat.Refusal) {
	d, full := dropOfRefusal(v.Proto, why)
	if full {
		e.logRefusals(now, d)
	}
	if full && from == nil {
		e.refuse(now, from, d, ipkt.HostUnreachable, v)
		return
	}
	e.drop(from.side(), d)
}

// dropOfRefusal returns why a flow couldn't be opened, and whether that is for want of
// room.
func dropOfRefusal(proto uint8, why nat.Refusal) (d drop, full bool) {
	switch why {
	case nat.TableFull:
		return dropTableFull, true
	case nat.ClientFull, nat.ClientPorts, nat.ClientRate:
		return dropClientLimit, true
	case nat.NoPort, nat.Clash:
		return dropNoPort, true
	case nat.NotFirst:
		return dropNotFirst, false
	}
	return dropOfProtocol(proto), false
}

func (e *Engine) refuse(now int64, from *attachment, d drop, kind ipkt.ErrorKind, v *ipkt.View) {
	e.drop(from.side(), d)
	e.sendError(now, from, kind, v, 0)
}

// reset refuses a TCP connection as its opener understands it best.
func (e *Engine) reset(now int64, from *attachment, v *ipkt.View) {
	e.drop(from.side(), dropPolicy)
	if v.Flags&ipkt.RST != 0 || !e.errors.allow(now, v.Source(), false) {
		return
	}
	var r ipkt.View
	if ipkt.Parse(ipkt.AppendReset(nil, v), &r) == ipkt.OK {
		e.sendIP(now, from, &r)
	}
}

// toLocal hands a packet to the gateway's own stack. From the overlay only what is
// expected there: the stack would answer everything else.
func (w *worker) toLocal(at *attachment, v *ipkt.View) {
	if !w.e.takesLocal(at, v) {
		w.e.drop(at.side(), dropNoFlow)
		return
	}
	if !w.e.local.inject(at.nic(), v.B) {
		w.e.drop(at.side(), dropLocal)
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
	if isNDP(v) {
		w.countLocal(at, ipkt.ICMPv6, len(v.B), true)
		ready, from := at.neigh.HandleNDP(w.now, v)
		w.e.sendReady(w.now, at, ready, from)
		return
	}
	w.e.drop(OverlaySide, dropForbidden)
}

// untupled handles fragments and ICMP messages that are no queries.
func (w *worker) untupled(side Side, at *attachment, v *ipkt.View) {
	switch {
	case v.Fragment:
		w.fragment(side, at, v)
	case v.IsICMPError():
		w.icmpError(side, at, v)
	default:
		w.e.drop(side, dropICMPType)
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
