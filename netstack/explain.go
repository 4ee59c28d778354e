package netstack

import (
	"encoding/binary"
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/policy"
)

// Question is a packet that [Engine.Explain] is asked about.
type Question struct {
	FromOverlay bool
	Network     uint64 // where it comes from, from the overlay
	Protocol    uint8
	// Src and Dst are its ends. The port of a source may be 0, for any; of an ICMP query
	// it is the identifier.
	Src, Dst netip.AddrPort
}

// Explanation says what would happen to a packet, and why.
type Explanation struct {
	Verdict      string         // forward | local | drop | reject
	Reason       string         // of drop and reject, as in the metrics
	Established  bool           // it belongs to a flow
	Rule         int            // of the policy; -1 = default, -2 = not asked
	Network      uint64         // that it goes to or comes from; 0 = none
	To           Side           // to which it leaves
	Route        netip.Prefix   // by which it leaves; invalid = the VPC side
	NextHop      netip.Addr     // on the network
	NextHopMAC   [6]byte        // zero = not known yet; of one that doesn't answer, the last
	Source       netip.AddrPort // as it leaves; port 0 = chosen when the flow opens
	Destination  netip.AddrPort
	SourceHow    string       // keep | masquerade | map | host, where it goes on by a socket of the host
	Redirected   bool         // by a forward or a map
	Forward      *PortForward // that it takes; nil = none
	SourceMap    *AddressMap  // by which its source is another one behind us
	TargetMap    *AddressMap  // by which its destination is
	MTU          int          // of where it goes
	FlowsOfTable int
}

func (x *Explanation) refuse(verdict string, d drop) { x.Verdict, x.Reason = verdict, d.String() }

// Explain says what would happen now to a packet: the first of a flow, unless it
// belongs to one. It changes and counts nothing. Limits are those of this moment.
// What depends on the rest of a packet isn't known to it: its size, hop limit, TCP
// flags and checksums. Of the next hop it knows whether it answered last.
func (e *Engine) Explain(q Question) Explanation {
	w := e.worker()
	defer e.release(w)
	x := Explanation{Verdict: "forward", Rule: ruleNone, Source: q.Src, Destination: q.Dst, SourceHow: "keep", FlowsOfTable: e.table.Len()}
	var at *attachment
	if q.FromOverlay {
		if at = w.set.attachments[q.Network]; at == nil {
			x.refuse("drop", dropNetwork)
			return x
		}
	}
	if !q.makesPacket() {
		x.refuse("drop", dropMalformed)
		return x
	}
	var v ipkt.View
	var k nat.Key
	switch r := ipkt.Parse(q.packet(), &v); {
	case r != ipkt.OK:
		x.refuse("drop", drop(r))
	case !e.table.KeyOf(at.side(), &v, &k):
		x.refuse("drop", dropICMPType)
	default:
		if f, dir := e.table.Peek(w.now, &k); f == nil || !w.explainKnown(&x, at, f, dir) {
			w.explainNew(&x, &q, at, &v, &k)
		}
	}
	return x
}

// Permits reports whether the policy lets a client of any address open a flow to an
// overlay host: one for which somebody in the VPC speaks. It counts nothing.
func (e *Engine) Permits(q Question) bool {
	s := e.set.Load()
	host := s.fromVPC(q.Dst.Addr())
	d := decision{at: host.at}
	t := tuple{proto: q.Protocol, src: q.Src.Addr(), sport: q.Src.Port()}
	return host.at != nil && s.allow(&d, &t, host.addr, q.Dst.Port(), policy.Out)
}

// anyPort stands for the port of a client that is left open.
const anyPort = 49152

// makesPacket reports that there is a packet with these ends.
func (q *Question) makesPacket() bool {
	src, dst := q.Src.Addr(), q.Dst.Addr()
	return src.IsValid() && dst.IsValid() && src.Is4() == dst.Is4()
}

// packet makes the shortest packet of its kind that could open a flow.
func (q *Question) packet() []byte {
	sport, dport := q.Src.Port(), q.Dst.Port()
	proto := q.Protocol
	v6 := q.Src.Addr().Is6()
	if proto == ipkt.ICMP && v6 {
		proto = ipkt.ICMPv6
	}
	var l4 []byte
	ends := func(size int) {
		if sport == 0 {
			sport = anyPort
		}
		l4 = make([]byte, size)
		binary.BigEndian.PutUint16(l4, sport)
		binary.BigEndian.PutUint16(l4[2:], dport)
	}
	switch proto {
	case ipkt.TCP:
		ends(20)
		l4[12], l4[13] = 5<<4, ipkt.SYN
	case ipkt.UDP:
		ends(8)
		l4[5] = 8
	case ipkt.ICMP:
		l4 = []byte{8, 7: 0}
		binary.BigEndian.PutUint16(l4[4:], sport)
	case ipkt.ICMPv6:
		l4 = []byte{128, 7: 0}
		binary.BigEndian.PutUint16(l4[4:], sport)
	default:
		l4 = make([]byte, 8)
	}
	if v6 {
		b := []byte{0x60, 5: byte(len(l4)), 6: proto, 7: 64}
		b = append(append(b, q.Src.Addr().AsSlice()...), q.Dst.Addr().AsSlice()...)
		return append(b, l4...)
	}
	b := []byte{0x45, 3: byte(20 + len(l4)), 8: 64, 9: proto, 11: 0}
	b = append(append(b, q.Src.Addr().AsSlice()...), q.Dst.Addr().AsSlice()...)
	ipkt.FixHeader(b)
	return append(b, l4...)
}

