// Package special knows the addresses that mean something else on every machine.
package special

import (
	"net/netip"
	"slices"
)

// metadata are where clouds serve machines their credentials. Whoever reaches one
// through the gateway is answered as the gateway is.
var metadata = [...]netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),         // link-local: AWS, Azure, GCP, Oracle and others
	netip.MustParsePrefix("fe80::/10"),              // link-local
	netip.MustParsePrefix("fd00:ec2::/32"),          // AWS: metadata, DNS, time
	netip.MustParsePrefix("fd20:ce::254/128"),       // GCP
	netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"), // Oracle
	netip.MustParsePrefix("fd00:42::42/128"),        // Scaleway
	netip.MustParsePrefix("192.0.0.192/32"),         // Oracle, classic
	netip.MustParsePrefix("168.63.129.16/32"),       // Azure: agent, DNS
	netip.MustParsePrefix("100.100.100.200/32"),     // Alibaba
}

// nat64 is the well-known prefix under which translators reach all of IPv4
// (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// Metadata returns the prefixes of the metadata services of clouds.
func Metadata() []netip.Prefix { return slices.Clone(metadata[:]) }

// IsMetadata reports an address of a metadata service, also in the forms in which
// IPv6 writes addresses of IPv4.
func IsMetadata(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if behind, ok := BehindNAT64(a); ok {
		a = behind
	}
	return slices.ContainsFunc(metadata[:], func(p netip.Prefix) bool { return p.Contains(a) })
}

// BehindNAT64 returns the IPv4 address that an address of the well-known prefix stands
// for.
func BehindNAT64(a netip.Addr) (netip.Addr, bool) {
	if !nat64.Contains(a) {
		return netip.Addr{}, false
	}
	b := a.As16()
	return netip.AddrFrom4([4]byte(b[12:])), true
}
