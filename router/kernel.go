package router

import (
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks our routes in the kernel, so that what a killed process
// left is recognised (unassigned in rt_protos, "zt").
const routeProtocol netlink.RouteProtocol = 0x7a

// link is an interface in the kernel with the addresses and routes we gave it.
type link struct {
	nl      *netlink.Handle
	l       netlink.Link
	name    string
	log     *slog.Logger
	addrs   []netip.Prefix
	ownsMAC bool // a TAP, with on-link neighbours
	failed  bool // guards stay behind: somebody will start us again
	down    bool // as last seen
}

// openLink takes hold of an interface of the calling thread's network
// namespace, and removes what an earlier process left on it.
func openLink(name string, log *slog.Logger) (*link, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	l, err := nl.LinkByName(name)
	if err != nil {
		nl.Close()
		return nil, fmt.Errorf("find interface %q: %w", name, err)
	}
	k := &link{nl: nl, l: l, name: name, log: log}
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

// quiet keeps the kernel from chattering into the interface by itself, and
// accepts what comes from networks without a route back.
func (k *link) quiet() {
	for path, value := range map[string]string{
		"ipv6/conf/" + k.name + "/addr_gen_mode": "1",
		"ipv6/conf/" + k.name + "/accept_ra":     "0",
		"ipv4/conf/" + k.name + "/rp_filter":     "2",
	} {
		// Read-only in many containers; then it stays as it is and check warns.
		if err := os.WriteFile(filepath.Join(sysctlRoot, path), []byte(value), 0); err != nil {
			k.log.Debug("sysctl not set", "key", path, "error", err)
		}
	}
}

func (k *link) up(mtu int) error {
	if err := k.nl.LinkSetMTU(k.l, mtu); err != nil {
		return fmt.Errorf("set MTU of %q to %d: %w", k.name, mtu, err)
	}
	if err := k.nl.LinkSetUp(k.l); err != nil {
		return fmt.Errorf("set interface %q up: %w", k.name, err)
	}
	return nil
}

// toggled reports that somebody set the interface up or down since the last call.
// The kernel forgets our routes when it goes down.
func (k *link) toggled() bool {
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

// setAddresses makes the interface have exactly these addresses, besides
// link-local ones.
func (k *link) setAddresses(want []netip.Prefix) error {
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
func (k *link) ownRoutes() ([]netlink.Route, error) {
	f := &netlink.Route{LinkIndex: k.l.Attrs().Index, Protocol: routeProtocol}
	list, err := k.nl.RouteListFiltered(netlink.FAMILY_ALL, f, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes of %q: %w", k.name, err)
	}
	return list, nil
}

// others lists the unicast routes of the main table that are not ours.
func (k *link) others() ([]kernelRoute, error) {
	list, err := k.nl.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	names := map[int]string{}
	if links, err := k.nl.LinkList(); err == nil {
		for _, l := range links {
			names[l.Attrs().Index] = l.Attrs().Name
		}
	}
	var out []kernelRoute
	for _, r := range list {
		p := prefixOf(r.Dst)
		if !p.IsValid() || r.Protocol == routeProtocol || r.LinkIndex == k.l.Attrs().Index || p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast() {
			continue
		}
		device := names[r.LinkIndex]
		if device == "" {
			device = "another interface"
		}
		out = append(out, kernelRoute{p, device})
	}
	return out, nil
}

// setRoutes makes our routes on the interface exactly these. A default route is
// left out: it would swallow the node's own datagrams. Whoever wants it for VPC
// traffic adds a rule of policy routing.
func (k *link) setRoutes(want []Route) error {
	have, err := k.ownRoutes()
	if err != nil {
		return err
	}
	want = slices.DeleteFunc(slices.Clone(want), func(r Route) bool { return r.Target.Bits() == 0 })
	var errs []error
	var present []Route
	for _, r := range have {
		got := Route{Target: prefixOf(r.Dst)}
		if k.ownsMAC {
			if a, ok := netip.AddrFromSlice(r.Gw); ok {
				got.Via = a.Unmap()
			}
		}
		if slices.ContainsFunc(want, func(w Route) bool { return k.asInstalled(w) == got }) {
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

// guardMetric makes guards the last resort among routes to the same target. The
// interface's name is in its lower bits, since guards belong to no interface.
const guardMetric = 0x7a000000

func (k *link) guardMetric() int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(k.name))
	return guardMetric | int(h.Sum32()&0xffffff)
}

// guards lists the routes that [link.guard] set, also those of an earlier process.
func (k *link) guards() ([]netlink.Route, error) {
	f := &netlink.Route{Protocol: routeProtocol, Type: unix.RTN_BLACKHOLE}
	list, err := k.nl.RouteListFiltered(netlink.FAMILY_ALL, f, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
	if err != nil {
		return nil, fmt.Errorf("list guard routes: %w", err)
	}
	metric := k.guardMetric()
	return slices.DeleteFunc(list, func(r netlink.Route) bool { return r.Priority != metric }), nil
}

// guard makes the kernel discard packets to targets for as long as they have no
// other route: while the network is down, and after this process was killed or
// failed, they would follow the default route with the clients' own addresses, or be answered
// by this host as unreachable. With keep, targets from before stay too.
func (k *link) guard(targets []Route, keep bool) error {
	have, err := k.guards()
	if err != nil {
		return err
	}
	var errs []error
	present := map[netip.Prefix]bool{}
	for _, r := range have {
		target := prefixOf(r.Dst)
		if keep || slices.ContainsFunc(targets, func(t Route) bool { return t.Target == target }) {
			present[target] = true
			continue
		}
		if err := k.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove guard of %s: %w", target, err))
		}
	}
	for _, t := range targets {
		if present[t.Target] || t.Target.Bits() == 0 {
			continue
		}
		present[t.Target] = true
		r := &netlink.Route{Dst: ipNet(t.Target), Protocol: routeProtocol, Type: unix.RTN_BLACKHOLE, Priority: k.guardMetric()}
		if err := k.nl.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add guard of %s: %w%s", t.Target, err, ipv6Hint(t.Target, err)))
		}
	}
	return errors.Join(errs...)
}

// asInstalled returns what the kernel keeps of a route: on a TUN there are no
// neighbours, and the forwarding plane resolves gateways itself.
func (k *link) asInstalled(r Route) Route {
	if !k.ownsMAC {
		r.Via = netip.Addr{}
	}
	return r
}

func (k *link) route(r Route) *netlink.Route {
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

// undo removes our routes and addresses; the interface may be gone already.
func (k *link) undo() {
	if !k.failed {
		if err := k.guard(nil, false); err != nil {
			k.log.Warn("clean up guard routes", "error", err)
		}
	}
	if _, err := k.nl.LinkByName(k.name); err == nil {
		if err := errors.Join(k.setRoutes(nil), k.setAddresses(nil)); err != nil {
			k.log.Warn("clean up interface", "interface", k.name, "error", err)
		}
	}
	k.nl.Close()
}

var sysctlRoot = "/proc/sys/net"

func sysctl(key string) string {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, key))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// checkHost looks for host settings that keep a gateway from working.
func checkHost(vpc VPCConfig) []Check {
	tun := vpc.TUN
	var out []Check
	add := func(name string, ok bool, reason string) { out = append(out, Check{name, ok, reason}) }
	add("ip_forward", sysctl("ipv4/ip_forward") != "0",
		"net.ipv4.ip_forward is 0: the kernel won't pass VPC packets on to "+tun+"; run: sysctl -w net.ipv4.ip_forward=1")
	if slices.ContainsFunc(vpc.Sources, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		add("ipv6_forward", sysctl("ipv6/conf/all/forwarding") != "0",
			"net.ipv6.conf.all.forwarding is 0: the kernel won't pass IPv6 packets of the VPC on to "+tun+"; run: sysctl -w net.ipv6.conf.all.forwarding=1")
	}
	strict := func(name string) bool {
		// The kernel uses the larger of the two; 1 is strict, 2 loose.
		return max(sysctl("ipv4/conf/all/rp_filter"), sysctl("ipv4/conf/"+name+"/rp_filter")) == "1"
	}
	add("rp_filter", !strict(tun),
		"net.ipv4.conf."+tun+".rp_filter is strict: errors from routers inside the office get lost; run: sysctl -w net.ipv4.conf."+tun+".rp_filter=2")
	for _, name := range vpc.Interfaces {
		_, err := net.InterfaceByName(name)
		add("interface_"+name, err == nil, "interface "+name+" of vpc.interfaces doesn't exist: correct the name")
	}
	return out
}

// quietMember keeps routers on the network from configuring this host.
func (k *link) quietMember() {
	path := filepath.Join(sysctlRoot, "ipv6/conf/"+k.name+"/accept_ra")
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		k.log.Debug("sysctl not set", "key", path, "error", err)
	}
}

// neighbour returns the MAC of a neighbour that the kernel knows.
func (k *link) neighbour(a netip.Addr) (mac MAC, ok bool) {
	list, err := k.nl.NeighList(k.l.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return mac, false
	}
	for _, n := range list {
		if ip, isIP := netip.AddrFromSlice(n.IP); isIP && ip.Unmap() == a && len(n.HardwareAddr) == len(mac) {
			return MAC(n.HardwareAddr), true
		}
	}
	return mac, false
}

// groups lists the multicast groups that the kernel has joined on the interface.
func (k *link) groups() []Group {
	b, err := os.ReadFile("/proc/thread-self/net/dev_mcast")
	if err != nil {
		return nil
	}
	return parseGroups(string(b), k.name)
}

// parseGroups reads /proc/net/dev_mcast: index, name, users, global use, address.
func parseGroups(text, device string) []Group {
	var out []Group
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 5 || f[1] != device || len(f[4]) != 12 || len(out) >= maxGroups {
			continue
		}
		var mac MAC
		if _, err := hex.Decode(mac[:], []byte(f[4])); err == nil {
			out = append(out, Group{MAC: mac})
		}
	}
	return out
}

// maxGroups bounds the subscriptions of an interface.
const maxGroups = 1024
