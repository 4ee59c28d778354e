package portmap

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"ztgate/internal/ownnet"
)

// The routers are those of the default routes, by metric, as far as we are behind a
// NAT there. The test runs itself in a network namespace of its own.
func TestGateways(t *testing.T) { ownnet.Run(t, gateways) }

func gateways(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	expectGateways := func(what string, want ...Gateway) {
		t.Helper()
		got, err := Gateways()
		must(err)
		expect(t, what, append([]Gateway{}, got...), append([]Gateway{}, want...))
	}
	expectGateways("no route")
	links := map[string]int{}
	for name, addresses := range map[string][]string{
		"home":   {"10.1.2.3/24", "192.168.1.6/24", "192.168.1.7/24"},
		"mobile": {"192.168.43.9/24"},
		"public": {"44.1.2.3/24"},
	} {
		must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}))
		l, err := netlink.LinkByName(name)
		must(err)
		links[name] = l.Attrs().Index
		must(netlink.LinkSetUp(l))
		for _, s := range addresses {
			a, err := netlink.ParseAddr(s)
			must(err)
			must(netlink.AddrAdd(l, a))
		}
	}
	route := func(dst, via, link, src string, metric int) {
		t.Helper()
		_, prefix, err := net.ParseCIDR(dst)
		must(err)
		must(netlink.RouteAdd(&netlink.Route{Dst: prefix, Gw: net.ParseIP(via), LinkIndex: links[link], Src: net.ParseIP(src), Priority: metric}))
	}
	route("10.0.0.0/8", "192.168.1.2", "home", "", 1) // not a default route
	route("0.0.0.0/0", "44.1.2.1", "public", "", 5)   // not behind a NAT
	route("0.0.0.0/0", "192.168.1.1", "home", "192.168.1.7", 200)
	expectGateways("one", home)
	route("0.0.0.0/0", "192.168.43.1", "mobile", "", 100)
	expectGateways("two", mobile, home)
	other := Gateway{netip.MustParseAddr("192.168.1.9"), netip.MustParseAddr("192.168.1.6")}
	route("0.0.0.0/0", "192.168.1.9", "home", "", 300) // the first of our addresses in its network
	expectGateways("three", mobile, home, other)
}
