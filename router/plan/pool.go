package plan

import (
	"net/netip"
	"slices"

	"ztgate/zerotier/ztnode"
)

// ownMasks finds those of nat.addresses that are ours on a network: assigned by its
// controller, or in a range that it routes to us, so that answers come here.
func (b *builder) ownMasks(n ztnode.Network, out *Network) {
	for _, a := range b.masks() {
		if slices.ContainsFunc(b.out.Networks, func(o Network) bool { return slices.Contains(o.NAT, a) }) {
			continue // of the network that was named first
		}
		switch {
		case slices.ContainsFunc(out.Addresses, func(p netip.Prefix) bool { return p.Addr() == a }):
		case !routedToUs(n, a):
			continue
		default:
			if why := b.add(out, ztnode.Route{Target: single(a)}); why != nil {
				b.refuse(n.ID, single(a), "nat.addresses "+a.String(), why)
				b.blamed = append(b.blamed, a)
				continue
			}
			out.Addresses = append(out.Addresses, single(a))
		}
		out.NAT = append(out.NAT, a)
	}
}

// routedToUs reports an address that the members of a network send to us: of all routes,
// and subnets of theirs, the longest that holds it leads through one of our addresses. A
// default route says nothing of whose an address is.
func routedToUs(n ztnode.Network, a netip.Addr) (ours bool) {
	longest := 0
	for _, p := range n.Addresses {
		if p.Contains(a) {
			longest = max(longest, p.Bits())
		}
	}
	for _, r := range n.Routes {
		if r.Target.Bits() <= longest || malformed(r) != nil || !r.Target.Contains(a) {
			continue
		}
		longest = r.Target.Bits()
		ours = slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Addr() == r.Via })
	}
	return ours
}

// masks are the single addresses of nat.addresses.
func (b *builder) masks() (out []netip.Addr) {
	for _, p := range b.cfg.NAT.Addresses {
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// strangeMasks refuses those of nat.addresses that no network has given us.
func (b *builder) strangeMasks() {
	for _, a := range b.masks() {
		if slices.Contains(b.blamed, a) || slices.ContainsFunc(b.out.Networks, func(n Network) bool { return slices.Contains(n.NAT, a) }) {
			continue
		}
		thing := "nat.addresses " + a.String()
		if why := never(single(a)); why != nil {
			why.remedy = "name another address"
			b.refuse(0, single(a), thing, fatally(why))
		} else if b.settled() {
			b.refuse(0, single(a), thing, object("assign it to this node at the network's controller, or route a range with it through this node's address",
				"no network has given it to us, so that answers to it would not come here"))
		}
	}
}
