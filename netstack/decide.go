package netstack

import (
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/policy"
)

// tuple is what a decision about a new flow depends on.
type tuple struct {
	proto        uint8
	src, dst     netip.Addr
	sport, dport uint16
}

// action is what happens to a packet that belongs to no flow.
type action uint8

const (
	actOpen action = iota
	actLocal
	actDrop
	actReject // and tell the sender
	actHost   // it goes on by sockets of the host
)

// decision is what happens to a packet that belongs to no flow, and why.
type decision struct {
	do     action
	reason drop
	answer ipkt.ErrorKind
	rule   int // of the policy; see below
	at     *attachment
	hop    netip.Addr
	server netip.Addr // who gets it, behind any translation
	flow   nat.NewFlow
	// What applies:
	forward        *PortForward
	source, target *AddressMap
	hidden         bool // the client, behind an address of the VPC side
}

// ruleNone means that the policy wasn't asked; -1 is its default.
const ruleNone = -2

func refuseWith(d drop) decision { return decision{do: actDrop, reason: d, rule: ruleNone} }

func tellWith(d drop, kind ipkt.ErrorKind) decision {
	return decision{do: actReject, reason: d, answer: kind, rule: ruleNone}
}

// decideVPC judges what comes from the VPC side.
func (e *Engine) decideVPC(s *netSet, t *tuple) decision {
	if d := s.checkVPC(t.src, t.dst); d != 0 {
		return refuseWith(d)
	}
	d := decision{rule: ruleNone}
	to, port := t.dst, t.dport
	if f := s.forward(nil, t.proto, t.dst, t.dport); f != nil {
		d.forward, to, port = f, f.To.Addr(), f.To.Port()
		d.flow.ServerPort = port
	} else if s.isOwn(t.dst) {
		d.server = t.dst
		return e.hairpin(s, t, d)
	} else if s.isServed(VPCSide, t.dst) { // elsewhere, at this port there is nothing
		return tellWith(dropNoRoute, ipkt.NoRoute)
	}
	host := s.fromVPC(to)
	d.at, d.hop, d.server, d.target = host.at, host.hop, host.addr, host.by
	if d.server != t.dst || d.forward != nil {
		d.flow.Server = ipkt.Bytes(d.server)
	}
	if d.at != nil && s.standsFor(d.at, d.server) { // nobody else would answer there
		return tellWith(dropNoRoute, ipkt.NoRoute)
	}
	switch {
	case !forwardable(d.server), s.isBroadcastOn(d.at, d.server), s.isOwnOn(d.at, d.server), d.at == nil && s.isServed(VPCSide, d.server):
		return refuseWith(dropForbidden)
	case d.at == nil && d.forward != nil && !d.forward.Relayed && s.inVPC(d.server):
		return e.hairpinForward(s, t, d, port)
	case d.at == nil:
		return tellWith(dropNoRoute, ipkt.NoRoute)
	}
	d.flow.Slot, d.flow.To = d.at.slot, OverlaySide
	switch {
	case !s.allow(&d, t, d.server, port, policy.Out):
		return d
	case d.forward != nil && d.forward.Relayed:
		return decision{do: actLocal, rule: d.rule, server: t.dst, forward: d.forward}
	}
	return sourceToOverlay(s, t, d)
}

// sourceToOverlay says how a VPC host appears on the overlay: as the forward that it
// takes says, else as the network's configuration does.
func sourceToOverlay(s *netSet, t *tuple, d decision) decision {
	at, v6 := d.at, t.src.Is6()
	// The target of a forward answers from the forward's address, even when the flow
	// isn't known any more.
	if f := s.backwards[forwardKey{t.src, t.sport, t.proto, OverlaySide}]; f != nil {
		listen := f.Listen.Addr()
		if listen.IsUnspecified() {
			listen = at.address(v6)
		}
		if s.mayServe(at, listen) {
			d.flow.Source, d.flow.Address, d.flow.Port = nat.Map, ipkt.Bytes(listen), f.Listen.Port()
			return d
		}
	}
	if m, a := s.translate(VPCSide, false, at.ID, t.src); m != nil {
		d.source, d.flow.Source, d.flow.Address = m, nat.Map, ipkt.Bytes(a)
		return d
	}
	masquerade := at.Masquerade
	if v6 {
		masquerade = at.Masquerade6
	}
	if masquerade = masquerade && !contains(at.Exempt, d.server); d.forward != nil {
		masquerade = d.forward.Masquerade
	}
	if !masquerade {
		return d
	}
	a, masks := at.address(v6), at.masks(v6)
	if len(masks) > 0 {
		a = masks[0]
	}
	if !a.IsValid() {
		return tellWith(dropNoAddress, ipkt.NoRoute)
	}
	d.flow.Source, d.flow.Address, d.flow.Paired = nat.Masquerade, ipkt.Bytes(a), len(masks) > 1
	return d
}

// mayBeBehind reports whether a flow that is judged so may leave from an address.
func (d *decision) mayBeBehind(a netip.Addr) bool {
	return d.flow.Address == ipkt.Bytes(a) || d.flow.Paired && d.at.isMask(a)
}

