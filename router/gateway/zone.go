package gateway

import (
	"net/netip"
	"slices"
	"strings"

	"ztgate/router/config"
	"ztgate/router/gateway/resolver"
	"ztgate/router/plan"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// memberLister is a controller that lists members without making JSON of them.
type memberLister interface {
	// MemberNames lists the authorised members of a network; false = it isn't one of
	// this controller's.
	MemberNames(id ztnode.NetworkID) ([]resolver.Host, bool)
}

// MemberNames implements [memberLister].
func (g goController) MemberNames(id ztnode.NetworkID) ([]resolver.Host, bool) {
	if _, ok := g.c.Network(id); !ok {
		return nil, false
	}
	var out []resolver.Host
	for _, m := range g.c.Members(id) {
		if m.Authorized {
			out = append(out, resolver.Host{ID: m.Address.String(), Name: resolver.Label(m.Name), Addresses: m.IPAssignments})
		}
	}
	return out, true
}

// neighbourLister says which hosts of a network are known.
type neighbourLister interface {
	Neighbours(nwid uint64, f func(a netip.Addr, mac [6]byte))
}

// hostNames are the networks with the names of their hosts, and their own addresses:
// what our controller knows, what the configuration says, and who answers on the
// network.
func (s *service) hostNames() (out []resolver.Network) {
	cfg, own := s.config(), s.node.Info().Address
	lister, _ := s.node.Controller().(memberLister)
	for _, n := range plan.Order(cfg, s.networks(), s.remembered.joined()) {
		net := resolver.Network{ID: n.ID.String(), Name: resolver.Label(n.Name), Made: madeAddresses(n)}
		if lister != nil {
			net.Hosts, net.All = lister.MemberNames(n.ID)
		}
		if !net.All {
			net.Hosts = s.heard(n, own)
		}
		for _, h := range cfg.DNS.Hosts {
			if h.Network == n.ID {
				net.Hosts = withHost(net.Hosts, h)
			}
		}
		for i := range net.Hosts {
			net.Hosts[i].Addresses = slices.DeleteFunc(slices.Clone(net.Hosts[i].Addresses), func(a netip.Addr) bool { return plan.Unusable(a) != "" })
		}
		out = append(out, net)
	}
	return out
}

// withHost adds a host of the configuration, which says more than the controller does.
func withHost(list []resolver.Host, h config.DNSHost) []resolver.Host {
	list = slices.DeleteFunc(list, func(x resolver.Host) bool { return x.ID == "" && x.Name == h.Name })
	for i := range list {
		if list[i].Name == h.Name {
			list[i].Name = "" // it is still known by its address
		}
	}
	return append(list, resolver.Host{Name: h.Name, Addresses: h.Addresses})
}

// heard lists the members that answer on a network, and this node itself.
func (s *service) heard(n ztnode.Network, own string) (out []resolver.Host) {
	self := resolver.Host{ID: own}
	for _, p := range n.Addresses {
		self.Addresses = append(self.Addresses, p.Addr())
	}
	byMember := map[string][]netip.Addr{}
	if s.plane != nil {
		neighbourLister(s.plane).Neighbours(uint64(n.ID), func(a netip.Addr, mac [6]byte) {
			id := ztnode.AddressOf(n.ID, mac).String()
			byMember[id] = append(byMember[id], a)
		})
	}
	for id, list := range byMember {
		if id != own {
			slices.SortFunc(list, netip.Addr.Compare)
			out = append(out, resolver.Host{ID: id, Addresses: list})
		}
	}
	slices.SortFunc(out, func(a, b resolver.Host) int { return strings.Compare(a.ID, b.ID) })
	return append(out, self)
}

// madeAddresses returns how members' addresses follow from their own in a network, nil
// if they don't: those of the kinds that we have ourselves (RFC 4193, 6PLANE).
func madeAddresses(n ztnode.Network) func(id string) []netip.Addr {
	has := func(bits int, first byte) bool {
		return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Bits() == bits && p.Addr().Is6() && p.Addr().As16()[0] == first })
	}
	rfc4193, sixPlane := has(88, 0xfd), has(40, 0xfc)
	if !rfc4193 && !sixPlane {
		return nil
	}
	return func(id string) (out []netip.Addr) {
		a, err := identity.ParseAddress(id)
		if err != nil || len(id) != 10 || a.Reserved() {
			return nil
		}
		if rfc4193 {
			out = append(out, vl2.RFC4193(vl2.NetworkID(n.ID), a).Addr())
		}
		if sixPlane {
			out = append(out, vl2.SixPlane(vl2.NetworkID(n.ID), a).Addr())
		}
		return out
	}
}

// seenByVPC returns networks with the addresses by which VPC hosts reach their hosts;
// those that they can't reach are left out.
func (p *plane) seenByVPC(list []resolver.Network) []resolver.Network {
	out := slices.Clone(list)
	for i, n := range out {
		id, _ := ztnode.ParseNetworkID(n.ID) // it was made of one
		seen := func(list []netip.Addr) (out []netip.Addr) {
			for _, a := range list {
				if a, ok := p.SeenByVPC(uint64(id), a); ok {
					out = append(out, a)
				}
			}
			return out
		}
		out[i].Hosts = slices.Clone(n.Hosts)
		for j, h := range out[i].Hosts {
			out[i].Hosts[j].Addresses = seen(h.Addresses)
		}
		if n.Made != nil {
			out[i].Made = func(id string) []netip.Addr { return seen(n.Made(id)) }
		}
	}
	return out
}
