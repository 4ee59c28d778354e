package controller

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

const (
	poolTrials  = 1000
	embedMember = 1<<40 - 1 // IPv6 pools at least so wide hold the member's address
)

// assign returns a member's addresses and adds new ones from pools to its record
// (chapter 04 §5). ndp says that there is one that follows from the network's ID.
// The caller holds the lock and stores the record before anybody else gets it.
func (n *network) assign(rec *Member) (out []netip.Prefix, ndp bool) {
	net := &n.rec
	if !rec.NoAutoAssignIPs {
		if net.V6AssignMode.RFC4193 {
			out, ndp = append(out, vl2.RFC4193(net.ID, rec.Address)), true
		}
		if net.V6AssignMode.SixPlane {
			out, ndp = append(out, vl2.SixPlane(net.ID, rec.Address)), true
		}
	}
	var has4, has6 bool
	add := func(p netip.Prefix) {
		if len(out) < vl2.MaxAddresses {
			out = append(out, p)
		}
		has4, has6 = has4 || p.Addr().Is4(), has6 || !p.Addr().Is4()
	}
	for _, a := range rec.IPAssignments {
		if p, ok := net.inRoute(a); ok {
			add(p)
		}
	}
	if rec.NoAutoAssignIPs {
		return out, ndp
	}
	give := func(p netip.Prefix, ok bool) {
		if ok && len(rec.IPAssignments) < vl2.MaxAddresses {
			rec.IPAssignments = append(rec.IPAssignments, p.Addr())
			add(p)
		}
	}
	if net.V6AssignMode.ZT && !has6 {
		give(n.fromPools6(rec))
	}
	if net.V4AssignMode.ZT && !has4 {
		give(n.fromPools4(rec))
	}
	return out, ndp
}

// free reports whether no other record lists an address, authorised or not.
func (n *network) free(a netip.Addr, rec *Member) bool {
	others := n.taken[a]
	if m := n.members[rec.Address]; m != nil && slices.Contains(m.rec.IPAssignments, a) {
		others--
	}
	return others <= 0
}

func (n *network) fromPools4(rec *Member) (netip.Prefix, bool) {
	for _, p := range n.rec.IPAssignmentPools {
		if !p.Start.Is4() || !p.End.Is4() || p.End.Less(p.Start) || p.Start.IsUnspecified() {
			continue
		}
		s, e := p.Start.As4(), p.End.As4()
		start := binary.BigEndian.Uint32(s[:])
		size := binary.BigEndian.Uint32(e[:]) - start
		c := uint32(rec.Address)
		for range min(poolTrials, uint64(size)+1) {
			v := start
			if size > 0 {
				v += c % size
			}
			c++
			a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, v)))
			if v&0xff == 0xff || !n.free(a, rec) {
				continue
			}
			for _, r := range n.rec.Routes {
				if r.Target.Addr().Is4() && r.Target.Bits() > 0 && r.Target == r.Target.Masked() && r.Target.Contains(a) {
					return netip.PrefixFrom(a, r.Target.Bits()), true
				}
			}
		}
	}
	return netip.Prefix{}, false
}

func (n *network) fromPools6(rec *Member) (netip.Prefix, bool) {
	for _, p := range n.rec.IPAssignmentPools {
		if !p.Start.Is6() || !p.End.Is6() || p.End.Less(p.Start) {
			continue
		}
		for trial := range poolTrials {
			a := candidate6(p, rec.Address, trial == 0)
			if !n.free(a, rec) {
				continue
			}
			bits := 0
			for _, r := range n.rec.Routes {
				if !r.Via.IsValid() && r.Target.Contains(a) {
					bits = r.Target.Bits()
				}
			}
			if bits > 0 {
				return netip.PrefixFrom(a, bits), true
			}
		}
	}
	return netip.Prefix{}, false
}

func candidate6(p Pool, member identity.Address, first bool) netip.Addr {
	s, e := p.Start.As16(), p.End.As16()
	high, low := binary.BigEndian.Uint64(s[:]), binary.BigEndian.Uint64(s[8:])
	endHigh, endLow := binary.BigEndian.Uint64(e[:]), binary.BigEndian.Uint64(e[8:])
	if first && endLow > low && endLow-low >= embedMember {
		low += uint64(member)
	} else {
		if endHigh > high {
			high += rand.Uint64N(endHigh - high)
		}
		if endLow > low {
			low += rand.Uint64N(endLow - low)
		}
	}
	return netip.AddrFrom16([16]byte(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, high), low)))
}