// hairpinForward forwards a connection from the VPC back into it. The target sees the
// forward's own address, as other clients' targets do (RFC 4787 REQ-9 a).
func (e *Engine) hairpinForward(s *netSet, t *tuple, d decision, port uint16) decision {
	d.flow.To = VPCSide
	d.at = s.own[t.dst]
	if d.at != nil {
		d.flow.Slot = d.at.slot
	}
	if !s.allow(&d, t, d.server, port, policy.Out) {
		return d
	}
	d.flow.Source, d.flow.Address = nat.Masquerade, ipkt.Bytes(t.dst)
	return d
}

// hairpin judges a packet of a VPC host to one of our addresses: for the mapping
// of another VPC host (RFC 4787 REQ-9), for one of an earlier run, or for
// ourselves.
func (e *Engine) hairpin(s *netSet, t *tuple, d decision) decision {
	if t.proto != ipkt.TCP && t.proto != ipkt.UDP {
		d.do = actLocal
		return d
	}
	if s.isBehind(t.dst) {
		return e.toMapping(s, t, d)
	}
	if at := s.own[t.dst]; at != nil {
		if host, port, _, ok := e.table.Owner(ipkt.Bytes(t.dst), t.proto, t.dport); ok {
			d.at, d.server = at, ipkt.Addr(host)
			d.flow = nat.NewFlow{Slot: at.slot, To: VPCSide, Server: host, ServerPort: port, Source: nat.Masquerade, Address: ipkt.Bytes(t.dst),
				Filtered: e.table.Filter(t.proto) == nat.AddressAndPortDependent}
			d.flow.Paired = at.isMask(t.dst) && len(at.masks(t.dst.Is6())) > 1 // the client leaves from its own, as to others
			s.allow(&d, t, d.server, port, policy.Out)
			return d
		}
	}
	if _, _, ok := e.table.Quarantined(ipkt.Bytes(t.dst), t.proto, t.dport); ok {
		return refuseWith(dropNoFlow) // the mapping's owner may go on
	}
	d.do = actLocal
	return d
}

// decideOverlay judges what comes from a network.
func (e *Engine) decideOverlay(s *netSet, at *attachment, t *tuple) decision {
	if d := s.checkOverlay(at, t.src, t.dst); d != 0 {
		return refuseWith(d)
	}
	d := decision{rule: ruleNone, server: t.dst, at: at}
	d.flow.Slot, d.flow.To = at.slot, VPCSide
	port := t.dport
	invited, mapped := true, false
	if f := s.forward(at, t.proto, t.dst, t.dport); f != nil {
		d.forward, d.server, port = f, f.To.Addr(), f.To.Port()
		d.flow.Server, d.flow.ServerPort = ipkt.Bytes(d.server), port
	} else if at.isOwn(t.dst) {
		if host, hostPort, ok := e.openMapping(t); ok {
			d.server, port, mapped = ipkt.Addr(host), hostPort, true
			d.flow.Server, d.flow.ServerPort = host, hostPort
		} else {
			return localFromOverlay(t)
		}
	} else if m, a := s.translate(VPCSide, true, at.ID, t.dst); m != nil {
		d.target, d.server = m, a
		d.flow.Server = ipkt.Bytes(a)
	} else if s.isOwn(t.dst) || s.isServed(OverlaySide, t.dst) || at.onLink(t.dst) { // of another side, or a member that the sender reaches itself
		return refuseWith(dropNoFlow)
	} else {
		invited = false
	}
	if !forwardable(d.server) || s.isBroadcast(d.server) || s.isOwn(d.server) {
		return refuseWith(dropForbidden)
	}
	by := s.hides(t.src, d.server)
	switch {
	case mapped:
		by = nil // whoever has the mapping knows its way back
	case by != nil && contains(by.Except, d.server), by != nil && by.ByHost && s.comesBack(d.server):
		return refuseWith(dropForbidden)
	}
	if !s.inVPC(d.server) && (by == nil || s.fromVPC(d.server).at != nil) {
		return refuseWith(dropNoFlow)
	}
	if !s.allow(&d, t, d.server, port, policy.In) {
		return d
	}
	invited = invited || by != nil && by.Invites
	// Nobody reaches VPC hosts from outside unless a forward, a map or a rule for just
	// that says so (RFC 6092).
	if !invited && (d.rule < 0 || s.policy.Rule(d.rule).Direction != policy.In) {
		return refuseWith(dropNoFlow)
	}
	return s.sourceToVPC(at, t, d, by)
}

