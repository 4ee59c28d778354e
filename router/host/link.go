// Package host is the Linux host around a gateway: interfaces with their addresses and
// routes, settings of the kernel, neighbours. It works by netlink and calls no
// other programs.
package host

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/zerotier/ztnode"
)

// routeProtocol marks our routes in the kernel, so that what a killed process
// left is recognised (unassigned in rt_protos, "zt").
const routeProtocol netlink.RouteProtocol = 0x7a

// Link is an interface in the kernel with the addresses and routes we gave it.
type Link struct {
	nl      Netlink
	l       netlink.Link
	name    string
	log     *slog.Logger
	addrs   []netip.Prefix
	ownsMAC bool // a TAP, with on-link neighbours
	Failed  bool // guards stay behind: somebody will start us again
	down    bool // as last seen
}

// OpenLink takes hold of an interface of the calling thread's network
// namespace, and removes what an earlier process left on it.
func OpenLink(name string, log *slog.Logger) (*Link, error) {
	nl, err := openNetlink()
	if err != nil {
		return nil, err
	}
	return OpenLinkOf(nl, name, log)
}

// OpenLinkOf is [OpenLink] for another kernel; the link closes nl.
func OpenLinkOf(nl Netlink, name string, log *slog.Logger) (*Link, error) {
	l, err := nl.LinkByName(name)
	if err != nil {
		nl.Close()
		return nil, fmt.Errorf("find interface %q: %w", name, err)
	}
	k := &Link{nl: nl, l: l, name: name, log: log}
	old, err := k.ownRoutes()
	if err != nil {
		k.nl.Close()
		return nil, err
	}
	for _, r := range old {
		log.Warn("removing a route that an earlier process left", "route", r.Dst, "interface", name)
		if err := nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			k.nl.Close()
			return nil, fmt.Errorf("remove route %s: %w", r.Dst, err)
		}
	}
	return k, nil
}

// Up gives the interface an MTU, in bytes, and sets it up.
func (k *Link) Up(mtu int) error {
	if err := k.SetMTU(mtu); err != nil {
		return err
	}
	if err := k.nl.LinkSetUp(k.l); err != nil {
		return fmt.Errorf("set interface %q up: %w", k.name, err)
	}
	return nil
}

// SetMTU changes the MTU, in bytes.
func (k *Link) SetMTU(mtu int) error {
	if err := k.nl.LinkSetMTU(k.l, mtu); err != nil {
		return fmt.Errorf("set MTU of %q to %d: %w", k.name, mtu, err)
	}
	return nil
}

// MTU returns the MTU that the interface has now, in bytes.
func (k *Link) MTU() (int, error) {
	l, err := k.nl.LinkByIndex(k.l.Attrs().Index)
	if err != nil {
		return 0, fmt.Errorf("find interface %q: %w", k.name, err)
	}
	return l.Attrs().MTU, nil
}

// Toggled reports that somebody set the interface up or down since the last call.
// The kernel forgets our routes when it goes down.
func (k *Link) Toggled() bool {
	l, err := k.nl.LinkByIndex(k.l.Attrs().Index)
	if err != nil {
		return false // it is gone, which its reader notices
	}
	was := k.down
	k.down = l.Attrs().Flags&net.FlagUp == 0
	if k.down && !was {
		k.log.Warn("the interface was set down: packets from clients don't arrive; set it up again", "interface", k.name)
	}
	return k.down != was
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if a = a.Unmap(); !ok || a.BitLen() != bits {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, ones)
}

// SetAddresses makes the interface have exactly these addresses, besides
// link-local ones.
func (k *Link) SetAddresses(want []netip.Prefix) error {
	have, err := k.nl.AddrList(k.l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %q: %w", k.name, err)
	}
	var errs []error
	for _, a := range have {
		p := prefixOf(a.IPNet)
		if p.Addr().IsLinkLocalUnicast() || slices.Contains(want, p) {
			continue
		}
		if err := k.nl.AddrDel(k.l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("remove address %s from %q: %w", p, k.name, err))
		}
	}
	for _, p := range want {
		if slices.ContainsFunc(have, func(a netlink.Addr) bool { return prefixOf(a.IPNet) == p }) {
			continue // replacing it would be announced as a change
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // unusable for a second otherwise
		}
		if err := k.nl.AddrReplace(k.l, a); err != nil {
			errs = append(errs, fmt.Errorf("add address %s to %q: %w%s", p, k.name, err, ipv6Hint(p, err)))
		}
	}
	k.addrs = slices.Clone(want)
	return errors.Join(errs...)
}

