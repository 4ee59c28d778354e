package portmap

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/zerotier/packet"
)

// Gateways lists the routers of the default routes behind which we have an address
// that is not public, by metric.
func Gateways() ([]Gateway, error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	var out []Gateway
	add := func(link int, via, src net.IP) {
		gw, ok := netip.AddrFromSlice(via)
		if !ok || !gw.Unmap().Is4() || len(out) == maxGateways {
			return
		}
		g := Gateway{Addr: gw.Unmap()}
		if g.Local = localAddress(link, g.Addr, src); g.Local.IsValid() && packet.ScopeOf(g.Local) != packet.ScopeGlobal {
			out = append(out, g)
		}
	}
	for _, r := range routes {
		if r.Dst != nil && !(r.Dst.IP.IsUnspecified() && isAll(r.Dst.Mask)) {
			continue
		}
		add(r.LinkIndex, r.Gw, r.Src)
		for _, hop := range r.MultiPath {
			add(hop.LinkIndex, hop.Gw, r.Src)
		}
	}
	return out, nil
}

func isAll(m net.IPMask) bool {
	ones, _ := m.Size()
	return ones == 0
}

// localAddress returns the address with which an interface talks to a gateway: that
// of the route, else the first in the gateway's network, else the first.
func localAddress(link int, gw netip.Addr, src net.IP) (out netip.Addr) {
	if a, ok := netip.AddrFromSlice(src); ok {
		return a.Unmap()
	}
	l, err := netlink.LinkByIndex(link)
	if err != nil {
		return out
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return out
	}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		if ones, _ := a.Mask.Size(); netip.PrefixFrom(ip, ones).Masked().Contains(gw) {
			return ip
		}
		if !out.IsValid() {
			out = ip
		}
	}
	return out
}
