package host

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/nettest"
	"ztgate/router/host/tuntap"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// openLinks makes interfaces that are up.
func openLinks(t *testing.T, names ...string) (out []*Link) {
	t.Helper()
	for _, name := range names {
		dev, err := tuntap.OpenTUN(name, tuntap.Writev)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = dev.Close() })
		k, err := OpenLink(name, discard)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(k.Undo)
		if err := k.Up(1500); err != nil {
			t.Fatal(err)
		}
		out = append(out, k)
	}
	return out
}

// told is what a table says, as text.
type told struct{ Routes, Addresses, Underlay []string }

func tell(h *plan.Host) (out told) {
	for _, r := range h.Routes {
		s := r.Target.String()
		if r.Via.IsValid() {
			s += " via " + r.Via.String()
		}
		out.Routes = append(out.Routes, s+" on "+r.Device)
	}
	for _, a := range h.Addresses {
		out.Addresses = append(out.Addresses, a.Addr.String()+" on "+a.Device)
	}
	for _, a := range h.Underlay {
		out.Underlay = append(out.Underlay, a.String())
	}
	for _, list := range [][]string{out.Routes, out.Addresses, out.Underlay} {
		slices.Sort(list)
	}
	return out
}

func mustState(t *testing.T, table *Table, ours ...*Link) told {
	t.Helper()
	h, err := table.State(ours...)
	if err != nil {
		t.Fatal(err)
	}
	return tell(h)
}

// TestState: what others have is told, however it got into the kernel, and what is
// ours isn't.
func TestState(t *testing.T) {
	inNamespace(t)
	table, err := OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if got := mustState(t, table); !cmp.Equal(got, told{}) {
		t.Errorf("of an empty host: %+v", got)
	}
	links := openLinks(t, "ztgt0", "ztgt1", "ztgt2")
	ours, vpc, second := links[0], links[1], links[2]
	set := func(k *Link, addrs, routes, guards []string) {
		t.Helper()
		var r, g []ztnode.Route
		for _, p := range routes {
			r = append(r, ztnode.Route{Target: netip.MustParsePrefix(p)})
		}
		for _, p := range guards {
			g = append(g, ztnode.Route{Target: netip.MustParsePrefix(p)})
		}
		for _, err := range []error{k.SetAddresses(nettest.Prefixes(addrs...)), k.SetRoutes(r), k.Guard(g, false)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	set(ours, []string{"100.127.255.1/24", "fd00:9::1/64"}, []string{"10.0.0.0/24", "fd00:77::/64"}, []string{"10.0.0.0/24", "10.1.0.0/24"})
	set(vpc, []string{"172.31.0.1/16", "fd00:31::1/64"}, nil, nil)
	// Of another gateway on this host, with the same mark as ours.
	set(second, []string{"192.168.7.1/24"}, []string{"10.20.0.0/16"}, []string{"10.20.0.0/16", "10.21.0.0/16"})
	index := vpc.l.Attrs().Index
	for _, r := range []netlink.Route{
		{Gw: net.IPv4(172, 31, 0, 254), LinkIndex: index}, // default
		{Dst: ipNet(netip.MustParsePrefix("10.8.0.0/16")), Gw: net.IPv4(172, 31, 0, 9), LinkIndex: index},
		{Dst: ipNet(netip.MustParsePrefix("10.9.0.0/16")), LinkIndex: index, Scope: netlink.SCOPE_LINK},
		{Dst: ipNet(netip.MustParsePrefix("fd00:8::/32")), Gw: net.ParseIP("fd00:31::9"), LinkIndex: index},
		{Dst: ipNet(netip.MustParsePrefix("10.50.0.0/16")), MultiPath: []*netlink.NexthopInfo{
			{LinkIndex: index, Gw: net.IPv4(172, 31, 0, 7)}, {LinkIndex: second.l.Attrs().Index, Gw: net.IPv4(192, 168, 7, 2)}}},
		{Dst: ipNet(netip.MustParsePrefix("10.51.0.0/16")), LinkIndex: index, Via: &netlink.Via{AddrFamily: unix.AF_INET6, Addr: net.ParseIP("fd00:31::8")}},
		{Dst: ipNet(netip.MustParsePrefix("10.66.0.0/16")), Type: unix.RTN_BLACKHOLE},
		{Dst: ipNet(netip.MustParsePrefix("10.67.0.0/16")), Type: unix.RTN_UNREACHABLE},
		{Dst: ipNet(netip.MustParsePrefix("10.68.0.0/16")), Gw: net.IPv4(172, 31, 0, 99), LinkIndex: index, Table: 99}, // another table
	} {
		if err := table.nl.RouteAdd(&r); err != nil {
			t.Fatalf("%v: %v", r, err)
		}
	}
	want := told{
		Routes: []string{
			"10.20.0.0/16 on no interface", "10.20.0.0/16 on ztgt2", "10.21.0.0/16 on no interface",
			"10.50.0.0/16 via 172.31.0.7 on ztgt1", "10.51.0.0/16 via fd00:31::8 on ztgt1",
			"10.66.0.0/16 on no interface", "10.67.0.0/16 on no interface",
			"10.8.0.0/16 via 172.31.0.9 on ztgt1", "10.9.0.0/16 on ztgt1",
			"172.31.0.0/16 on ztgt1", "192.168.7.0/24 on ztgt2", "fd00:31::/64 on ztgt1", "fd00:8::/32 via fd00:31::9 on ztgt1",
		},
		Addresses: []string{"172.31.0.1 on ztgt1", "192.168.7.1 on ztgt2", "fd00:31::1 on ztgt1"},
		Underlay:  []string{"172.31.0.254", "172.31.0.7", "172.31.0.9", "192.168.7.2", "fd00:31::8", "fd00:31::9"},
	}
	if diff := cmp.Diff(want, mustState(t, table, ours)); diff != "" {
		t.Errorf("with one interface of ours (-want +got):\n%s", diff)
	}
	want.Routes = slices.DeleteFunc(want.Routes, func(s string) bool {
		return slices.Contains([]string{"10.20.0.0/16 on no interface", "10.20.0.0/16 on ztgt2", "10.21.0.0/16 on no interface", "192.168.7.0/24 on ztgt2"}, s)
	})
	want.Addresses = []string{"172.31.0.1 on ztgt1", "fd00:31::1 on ztgt1"}
	want.Underlay = slices.DeleteFunc(want.Underlay, func(s string) bool { return s == "192.168.7.2" })
	if diff := cmp.Diff(want, mustState(t, table, ours, second)); diff != "" {
		t.Errorf("with two interfaces of ours (-want +got):\n%s", diff)
	}
}
