package netstack

import (
	"net/netip"
	"slices"

	"ztgate/internal/special"
	"ztgate/netstack/internal/ipkt"
)

// What an address means depends on who says it. The VPC and a network may have the
// same ranges: then a VPC host means the VPC's hosts by its own addresses and the
// network's by their aliases, and a host of the network means the network's.

// isOwn reports an address of the gateway, as the VPC knows it.
func (s *netSet) isOwn(a netip.Addr) bool { _, ok := s.own[a]; return ok }

// isBroadcast reports a broadcast address, as the VPC knows it.
func (s *netSet) isBroadcast(a netip.Addr) bool { _, ok := s.broadcasts[a]; return ok }

// isOwn reports an address of the gateway on the network.
func (at *attachment) isOwn(a netip.Addr) bool {
	return slices.ContainsFunc(at.Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
}

// isBroadcast reports a broadcast address of the network.
func (at *attachment) isBroadcast(a netip.Addr) bool { return slices.Contains(at.casts, a) }

// onLink reports an address of the network's own subnets.
func (at *attachment) onLink(a netip.Addr) bool { return contains(at.Addresses, a) }

// standsFor reports an address by which a network knows a VPC host, so that the gateway
// answers for it there.
func (s *netSet) standsFor(at *attachment, a netip.Addr) bool {
	m, _ := s.translate(VPCSide, true, at.ID, a)
	return m != nil
}

// isServed reports an address that a forward names for clients of a side.
func (s *netSet) isServed(from Side, a netip.Addr) bool { _, ok := s.served[from][a]; return ok }

// isOwnOn and isBroadcastOn ask as a network does, or as the VPC does if at is nil.
func (s *netSet) isOwnOn(at *attachment, a netip.Addr) bool {
	if at == nil {
		return s.isOwn(a)
	}
	return at.isOwn(a)
}

func (s *netSet) isBroadcastOn(at *attachment, a netip.Addr) bool {
	if at == nil {
		return s.isBroadcast(a)
	}
	return at.isBroadcast(a)
}

// hop returns the next hop to an address on the network, invalid if it has no route.
func (at *attachment) hop(a netip.Addr) netip.Addr {
	if r := at.routes.lookup(a); r != nil {
		return r.hop(a)
	}
	return netip.Addr{}
}

// inSources reports an address that the VPC is said to have. A source of everything
// says who may send, not what the VPC has.
func (s *netSet) inSources(a netip.Addr) bool {
	return slices.ContainsFunc(s.vpc.Sources, func(p netip.Prefix) bool { return p.Bits() > 0 && p.Contains(a) })
}

// isAlias reports an address by which the VPC may know an overlay host.
func (s *netSet) isAlias(a netip.Addr) bool {
	return slices.ContainsFunc(s.maps, func(m AddressMap) bool { return m.Hosts == OverlaySide && m.Alias.Contains(a) })
}

// inVPC reports an address that lies on the VPC side, as the VPC knows it.
func (s *netSet) inVPC(a netip.Addr) bool {
	if s.inSources(a) {
		return true
	}
	if len(s.vpc.Sources) > 0 && !contains(s.vpc.Sources, a) {
		return false
	}
	return s.fromVPC(a).at == nil
}

// overlayHost is a host of a network.
type overlayHost struct {
	at   *attachment // nil = there is no such host
	addr netip.Addr  // its own
	hop  netip.Addr
	by   *AddressMap // by whose alias it was named, if it was
}

// fromVPC returns the overlay host that a VPC host means by an address. Traffic of the
// VPC keeps its own way, whatever routes networks have (RFC 4787 REQ-7): by its own
// address a host is only reached where the VPC has no such address.
func (s *netSet) fromVPC(a netip.Addr) overlayHost {
	if h := s.byAlias(a); h.by != nil {
		return h
	}
	if s.inSources(a) {
		return overlayHost{addr: a}
	}
	return s.hostBy(s.routes, a)
}

// fromGateway returns the overlay host that the gateway itself means by an address.
func (s *netSet) fromGateway(a netip.Addr) overlayHost {
	if h := s.byAlias(a); h.at != nil {
		return h
	}
	return s.hostBy(s.routes, a)
}

// byAlias returns the overlay host with an alias: one of the map's network, of any if
// it names none.
func (s *netSet) byAlias(a netip.Addr) (h overlayHost) {
	for i := range s.maps {
		m := &s.maps[i]
		if m.Hosts != OverlaySide || !m.Alias.Contains(a) {
			continue
		}
		routes := s.routes
		if m.Network != 0 {
			routes = nil
			if at := s.attachments[m.Network]; at != nil {
				routes = at.routes
			}
		}
		found := s.hostBy(routes, movePrefix(a, m.Alias, m.Real))
		if found.by = m; found.at != nil {
			return found
		}
		if h.by == nil {
			h = found
		}
	}
	return h
}

func (s *netSet) hostBy(routes routeTable, a netip.Addr) overlayHost {
	h := overlayHost{addr: a}
	if r := routes.lookup(a); r != nil {
		h.at, h.hop = r.at, r.hop(a)
	}
	return h
}

// seen returns the address by which the VPC knows a host of a network.
func (s *netSet) seen(at *attachment, a netip.Addr) (netip.Addr, *AddressMap) {
	if m, alias := s.translate(OverlaySide, false, at.ID, a); m != nil {
		return alias, m
	}
	return a, nil
}

// likeVPC reports an address on a network that the VPC would take for one of its own.
func (s *netSet) likeVPC(at *attachment, a netip.Addr) bool {
	seen, _ := s.seen(at, a)
	return s.inVPC(seen)
}

// vpcAddress returns the gateway's address of a family towards the VPC: one on the
// VPC side, else one on a network, that one preferred, by its alias if it has one.
func (s *netSet) vpcAddress(prefer *attachment, v6 bool) (best netip.Addr) {
	if best = s.vpc4; v6 {
		best = s.vpc6
	}
	if best.IsValid() {
		return best
	}
	for _, at := range append([]*attachment{prefer}, s.slots...) {
		if at == nil {
			continue
		}
		a, _ := s.seen(at, at.address(v6))
		if a.IsValid() && !s.inSources(a) {
			return a
		}
		if !best.IsValid() {
			best = a // better than to send nothing
		}
	}
	return best
}

func contains(list []netip.Prefix, a netip.Addr) bool {
	for i := range list {
		if list[i].Contains(a) {
			return true
		}
	}
	return false
}

// translate looks an address up in the maps for hosts of a side: back from the
// alias to the host's own address, or the other way. It returns the map that applies,
// nil if there is none.
func (s *netSet) translate(hosts Side, back bool, network uint64, a netip.Addr) (*AddressMap, netip.Addr) {
	for i := range s.maps {
		m := &s.maps[i]
		if m.Hosts != hosts || m.Network != 0 && m.Network != network {
			continue
		}
		from, to := m.Real, m.Alias
		if back {
			from, to = to, from
		}
		if from.Contains(a) {
			return m, movePrefix(a, from, to)
		}
	}
	return nil, a
}

// aliases lists the prefixes under which others know VPC hosts on a network.
func (s *netSet) aliases(network uint64) (out []netip.Prefix) {
	for _, m := range s.maps {
		if m.Hosts == VPCSide && (m.Network == 0 || m.Network == network) {
			out = append(out, m.Alias)
		}
	}
	return out
}

// movePrefix replaces the prefix of an address. In IPv6 a word of the rest is
// changed so that the ones' complement sum stays what it was (RFC 6296 §3.1 for
// prefixes up to /48, §3.2 for longer ones). Single addresses have no rest.
func movePrefix(a netip.Addr, from, to netip.Prefix) netip.Addr {
	if a.Is4() {
		x, p := a.As4(), to.Masked().Addr().As4()
		replaceBits(x[:], p[:], to.Bits())
		return netip.AddrFrom4(x)
	}
	x, old, p := a.As16(), from.Masked().Addr().As16(), to.Masked().Addr().As16()
	replaceBits(x[:], p[:], to.Bits())
	word := -1
	switch {
	case to.Bits() <= 48:
		word = 6
	case to.Bits() <= 112:
		for word = 8; word < 14 && x[word] == 0xff && x[word+1] == 0xff; word += 2 {
		}
		for word*8 < to.Bits() {
			word += 2
		}
	}
	if word < 0 {
		return netip.AddrFrom16(x)
	}
	// The change of the prefix is taken off again.
	delta := ^ipkt.Delta(old[:], p[:])
	sum := uint32(x[word])<<8 | uint32(x[word+1])
	sum += uint32(delta)
	sum = sum&0xffff + sum>>16
	if sum == 0xffff {
		sum = 0
	}
	x[word], x[word+1] = byte(sum>>8), byte(sum)
	return netip.AddrFrom16(x)
}

func replaceBits(x, prefix []byte, n int) {
	for i := range x {
		switch {
		case n >= 8:
			x[i] = prefix[i]
		case n > 0:
			m := byte(0xff) << (8 - n)
			x[i] = prefix[i]&m | x[i]&^m
		}
		n = max(n-8, 0)
	}
}

// forwardable reports addresses that a router may forward from or to: link-local
// ones and the metadata services of clouds are not among them.
func forwardable(a netip.Addr) bool {
	if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Is4In6() || special.IsMetadata(a) {
		return false
	}
	if a.Is4() {
		b := a.As4()
		return b[0] != 0 && b[0] < 240
	}
	return true
}