func ipv6Hint(p netip.Prefix, err error) string {
	if p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
		return " (IPv6 is switched off: net.ipv6.conf.all.disable_ipv6)"
	}
	return ""
}

// ownRoutes lists the routes on the interface that carry our mark.
func (k *Link) ownRoutes() ([]netlink.Route, error) {
	f := &netlink.Route{LinkIndex: k.l.Attrs().Index, Protocol: routeProtocol}
	list, err := k.nl.RouteListFiltered(netlink.FAMILY_ALL, f, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes of %q: %w", k.name, err)
	}
	return list, nil
}

// SetRoutes makes our routes on the interface exactly these. A default route is
// left out: it would swallow the node's own datagrams. Whoever wants it for VPC
// traffic adds a rule of policy routing.
func (k *Link) SetRoutes(want []ztnode.Route) error {
	have, err := k.ownRoutes()
	if err != nil {
		return err
	}
	want = slices.DeleteFunc(slices.Clone(want), func(r ztnode.Route) bool { return r.Target.Bits() == 0 })
	var errs []error
	var present []ztnode.Route
	for _, r := range have {
		got := ztnode.Route{Target: prefixOf(r.Dst)}
		if k.ownsMAC {
			if a, ok := netip.AddrFromSlice(r.Gw); ok {
				got.Via = a.Unmap()
			}
		}
		if slices.ContainsFunc(want, func(w ztnode.Route) bool { return k.asInstalled(w) == got }) {
			present = append(present, got)
			continue
		}
		if err := k.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %s: %w", r.Dst, err))
		}
	}
	for _, w := range want {
		w = k.asInstalled(w)
		if slices.Contains(present, w) {
			continue
		}
		if err := k.nl.RouteAdd(k.route(w)); err != nil {
			errs = append(errs, fmt.Errorf("add route %s on %q: %w%s", w.Target, k.name, err, ipv6Hint(w.Target, err)))
		}
	}
	return errors.Join(errs...)
}

// asInstalled returns what the kernel keeps of a route: on a TUN there are no
// neighbours, and the forwarding plane resolves gateways itself.
func (k *Link) asInstalled(r ztnode.Route) ztnode.Route {
	if !k.ownsMAC {
		r.Via = netip.Addr{}
	}
	return r
}

func (k *Link) route(r ztnode.Route) *netlink.Route {
	out := &netlink.Route{LinkIndex: k.l.Attrs().Index, Dst: ipNet(r.Target), Protocol: routeProtocol, Priority: 0}
	if r.Via.IsValid() {
		out.Gw, out.Flags = r.Via.AsSlice(), int(netlink.FLAG_ONLINK)
	} else {
		out.Scope = netlink.SCOPE_LINK
	}
	for _, a := range k.addrs { // source of what this host itself sends
		if !k.ownsMAC && a.Addr().BitLen() == r.Target.Addr().BitLen() {
			out.Src = a.Addr().AsSlice()
			break
		}
	}
	return out
}

// Undo removes our routes and addresses; the interface may be gone already.
func (k *Link) Undo() {
	if !k.Failed {
		if err := k.Guard(nil, false); err != nil {
			k.log.Warn("clean up guard routes", "error", err)
		}
	}
	if _, err := k.nl.LinkByName(k.name); err == nil {
		if err := errors.Join(k.SetRoutes(nil), k.SetAddresses(nil)); err != nil {
			k.log.Warn("clean up interface", "interface", k.name, "error", err)
		}
	}
	k.nl.Close()
}
