package netstack

import (
	"fmt"
	"net/netip"
	"slices"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/policy"
)

// Masquerade hides overlay hosts from the VPC side behind an address that the gateway
// has there, so that nobody needs a route back. Flows that a map gives an alias, and
// forwards that show the client's address, stay as they are; forwards that don't are shown
// the same address. It permits nothing unless it invites: the policy does.
type Masquerade struct {
	From []netip.Prefix // overlay hosts that it hides, by their own addresses; none = all
	// To are the destinations that it holds for. They are on the VPC side, also outside of
	// VPC.Sources, unless a network has a route to them.
	To      netip.Prefix
	Except  []netip.Prefix // of those, what nobody gets to
	Address netip.Addr     // that they see; invalid = there is none now, and flows are refused
	// ByHost has flows go on by sockets of the host instead, see [Host], as from any of its
	// addresses. Address is invalid then.
	ByHost bool
	// Invites says that it stands for a rule of the policy that accepts flows there with
	// direction in: the policy's other rules and its default still refuse.
	Invites bool
	// Routed leaves flows there as they are: hosts have a way back.
	Routed bool
}

// SetMasquerade replaces how overlay hosts are hidden from the VPC side; the first one
// that fits a flow counts. Flows that go on as they are stay.
func (e *Engine) SetMasquerade(list []Masquerade) error {
	if err := checkMasquerade(list); err != nil {
		return err
	}
	return e.change(func(in *settings) { in.masquerade = slices.Clone(list) })
}

func checkMasquerade(list []Masquerade) error {
	for _, m := range list {
		switch {
		case !m.To.IsValid():
			return fmt.Errorf("netstack: masquerade as %v: want destinations", m.Address)
		case m.Routed && (m.ByHost || m.Invites || m.Address.IsValid()):
			return fmt.Errorf("netstack: masquerade towards %v: want nothing else where hosts have a way back", m.To)
		case m.ByHost && m.Address.IsValid():
			return fmt.Errorf("netstack: masquerade as %v: want no address where the host's is used", m.Address)
		case m.Address.IsValid() && (m.Address.Is4() != m.To.Addr().Is4() || !forwardable(m.Address)):
			return fmt.Errorf("netstack: masquerade as %v towards %v: want an address of a host, of the same family", m.Address, m.To)
		}
	}
	return nil
}

func (m *Masquerade) equal(o *Masquerade) bool {
	return m.To == o.To && m.Address == o.Address && m.ByHost == o.ByHost && m.Invites == o.Invites && m.Routed == o.Routed &&
		slices.Equal(m.From, o.From) && slices.Equal(m.Except, o.Except)
}

// hides returns what hides an overlay host from a destination, nil if nothing does.
func (s *netSet) hides(src, dst netip.Addr) *Masquerade {
	for i := range s.masquerade {
		m := &s.masquerade[i]
		if m.To.Contains(dst) && (len(m.From) == 0 || contains(m.From, src)) {
			if m.Routed {
				return nil
			}
			return m
		}
	}
	return nil
}

// comesBack reports an address by which the VPC reaches overlay hosts: what our own host
// sends there comes to us as if a VPC host had sent it.
func (s *netSet) comesBack(a netip.Addr) bool { return s.isServed(VPCSide, a) || s.isAlias(a) }

// isBehind reports an address that overlay hosts are masqueraded as.
func (s *netSet) isBehind(a netip.Addr) bool {
	return slices.ContainsFunc(s.masquerade, func(m Masquerade) bool { return m.Address == a })
}

// isBeyond reports a destination that only a masquerade puts on the VPC side.
func (s *netSet) isBeyond(a netip.Addr) bool {
	return slices.ContainsFunc(s.masquerade, func(m Masquerade) bool { return m.To.Contains(a) }) && s.fromVPC(a).at == nil
}

// sourceToVPC says how an overlay host appears on the VPC side; by is what hides it, nil
// if nothing does.
func (s *netSet) sourceToVPC(at *attachment, t *tuple, d decision, by *Masquerade) decision {
	if a, m := s.seen(at, t.src); m != nil {
		switch out := by != nil && by.Invites; { // by the exit, where nobody knows the alias
		case !out:
			d.source, d.flow.Source, d.flow.Address = m, nat.Map, ipkt.Bytes(a)
			return d
		case by.ByHost: // which doesn't tell networks apart
			return tellWith(dropNoAddress, ipkt.NoRoute)
		}
	}
	switch {
	case d.forward != nil && !d.forward.Masquerade:
	case by != nil && by.ByHost:
		d.do = actHost
	case d.forward != nil && (by == nil || !by.Address.IsValid()):
		d.flow.Source, d.flow.Address = nat.Masquerade, ipkt.Bytes(s.vpcAddress(at, t.src.Is6()))
	case by == nil:
	case !by.Address.IsValid():
		return tellWith(dropNoAddress, ipkt.NoRoute)
	default:
		d.hidden = d.forward == nil
		d.flow.Source, d.flow.Address = nat.Masquerade, ipkt.Bytes(by.Address)
	}
	return d
}

// toMapping judges a packet of the VPC side to an address that overlay hosts are
// masqueraded as. Ports that nobody uses are silent, as on the overlay.
func (e *Engine) toMapping(s *netSet, t *tuple, d decision) decision {
	if e.table.Filter(t.proto) != nat.EndpointIndependent {
		return refuseWith(dropNoFlow)
	}
	host, port, slot, ok := e.table.Owner(ipkt.Bytes(t.dst), t.proto, t.dport)
	if !ok || int(slot) >= len(s.slots) || s.slots[slot] == nil {
		return refuseWith(dropNoFlow)
	}
	d.at, d.server = s.slots[slot], ipkt.Addr(host)
	if d.hop = d.at.hop(d.server); !d.hop.IsValid() {
		return refuseWith(dropNoFlow)
	}
	d.flow = nat.NewFlow{Slot: slot, To: OverlaySide, Server: host, ServerPort: port}
	s.allow(&d, t, d.server, port, policy.Out)
	return d
}
