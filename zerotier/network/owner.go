package network

import (
	"net/netip"

	"ztgate/zerotier/vl2"
)

// Owns reports whether an address of a network is proven to be that of the member with
// a MAC: the controller certifies it, or it is made of the member's own address. Hosts
// behind bridges have no proofs.
func (l *Layer) Owns(id vl2.NetworkID, mac vl2.MAC, a netip.Addr) bool {
	member := vl2.AddressOf(id, mac)
	n := l.net(id)
	if n == nil || vl2.MACOf(id, member) != mac {
		return false
	}
	if vl2.MadeOf(id, member, a) {
		return true
	}
	s, m := n.snap.Load(), n.record(member)
	return s.cfg != nil && m != nil && m.Certified(s.cfg, a)
}
