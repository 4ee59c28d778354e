package gateway

import (
	"fmt"
	"net/netip"
	"slices"

	"ztgate/router/config"
	"ztgate/router/host"
	"ztgate/zerotier/ztnode"
)

// wantedRoutes returns what is reachable through a network: its own subnets and
// those managed routes that the operator allows. Routes through our own
// address are for the other members: here they would lead packets for the VPC
// back into the overlay.
func wantedRoutes(n ztnode.Network, nc config.NetworkConfig) []ztnode.Route {
	if n.Status != ztnode.StatusOK {
		return nil
	}
	own := func(a netip.Addr) bool {
		return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
	}
	var out []ztnode.Route
	add := func(r ztnode.Route) {
		r.Target = r.Target.Masked()
		if !slices.ContainsFunc(out, func(o ztnode.Route) bool { return o.Target == r.Target }) {
			out = append(out, r)
		}
	}
	for _, p := range allowedAddresses(n, nc) {
		if !p.IsSingleIP() {
			add(ztnode.Route{Target: p})
		}
	}
	for _, r := range n.Routes {
		switch {
		case !r.Target.IsValid() || r.Via.IsValid() && own(r.Via):
		case r.Target.Bits() == 0:
		case global(r.Target.Addr()) && !nc.AllowGlobal:
		default:
			add(r)
		}
	}
	return out
}

// allowedAddresses drops addresses of public IP space unless allowed.
func allowedAddresses(n ztnode.Network, nc config.NetworkConfig) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(n.Addresses), func(p netip.Prefix) bool {
		return global(p.Addr()) && !nc.AllowGlobal
	})
}

// refusedRoutes says which managed routes the operator's settings keep out.
func refusedRoutes(n ztnode.Network, nc config.NetworkConfig) []string {
	var out []string
	for _, r := range n.Routes {
		switch {
		case r.Target.Bits() == 0:
			out = append(out, fmt.Sprintf("managed default route %s is ignored: route single prefixes through the network", r.Target))
		case global(r.Target.Addr()) && !nc.AllowGlobal:
			out = append(out, fmt.Sprintf("managed route %s of public IP space is ignored: set allow_global for the network to use it", r.Target))
		}
	}
	return out
}

// notGlobal is the private space of chapter 01 §6.3.
var notGlobal = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fe80::/10"),
}

// pseudoPrivate are the first bytes of IPv4 space that is allotted but used
// privately by many (chapter 01 §6.3).
var pseudoPrivate = []byte{6, 11, 21, 22, 25, 26, 28, 29, 30, 51, 55, 56}

func global(a netip.Addr) bool {
	a = a.Unmap()
	if slices.ContainsFunc(notGlobal, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return false
	}
	if a.Is4() {
		first := a.As4()[0]
		return !slices.Contains(pseudoPrivate, first) && (first < 240 || first > 254)
	}
	return true
}

// conflict says why a route is dangerous or useless.
type conflict struct {
	fatal bool // the route must not be installed
	text  string
}

// conflicts compares a route into the overlay with where the VPC is and with
// what the kernel already has.
func conflicts(target netip.Prefix, sources []netip.Prefix, kernel []host.KernelRoute, tun string) []conflict {
	var out []conflict
	for _, src := range sources {
		switch {
		case !target.Overlaps(src):
		case target.Bits() <= src.Bits():
			out = append(out, conflict{true, fmt.Sprintf(
				"route %s covers the VPC's own %s and is not installed: answers to the VPC would go into the overlay; give the network another subnet, or narrow the managed route", target, src)})
		default:
			out = append(out, conflict{false, fmt.Sprintf(
				"route %s lies inside the VPC's own %s: that part of the VPC can't be reached from this host; give one of them another subnet", target, src)})
		}
	}
	for _, k := range kernel {
		switch {
		case k.Target.Bits() == 0 || !target.Overlaps(k.Target) || k.Device == tun:
		case target == k.Target:
			out = append(out, conflict{true, fmt.Sprintf(
				"route %s is not installed: the kernel already has it on %s; remove that route (another ZeroTier on this host?) or narrow the managed one", target, k.Device)})
		case target.Bits() < k.Target.Bits():
			out = append(out, conflict{false, fmt.Sprintf(
				"route %s overlaps the kernel's more specific %s on %s: packets to the latter don't reach the overlay; remove that route or change the managed one", target, k.Target, k.Device)})
		}
	}
	return out
}
