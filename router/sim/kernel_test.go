package sim

import (
	"cmp"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/router/host"
)

// kernel is a Linux kernel's interfaces, addresses and main table.
type kernel struct {
	links  []*netlink.Device
	addrs  map[int][]netlink.Addr // by interface
	routes []netlink.Route
}

var _ host.Netlink = (*kernel)(nil)

// Interfaces.
const (
	loIndex   = 1
	ethIndex  = 2 // to the VPC and the internet
	ethIndex2 = 3 // to something else
	tunIndex  = 4
	tunName   = "ztg0"
)

func newKernel() *kernel {
	k := &kernel{addrs: map[int][]netlink.Addr{}}
	k.addLink(loIndex, "lo", true)
	k.addLink(ethIndex, "eth0", true)
	k.addLink(ethIndex2, "eth1", true)
	return k
}

func (k *kernel) addLink(index int, name string, up bool) {
	d := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name, MTU: 1500}}
	if up {
		d.Flags = net.FlagUp
	}
	k.links = append(k.links, d)
}

// removeLink takes an interface away, with all that hangs on it.
func (k *kernel) removeLink(index int) {
	k.links = slices.DeleteFunc(k.links, func(l *netlink.Device) bool { return l.Index == index })
	k.routes = slices.DeleteFunc(k.routes, func(r netlink.Route) bool { return r.LinkIndex == index })
	delete(k.addrs, index)
}

// setLink sets an interface up or down, which forgets its routes.
func (k *kernel) setLink(index int, up bool) {
	l, err := k.byIndex(index)
	if err != nil {
		return
	}
	if l.Flags &^= net.FlagUp; up {
		l.Flags |= net.FlagUp
	} else {
		k.routes = slices.DeleteFunc(k.routes, func(r netlink.Route) bool { return r.LinkIndex == index })
	}
}

func (k *kernel) byIndex(index int) (*netlink.Device, error) {
	i := slices.IndexFunc(k.links, func(l *netlink.Device) bool { return l.Index == index })
	if i < 0 {
		return nil, unix.ENODEV
	}
	return k.links[i], nil
}

func toPrefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

func toNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// attach gives an interface an address and the route of its subnet.
func (k *kernel) attach(index int, p netip.Prefix) {
	k.addrs[index] = append(k.addrs[index], netlink.Addr{IPNet: toNet(p), LinkIndex: index})
	k.routes = append(k.routes, netlink.Route{LinkIndex: index, Dst: toNet(p.Masked()), Protocol: unix.RTPROT_KERNEL, Scope: netlink.SCOPE_LINK, Type: unix.RTN_UNICAST})
}

func (k *kernel) via(target netip.Prefix, gw netip.Addr) {
	k.routes = append(k.routes, netlink.Route{LinkIndex: ethIndex, Dst: toNet(target), Gw: gw.AsSlice(), Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST})
}

// Ways of a packet that don't go out by an interface.
const (
	wayLocal     = -1
	wayBlackhole = -2
	wayNone      = -3
)

// way is the interface that a packet goes out by: the longest match of all routes, and
// among equals the one with the smallest metric.
func (k *kernel) way(dst netip.Addr) int {
	for _, list := range k.addrs {
		for _, a := range list {
			if toPrefix(a.IPNet).Addr() == dst {
				return wayLocal
			}
		}
	}
	best, metric, found := -1, 0, wayNone
	for _, r := range k.routes {
		p := toPrefix(r.Dst)
		if !p.Contains(dst) || p.Bits() < best || p.Bits() == best && r.Priority >= metric {
			continue
		}
		best, metric, found = p.Bits(), r.Priority, r.LinkIndex
		if r.Type == unix.RTN_BLACKHOLE {
			found = wayBlackhole
		}
	}
	return found
}

// LinkByName implements [host.Netlink].
func (k *kernel) LinkByName(name string) (netlink.Link, error) {
	for _, l := range k.links {
		if l.Name == name {
			return copyLink(l), nil
		}
	}
	return nil, netlink.LinkNotFoundError{}
}

func copyLink(l *netlink.Device) netlink.Link { c := *l; return &c }

// LinkByIndex implements [host.Netlink].
func (k *kernel) LinkByIndex(index int) (netlink.Link, error) {
	l, err := k.byIndex(index)
	if err != nil {
		return nil, err
	}
	return copyLink(l), nil
}

// LinkList implements [host.Netlink].
func (k *kernel) LinkList() (out []netlink.Link, err error) {
	for _, l := range k.links {
		out = append(out, copyLink(l))
	}
	return out, nil
}

// LinkSetUp implements [host.Netlink].
func (k *kernel) LinkSetUp(l netlink.Link) error {
	k.setLink(l.Attrs().Index, true)
	return nil
}