// explainKnown is [worker.known] without effects, for a packet of a flow. It reports
// false if the flow isn't allowed any more.
func (w *worker) explainKnown(x *Explanation, at *attachment, f *nat.Flow, dir int) bool {
	d, same := w.e.judge(w.set, f)
	if !same && f.Generation.Load() != w.set.generation {
		return false
	}
	x.Established = true
	switch {
	case at != nil && f.Slot != at.slot:
		x.refuse("drop", dropSpoofed)
		return true
	case f.Holds(dir):
		x.refuse("drop", dropNoFlow)
		return true
	}
	if same {
		x.Rule, x.Forward, x.SourceMap, x.TargetMap = d.rule, d.forward, d.source, d.target
	}
	if x.Redirected = f.Redirected(); f.Translated() {
		x.SourceHow = "map"
		if f.Mapped() {
			x.SourceHow = "masquerade"
		}
	}
	if int(f.Slot) < len(w.set.slots) {
		x.leave(w, f.Exit(dir), w.set.slots[f.Slot], serverOf(f, dir))
	}
	if dir == nat.FromClient {
		x.Source, x.Destination = netip.AddrPortFrom(ipkt.Addr(f.External()), f.ExtPort()), netip.AddrPortFrom(ipkt.Addr(f.Server()), f.ServerPort())
	} else {
		x.Source, x.Destination = netip.AddrPortFrom(ipkt.Addr(f.Target()), f.TargetPort()), netip.AddrPortFrom(ipkt.Addr(f.Client()), f.ClientPort())
	}
	return true
}

// explainNew is [worker.unknown] without effects.
func (w *worker) explainNew(x *Explanation, q *Question, at *attachment, v *ipkt.View, k *nat.Key) {
	e := w.e
	t := tupleOf(v)
	if m, _, found, same := e.resumption(w.now, w.set, at.side(), at, &t); found && same {
		x.Established, x.SourceHow = true, "map"
		x.Source, x.Destination, x.Redirected = m.Target, m.Client, m.Client != m.External
		to := (*attachment)(nil)
		if m.From == OverlaySide {
			to = w.set.attachments[m.Network]
		}
		x.leave(w, m.From, to, m.Client.Addr())
		return
	}
	d := e.decide(w.set, at.side(), at, &t)
	x.Rule, x.Forward, x.SourceMap, x.TargetMap = d.rule, d.forward, d.source, d.target
	if d.at != nil {
		x.Network = d.at.ID
	}
	switch d.do {
	case actDrop:
		x.refuse("drop", d.reason)
		return
	case actReject:
		x.refuse("reject", d.reason)
		return
	case actLocal:
		if x.Verdict = "local"; !e.takesLocal(at, v) {
			x.refuse("drop", dropNoFlow)
		}
		if d.forward != nil {
			x.Redirected, x.Destination = true, d.forward.To
		}
		return
	}
	x.leave(w, d.flow.To, d.at, d.server)
	if d.do == actHost {
		x.SourceHow, x.Source = "host", netip.AddrPort{}
		if e.handovers == nil {
			x.refuse("drop", dropNoAddress)
		}
	}
	if d.flow.Server != [16]byte{} {
		x.Redirected = true
		x.Destination = netip.AddrPortFrom(d.server, t.dport)
		if d.flow.ServerPort != 0 {
			x.Destination = netip.AddrPortFrom(d.server, d.flow.ServerPort)
		}
	}
	switch d.flow.Source {
	case nat.Masquerade:
		x.SourceHow, x.Source = "masquerade", netip.AddrPortFrom(e.table.AddressOf(k, &d.flow), 0)
	case nat.Map:
		x.SourceHow, x.Source = "map", netip.AddrPortFrom(ipkt.Addr(d.flow.Address), q.Src.Port())
		if d.flow.Port != 0 {
			x.Source = netip.AddrPortFrom(ipkt.Addr(d.flow.Address), d.flow.Port)
		}
	}
	if at != nil { // who has the address, as far as is known
		if mac, known := at.neigh.Lookup(w.now, at.hop(t.src)); known {
			d.flow.Member = macNumber(mac)<<16 | uint64(at.slot)
		}
	}
	if d.do == actHost {
		return
	}
	switch why := e.table.MayOpen(w.now, k, v, &d.flow); {
	case why != nat.Accepted:
		reason, full := dropOfRefusal(v.Proto, why)
		if x.refuse("drop", reason); full && (at == nil || d.hidden) {
			x.Verdict = "reject"
		}
	case d.flow.Filtered: // the other side hasn't sent anything yet
		x.refuse("drop", dropNoFlow)
	}
}

// leave says where a packet goes.
func (x *Explanation) leave(w *worker, to Side, at *attachment, host netip.Addr) {
	if x.To, x.MTU = to, w.set.vpc.MTU; at == nil {
		return
	}
	x.Network = at.ID
	if to != OverlaySide {
		return
	}
	x.MTU = at.MTU
	if r := at.routes.lookup(host); r != nil {
		x.Route, x.NextHop = r.target, r.hop(host)
		mac, ok := at.neigh.Lookup(w.now, x.NextHop)
		if !ok {
			var silent bool
			if mac, silent = at.neigh.Silent(x.NextHop); silent {
				x.refuse("reject", dropUnresolved)
			}
		}
		x.NextHopMAC = mac
	}
}
