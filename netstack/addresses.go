package netstack

import (
	"net/netip"

	"ztgate/internal/special"
	"ztgate/netstack/internal/ipkt"
)

func (s *netSet) isOwn(a netip.Addr) bool       { _, ok := s.own[a]; return ok }
func (s *netSet) isBroadcast(a netip.Addr) bool { _, ok := s.broadcasts[a]; return ok }

// owner returns the network on which an address is ours, nil for the VPC side.
func (s *netSet) owner(a netip.Addr) *attachment {
	for _, at := range s.attachments {
		for _, x := range at.Addresses {
			if x.Addr() == a {
				return at
			}
		}
	}
	return nil
}

// translate looks an address up in the maps for hosts of a side: back from the
// alias to the host's own address, or the other way.
func (s *netSet) translate(hosts Side, back bool, network uint64, a netip.Addr) (netip.Addr, bool) {
	for i := range s.maps {
		m := &s.maps[i]
		if m.Hosts != hosts || m.Network != 0 && network != 0 && m.Network != network {
			continue
		}
		from, to := m.Real, m.Alias
		if back {
			from, to = to, from
		}
		if from.Contains(a) {
			return movePrefix(a, from, to), true
		}
	}
	return netip.Addr{}, false
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

func contains(list []netip.Prefix, a netip.Addr) bool {
	for i := range list {
		if list[i].Contains(a) {
			return true
		}
	}
	return false
}