// LinkSetMTU implements [host.Netlink].
func (k *kernel) LinkSetMTU(l netlink.Link, mtu int) error {
	own, err := k.byIndex(l.Attrs().Index)
	if err == nil {
		own.MTU = mtu
	}
	return err
}

// LinkSetHardwareAddr implements [host.Netlink].
func (k *kernel) LinkSetHardwareAddr(netlink.Link, net.HardwareAddr) error { return unix.EOPNOTSUPP }

// AddrList implements [host.Netlink].
func (k *kernel) AddrList(l netlink.Link, _ int) (out []netlink.Addr, err error) {
	for _, d := range k.links {
		if l == nil || l.Attrs().Index == d.Index {
			out = append(out, k.addrs[d.Index]...)
		}
	}
	return out, nil
}

// AddrReplace implements [host.Netlink].
func (k *kernel) AddrReplace(l netlink.Link, a *netlink.Addr) error {
	if err := k.AddrDel(l, a); err != nil {
		return err
	}
	k.addrs[l.Attrs().Index] = append(k.addrs[l.Attrs().Index], *a)
	return nil
}

// AddrDel implements [host.Netlink].
func (k *kernel) AddrDel(l netlink.Link, a *netlink.Addr) error {
	i := l.Attrs().Index
	k.addrs[i] = slices.DeleteFunc(k.addrs[i], func(b netlink.Addr) bool { return toPrefix(a.IPNet) == toPrefix(b.IPNet) })
	return nil
}

// RouteList implements [host.Netlink].
func (k *kernel) RouteList(netlink.Link, int) ([]netlink.Route, error) {
	return slices.Clone(k.routes), nil
}

// RouteListFiltered implements [host.Netlink].
func (k *kernel) RouteListFiltered(_ int, f *netlink.Route, mask uint64) (out []netlink.Route, err error) {
	for _, r := range k.routes {
		if mask&netlink.RT_FILTER_PROTOCOL != 0 && r.Protocol != f.Protocol || mask&netlink.RT_FILTER_TYPE != 0 && r.Type != f.Type ||
			mask&netlink.RT_FILTER_OIF != 0 && r.LinkIndex != f.LinkIndex {
			continue
		}
		out = append(out, r)
	}
	return out, nil
}

// RouteGetWithOptions implements [host.Netlink].
func (k *kernel) RouteGetWithOptions(dst net.IP, _ *netlink.RouteGetOptions) ([]netlink.Route, error) {
	a, _ := netip.AddrFromSlice(dst)
	switch way := k.way(a.Unmap()); way {
	case wayLocal:
		return []netlink.Route{{LinkIndex: loIndex, Type: unix.RTN_LOCAL}}, nil
	case wayBlackhole:
		return nil, unix.EINVAL
	case wayNone:
		return nil, unix.ENETUNREACH
	default:
		return []netlink.Route{{LinkIndex: way, Type: unix.RTN_UNICAST}}, nil
	}
}

// RouteAdd implements [host.Netlink].
func (k *kernel) RouteAdd(r *netlink.Route) error {
	add := *r
	if add.Type == 0 {
		add.Type = unix.RTN_UNICAST
	}
	if add.Type == unix.RTN_UNICAST {
		if l, err := k.byIndex(r.LinkIndex); err != nil || l.Flags&net.FlagUp == 0 {
			return cmp.Or(err, error(unix.ENETDOWN))
		}
	}
	for _, o := range k.routes {
		if toPrefix(o.Dst) == toPrefix(r.Dst) && o.Priority == r.Priority {
			return unix.EEXIST
		}
	}
	k.routes = append(k.routes, add)
	return nil
}

// RouteDel implements [host.Netlink].
func (k *kernel) RouteDel(r *netlink.Route) error {
	for i, o := range k.routes {
		if toPrefix(o.Dst) == toPrefix(r.Dst) && o.Priority == r.Priority && o.Protocol == r.Protocol && o.LinkIndex == r.LinkIndex && o.Type == r.Type {
			k.routes = slices.Delete(k.routes, i, i+1)
			return nil
		}
	}
	return unix.ESRCH
}

// NeighList implements [host.Netlink].
func (k *kernel) NeighList(int, int) ([]netlink.Neigh, error) { return nil, nil }

// NeighProxyList implements [host.Netlink].
func (k *kernel) NeighProxyList(int, int) ([]netlink.Neigh, error) { return nil, nil }

// NeighSet implements [host.Netlink].
func (k *kernel) NeighSet(*netlink.Neigh) error { return nil }

// NeighDel implements [host.Netlink].
func (k *kernel) NeighDel(*netlink.Neigh) error { return nil }

// Close implements [host.Netlink].
func (k *kernel) Close() {}