// openMapping finds the VPC host behind an external port, where everybody may
// send to it (decision D2).
func (e *Engine) openMapping(t *tuple) (host [16]byte, port uint16, ok bool) {
	if e.table.Filter(t.proto) != nat.EndpointIndependent {
		return host, 0, false
	}
	if host, port, _, ok = e.table.Owner(ipkt.Bytes(t.dst), t.proto, t.dport); ok {
		return host, port, true
	}
	client, ok := e.kept.owner(t.proto, OverlaySide, netip.AddrPortFrom(t.dst, t.dport))
	if !ok {
		return host, 0, false
	}
	host, port, ok = e.table.Quarantined(ipkt.Bytes(t.dst), t.proto, t.dport)
	return host, port, ok && client == netip.AddrPortFrom(ipkt.Addr(host), port)
}

// localFromOverlay lets through to ourselves what we answer or asked for. Ports
// that nobody uses are silent (RFC 5382 REQ-4).
func localFromOverlay(t *tuple) decision {
	switch t.proto {
	case ipkt.TCP, ipkt.UDP:
		if t.dport < nat.LocalPortFirst || t.dport > nat.LocalPortLast {
			return refuseWith(dropNoFlow)
		}
	case ipkt.ICMP, ipkt.ICMPv6:
	default:
		return refuseWith(dropNoFlow)
	}
	return decision{do: actLocal, rule: ruleNone, server: t.dst}
}

// allow asks the policy.
func (s *netSet) allow(d *decision, t *tuple, server netip.Addr, port uint16, dir policy.Direction) bool {
	f := policy.Flow{Proto: t.proto, Src: t.src, Dst: server, Port: port, Direction: dir}
	if d.at != nil {
		f.Network = d.at.ID
	}
	var action policy.Action
	action, d.rule = s.policy.Match(&f)
	switch action {
	case policy.Drop:
		d.do, d.reason = actDrop, dropPolicy
	case policy.Reject:
		d.do, d.reason, d.answer = actReject, dropPolicy, ipkt.Prohibited
	}
	return action == policy.Accept
}

// checkVPC applies the rules for addresses of packets from the VPC side.
func (s *netSet) checkVPC(src, dst netip.Addr) drop {
	switch {
	case s.isOwn(src):
		return dropSpoofed
	case !forwardable(dst) || s.isBroadcast(dst):
		return dropForbidden
	case !forwardable(src) || s.isBroadcast(src):
		return dropSource
	case len(s.vpc.Sources) > 0 && !contains(s.vpc.Sources, src):
		return dropSource
	}
	if h := s.fromVPC(src); h.by != nil || h.at != nil && len(s.vpc.Sources) == 0 {
		return dropSpoofed
	}
	return 0
}

// checkOverlay does so for the overlay side: a source must be one that we would
// send to over the same network (RFC 3704), and none that the VPC takes for its own.
func (s *netSet) checkOverlay(at *attachment, src, dst netip.Addr) drop {
	seen, _ := s.seen(at, src)
	switch {
	case at.isOwn(src) || s.isOwn(seen) || s.standsFor(at, src):
		return dropSpoofed
	case !forwardable(dst) || at.isBroadcast(dst) || s.isBroadcast(dst):
		return dropForbidden
	case !forwardable(src) || at.isBroadcast(src) || s.isBroadcast(seen):
		return dropSource
	}
	if h := s.fromVPC(seen); h.at != at || h.addr != src || s.inSources(seen) {
		return dropSpoofed
	}
	return 0
}

// decide judges a tuple from a side.
func (e *Engine) decide(s *netSet, side Side, at *attachment, t *tuple) decision {
	if side == VPCSide {
		return e.decideVPC(s, t)
	}
	return e.decideOverlay(s, at, t)
}

// tupleOf returns the tuple of a packet.
func tupleOf(v *ipkt.View) tuple {
	return tuple{proto: v.Proto, src: v.Source(), dst: v.Destination(), sport: v.SPort, dport: v.DPort}
}

// judge judges a flow as if it were opened now, and reports whether it would be the
// same one.
func (e *Engine) judge(s *netSet, f *nat.Flow) (d decision, same bool) {
	if int(f.Slot) >= len(s.slots) {
		return d, false
	}
	at := s.slots[f.Slot]
	if at == nil && (f.From() == OverlaySide || f.To() == OverlaySide) {
		return d, false
	}
	t := tuple{f.Proto(), ipkt.Addr(f.Client()), ipkt.Addr(f.Target()), f.ClientPort(), f.TargetPort()}
	d = e.decide(s, f.From(), at, &t)
	switch {
	case d.do != actOpen, d.flow.To != f.To(), d.flow.Slot != f.Slot,
		d.flow.Source != nat.Keep != f.Translated(), f.Translated() && !d.mayBeBehind(ipkt.Addr(f.External())),
		d.flow.Source == nat.Map && d.flow.Port != 0 && d.flow.Port != f.ExtPort(),
		ipkt.Bytes(d.server) != f.Server(), d.flow.ServerPort != 0 && d.flow.ServerPort != f.ServerPort():
		return d, false
	}
	return d, true
}

// stillAllowed judges a flow again after policy, routes or translation changed.
func (e *Engine) stillAllowed(s *netSet, f *nat.Flow) bool {
	_, same := e.judge(s, f)
	if same {
		f.Generation.Store(s.generation)
	}
	return same
}
