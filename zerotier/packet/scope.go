package packet

import "net/netip"

// Scope is the reach of an IP address; a higher one is preferred when choosing
// between endpoints (chapter 01 §6.3).
type Scope uint8

// Scopes.
const (
	ScopeNone          Scope = 0
	ScopeMulticast     Scope = 1
	ScopeLoopback      Scope = 2
	ScopePseudoPrivate Scope = 3
	ScopeGlobal        Scope = 4
	ScopeLinkLocal     Scope = 5
	ScopeShared        Scope = 6
	ScopePrivate       Scope = 7
)

// scopes4 are the classes of IPv4 addresses that are not global. They don't overlap.
var scopes4 = [...]struct {
	prefix netip.Prefix
	scope  Scope
}{
	{netip.MustParsePrefix("0.0.0.0/8"), ScopeNone},
	{netip.MustParsePrefix("6.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("10.0.0.0/8"), ScopePrivate},
	{netip.MustParsePrefix("11.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("21.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("22.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("25.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("26.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("28.0.0.0/7"), ScopePseudoPrivate},
	{netip.MustParsePrefix("30.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("51.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("55.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("56.0.0.0/8"), ScopePseudoPrivate},
	{netip.MustParsePrefix("100.64.0.0/10"), ScopePrivate},
	{netip.MustParsePrefix("127.0.0.0/8"), ScopeLoopback},
	{netip.MustParsePrefix("169.254.0.0/16"), ScopeLinkLocal},
	{netip.MustParsePrefix("172.16.0.0/12"), ScopePrivate},
	{netip.MustParsePrefix("192.0.2.0/24"), ScopePrivate},
	{netip.MustParsePrefix("192.168.0.0/16"), ScopePrivate},
	{netip.MustParsePrefix("198.18.0.0/15"), ScopePrivate},
	{netip.MustParsePrefix("198.51.100.0/24"), ScopePrivate},
	{netip.MustParsePrefix("203.0.113.0/24"), ScopePrivate},
	{netip.MustParsePrefix("224.0.0.0/4"), ScopeMulticast},
	{netip.MustParsePrefix("255.0.0.0/8"), ScopeNone},
	{netip.MustParsePrefix("240.0.0.0/5"), ScopePseudoPrivate},
	{netip.MustParsePrefix("248.0.0.0/6"), ScopePseudoPrivate},
	{netip.MustParsePrefix("252.0.0.0/7"), ScopePseudoPrivate},
	{netip.MustParsePrefix("254.0.0.0/8"), ScopePseudoPrivate},
}

// uniqueLocal is the private space of IPv6 (RFC 4193).
var uniqueLocal = netip.MustParsePrefix("fc00::/7")

// ScopeOf classifies an address. One of IPv4 in IPv6 form is global unless it is a
// loopback address, as the reference has it.
func ScopeOf(a netip.Addr) Scope {
	switch {
	case a.Is4():
		for i := range scopes4 {
			if scopes4[i].prefix.Contains(a) {
				return scopes4[i].scope
			}
		}
		return ScopeGlobal
	case a.Is6():
		return scope6(a)
	}
	return ScopeNone
}

func scope6(a netip.Addr) Scope {
	if a.Is4In6() {
		if a.As16()[12] == 127 {
			return ScopeLoopback
		}
		return ScopeGlobal
	}
	b := a.As16()
	switch {
	case b[0] == 0xff:
		return ScopeMulticast
	case b[0] == 0xfe && b[1]&0xc0 == 0x80:
		if b == [16]byte{0: 0xfe, 1: 0x80, 15: 1} {
			return ScopeLoopback
		}
		return ScopeLinkLocal
	case uniqueLocal.Contains(a):
		return ScopePrivate
	case b == [16]byte{15: 1}:
		return ScopeLoopback
	case b == [16]byte{}:
		return ScopeNone
	}
	return ScopeGlobal
}

// Private reports a prefix of which every address is private or used as such:
// [ScopePrivate] or [ScopePseudoPrivate].
func Private(p netip.Prefix) bool {
	if !p.Addr().Is4() {
		return p.IsValid() && p.Bits() >= uniqueLocal.Bits() && uniqueLocal.Overlaps(p)
	}
	overlaps := false
	for _, s := range scopes4 {
		if s.scope != ScopePrivate && s.scope != ScopePseudoPrivate || !s.prefix.Overlaps(p) {
			continue
		}
		if s.prefix.Bits() <= p.Bits() {
			return true
		}
		overlaps = true
	}
	if !overlaps {
		return false
	}
	low, high := halves(p)
	return Private(low) && Private(high)
}

// halves cuts an IPv4 prefix of less than 32 bits in two.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	b := p.Masked().Addr().As4()
	low = netip.PrefixFrom(netip.AddrFrom4(b), p.Bits()+1)
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	return low, netip.PrefixFrom(netip.AddrFrom4(b), p.Bits()+1)
}
