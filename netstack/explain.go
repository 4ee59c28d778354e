package netstack

import (
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// Question is a packet that [Engine.Explain] is asked about.
type Question struct {
	FromOverlay bool
	Network     uint64 // where it comes from, from the overlay
	Protocol    uint8
	Src, Dst    netip.AddrPort
}

// Explanation says what would happen to a packet, and why.
type Explanation struct {
	Verdict      string         // forward | local | drop | reject
	Reason       string         // of drop and reject, as in the metrics
	Established  bool           // it belongs to a flow
	Rule         int            // of the policy; -1 = default, -2 = not asked
	Network      uint64         // that it goes to or comes from; 0 = none
	Route        netip.Prefix   // by which it leaves; invalid = the VPC side
	NextHop      netip.Addr     // on the network
	NextHopMAC   [6]byte        // zero = not known yet
	Source       netip.AddrPort // as it leaves; port 0 = chosen when the flow opens
	Destination  netip.AddrPort
	SourceHow    string // keep | masquerade | map
	Redirected   bool   // by a forward or a map
	MTU          int    // of where it goes
	FlowsOfTable int
}

// Explain says what would happen to a packet that opened a flow now. It changes
// and counts nothing.
func (e *Engine) Explain(q Question) Explanation {
	s := e.set.Load()
	side, at := VPCSide, (*attachment)(nil)
	if q.FromOverlay {
		side, at = OverlaySide, s.attachments[q.Network]
		if at == nil {
			return Explanation{Verdict: "drop", Reason: dropNetwork.String(), Rule: ruleNone}
		}
	}
	t := tuple{q.Protocol, q.Src.Addr(), q.Dst.Addr(), q.Src.Port(), q.Dst.Port()}
	if !t.src.IsValid() || !t.dst.IsValid() || t.src.Is4() != t.dst.Is4() {
		return Explanation{Verdict: "drop", Reason: dropMalformed.String(), Rule: ruleNone}
	}
	d := e.decide(s, side, at, &t)
	x := Explanation{Rule: d.rule, Source: q.Src, Destination: q.Dst, SourceHow: "keep", FlowsOfTable: e.table.Len()}
	x.Verdict = map[action]string{actOpen: "forward", actLocal: "local", actDrop: "drop", actReject: "reject"}[d.do]
	if d.at != nil {
		x.Network = d.at.ID
	}
	if d.do == actDrop || d.do == actReject {
		x.Reason = d.reason.String()
		return x
	}
	if d.do == actLocal {
		return x
	}
	x.MTU = s.vpc.MTU
	if d.flow.To == OverlaySide {
		x.NextHop, x.MTU = d.hop, d.at.MTU
		x.NextHopMAC, _ = d.at.neigh.Lookup(e.clock(), d.hop)
		if r := s.lookup(d.server); r != nil {
			x.Route = r.target
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
		x.SourceHow, x.Source = "masquerade", netip.AddrPortFrom(ipkt.Addr(d.flow.Address), 0)
	case nat.Map:
		x.SourceHow, x.Source = "map", netip.AddrPortFrom(ipkt.Addr(d.flow.Address), t.sport)
		if d.flow.Port != 0 {
			x.Source = netip.AddrPortFrom(ipkt.Addr(d.flow.Address), d.flow.Port)
		}
	}
	w := e.worker()
	defer e.release(w)
	if f, _ := e.table.Find(e.clock(), e.table.TupleKey(side, t.proto, t.src, t.dst, t.sport, t.dport)); f != nil {
		x.Established = true
		x.Source = netip.AddrPortFrom(ipkt.Addr(f.External()), f.ExtPort())
	}
	return x
}
