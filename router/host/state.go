package host

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/router/plan"
)

// Table reads the state of the host, in the network namespace of the thread that
// opened it.
type Table struct{ nl Netlink }

// OpenTable opens a table; Close frees it.
func OpenTable() (*Table, error) {
	nl, err := openNetlink()
	if err != nil {
		return nil, err
	}
	return OpenTableOf(nl), nil
}

// OpenTableOf is [OpenTable] for another kernel; the table closes nl.
func OpenTableOf(nl Netlink) *Table { return &Table{nl} }

// Close frees the table.
func (t *Table) Close() { t.nl.Close() }

// State reads what judgements about addresses depend on, without what is ours: the
// interfaces of ours and the guards behind their routes.
func (t *Table) State(ours ...*Link) (*plan.Host, error) {
	var names []string
	var indexes []int
	for _, k := range ours {
		names, indexes = append(names, k.name), append(indexes, k.l.Attrs().Index)
	}
	return t.state(names, indexes)
}

// StateBehind is [Table.State] where nothing is ours but the guards of a name.
func (t *Table) StateBehind(name string) (*plan.Host, error) { return t.state([]string{name}, nil) }

func (t *Table) state(guards []string, ours []int) (*plan.Host, error) {
	routes, err := t.nl.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	addrs, err := t.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	links, err := t.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	own := func(index int) bool {
		return index != 0 && slices.Contains(ours, index)
	}
	guard := func(r *netlink.Route) bool {
		return r.Protocol == routeProtocol && r.Type == unix.RTN_BLACKHOLE &&
			slices.ContainsFunc(guards, func(name string) bool { return metricOf(name) == r.Priority })
	}
	out := &plan.Host{}
	for _, r := range routes {
		hops := nextHops(&r)
		for _, h := range hops {
			if !own(h.index) && h.via.IsValid() && !slices.Contains(out.Underlay, h.via) {
				out.Underlay = append(out.Underlay, h.via)
			}
		}
		p := prefixOf(r.Dst)
		if !p.IsValid() || p.Bits() == 0 || own(r.LinkIndex) || guard(&r) || p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast() {
			continue
		}
		k := plan.KernelRoute{Target: p, Device: names[r.LinkIndex]}
		if len(hops) > 0 {
			k.Via = hops[0].via
			if k.Device == "" {
				k.Device = names[hops[0].index]
			}
		}
		if k.Device == "" {
			k.Device = "no interface" // blackhole, unreachable, prohibit
		}
		out.Routes = append(out.Routes, k)
	}
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		if !p.IsValid() || own(a.LinkIndex) || p.Addr().IsLinkLocalUnicast() || p.Addr().IsLoopback() {
			continue
		}
		out.Addresses = append(out.Addresses, plan.HostAddress{Addr: p.Addr(), Device: names[a.LinkIndex]})
	}
	return out, nil
}

type nextHop struct {
	via   netip.Addr // invalid = attached
	index int        // of the interface
}

func nextHops(r *netlink.Route) []nextHop {
	hop := func(gw []byte, via netlink.Destination, index int) nextHop {
		a, ok := netip.AddrFromSlice(gw)
		if v, isVia := via.(*netlink.Via); !ok && isVia { // of the other family
			a, ok = netip.AddrFromSlice(v.Addr)
		}
		if !ok || a.IsUnspecified() {
			return nextHop{index: index}
		}
		return nextHop{a.Unmap(), index}
	}
	if len(r.MultiPath) == 0 {
		return []nextHop{hop(r.Gw, r.Via, r.LinkIndex)}
	}
	var out []nextHop
	for _, n := range r.MultiPath {
		out = append(out, hop(n.Gw, n.Via, n.LinkIndex))
	}
	return out
}
