package gateway_test

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/internal/nettest"
	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway/gatewaytest"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// second is a network that is named after nwid, although its ID is lower.
const second = ztnode.NetworkID(0x1111111111000002)

// secondNetwork has addresses and routes on an office of its own.
func secondNetwork(addresses, routes []string) ztnode.Network {
	n := ztnode.Network{ID: second, Name: "branch", Status: ztnode.StatusOK, Type: "PRIVATE", MAC: ztnode.MAC{2, 0, 0, 0, 0, 2}, MTU: 2800,
		Addresses: nettest.Prefixes(addresses...)}
	for _, r := range routes {
		p := netip.MustParsePrefix(r)
		via := netip.MustParseAddr("10.148.0.9")
		if p.Addr().Is6() {
			via = netip.MustParseAddr("fd00:148::9")
		}
		n.Routes = append(n.Routes, ztnode.Route{Target: p, Via: via})
	}
	return n
}

// table lists the kernel's main table.
func table(t *testing.T, nl *netlink.Handle) (out []string) {
	t.Helper()
	list, err := nl.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		l, err := nl.LinkByIndex(max(r.LinkIndex, 1))
		if err != nil {
			t.Fatal(err)
		}
		where := l.Attrs().Name
		if r.Type == unix.RTN_BLACKHOLE {
			where = "guard"
		}
		if !r.Dst.IP.IsLinkLocalUnicast() {
			out = append(out, r.Dst.String()+" "+where)
		}
	}
	slices.Sort(out)
	return out
}

// on lists what the table has of our prefixes.
func on(tun string, prefixes ...string) (out []string) {
	for _, p := range prefixes {
		out = append(out, p+" "+tun, p+" guard")
	}
	return out
}

// TestRefusedPrefixes: whatever a controller pushes, what would take packets of the
// VPC, of this host or of another network isn't used, and is named with its reason and
// a remedy; everything else goes on.
func TestRefusedPrefixes(t *testing.T) { inNamespace(t, testRefusedPrefixes) }

func testRefusedPrefixes(t *testing.T, nl *netlink.Handle) {
	for name, addresses := range map[string][]string{"vpc0": {"172.31.0.1/16"}, "wan0": {"192.168.77.10/24", "fd00:77::10/64"}} {
		dev, err := tuntap.OpenTUN(name, tuntap.Writev)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		setUp(t, nl, name, addresses...)
	}
	wan, err := nl.LinkByName("wan0")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []netlink.Route{
		{Gw: net.IPv4(192, 168, 77, 1), LinkIndex: wan.Attrs().Index},
		// Of another program on this host.
		{Dst: netlink.NewIPNet(net.IPv4(10, 60, 1, 0)), LinkIndex: wan.Attrs().Index, Scope: netlink.SCOPE_LINK},
	} {
		if err := nl.RouteAdd(&r); err != nil {
			t.Fatal(err)
		}
	}
	before := table(t, nl)
	const tun = "ztgt5"
	dir := shortDir(t)
	cfg := load(t, map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {freePort(t)}, "tun": {tun},
		"network": {nwid.String(), second.String()}, "source": {"172.31.0.0/16"}})
	node := gatewaytest.NewNode()
	node.SetOnline(true)
	node.SetOffice(gatewaytest.NewOffice())
	node.SetPeers(ztnode.Peer{Address: "778cde7190", Role: "PLANET",
		Paths: []ztnode.Path{{Endpoint: netip.MustParseAddrPort("10.61.0.1:9993"), Preferred: true}}})
	node.SetNetwork(okNetwork())
	g := startGateway(t, cfg, node)
	defer g.end(t)
	first := on(tun, "10.0.0.0/24", "10.147.17.0/24")
	good := []string{"10.148.0.5/24", "fd00:148::5/64"}
	goodRoutes := on(tun, "10.148.0.0/24", "fd00:148::/64")
	for _, tt := range []struct {
		name              string
		addresses, routes []string
		refused           []string // thing: reason
		used              []string // prefixes besides those of the addresses
	}{
		{"part of the VPC", good, []string{"172.31.0.0/28", "10.20.0.0/16"}, []string{
			"managed route 172.31.0.0/28: lies inside the VPC's own 172.31.0.0/16"}, []string{"10.20.0.0/16"}},
		{"host of the VPC", good, []string{"172.31.0.10/32"}, []string{"managed route 172.31.0.10/32: lies inside the VPC's own 172.31.0.0/16"}, nil},
		{"halves of the VPC", good, []string{"172.31.0.0/17", "172.31.128.0/17"}, []string{
			"managed route 172.31.0.0/17: lies inside the VPC's own", "managed route 172.31.128.0/17: lies inside the VPC's own"}, nil},
		{"the VPC and more", good, []string{"172.31.0.0/16", "172.16.0.0/12", "172.31.99.99/16"}, []string{
			"managed route 172.31.0.0/16: is the VPC's own", "managed route 172.16.0.0/12: covers the VPC's own",
			"managed route 172.31.99.99/16: is the VPC's own"}, nil},
		{"metadata", good, []string{"169.254.169.254/32", "169.254.0.0/16", "100.100.100.200/32", "100.64.0.0/10", "fd00:ec2::254/128"}, []string{
			"managed route 169.254.169.254/32: never forwarded", "managed route 169.254.0.0/16: never forwarded",
			"managed route 100.100.100.200/32: metadata service", "managed route 100.64.0.0/10: metadata service",
			"managed route fd00:ec2::254/128: metadata service"}, nil},
		{"half of everything", good, []string{"10.0.0.0/1", "128.0.0.0/1", "0.0.0.0/0", "::/0"}, []string{
			"managed route 10.0.0.0/1: never forwarded", "managed route 128.0.0.0/1: never forwarded",
			"managed route 0.0.0.0/0: default routes are not taken", "managed route ::/0: default routes are not taken"}, nil},
		{"in part private", good, []string{"22.0.0.0/7", "fc00::/6", "20.0.0.0/7", "22.0.0.0/8"}, []string{
			"managed route 22.0.0.0/7: it isn't private", "managed route fc00::/6: never forwarded",
			"managed route 20.0.0.0/7: it isn't private"}, []string{"22.0.0.0/8"}}, // which is used as if it were private
		{"address in the VPC", []string{"172.31.0.10/24"}, nil, []string{"assigned address 172.31.0.10/24: lies inside the VPC's own"}, nil},
		{"address with half of everything", []string{"10.0.0.1/1", "10.148.0.5/24"}, nil, []string{"assigned address 10.0.0.1/1: never forwarded"}, nil},
		{"address in the underlay's subnet", []string{"192.168.77.50/24", "fd00:77::50/64", "10.148.0.5/24"}, nil, []string{
			"assigned address 192.168.77.50/24: this host's own address 192.168.77.10 on wan0",
			"assigned address fd00:77::50/64: this host's own address fd00:77::10 on wan0"}, nil},
		{"address of the other network", []string{"10.147.17.5/24", "10.148.0.5/24"}, nil, []string{
			"assigned address 10.147.17.5/24: is 10.147.17.0/24 of network " + nwid.String()}, nil},
		{"host of the other network", good, []string{"10.0.0.10/32", "10.0.0.0/16", "10.0.1.0/24"}, []string{
			"managed route 10.0.0.10/32: lies inside 10.0.0.0/24 of network " + nwid.String(),
			"managed route 10.0.0.0/16: covers 10.0.0.0/24 of network " + nwid.String()}, []string{"10.0.1.0/24"}},
		{"next hop, root and another program's", good, []string{"192.168.77.1/32", "10.61.0.0/24", "10.60.0.0/16"}, []string{
			"managed route 192.168.77.1/32: it covers 192.168.77.1", "managed route 10.61.0.0/24: it covers 10.61.0.1",
			"managed route 10.60.0.0/16: it covers 10.60.1.0/32, which the kernel has on wan0"}, nil},
	} {
		n := secondNetwork(tt.addresses, tt.routes)
		node.SetNetwork(n)
		var got []string
		if !testwait.Poll(patience, func() bool {
			got = problemsOf(t, g.client, second)
			return agree(got, tt.refused)
		}) {
			t.Errorf("%s: problems %q, want %q", tt.name, got, tt.refused)
			continue
		}
		want := slices.Concat(before, first, on(tun, tt.used...))
		for _, a := range n.Addresses {
			if slices.Contains(goodRoutes, a.Masked().String()+" "+tun) {
				want = append(want, on(tun, a.Masked().String())...)
			}
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, table(t, nl)); diff != "" {
			t.Errorf("%s: main table (-want +got):\n%s", tt.name, diff)
		}
		// The first network goes on, and for the VPC.
		c, err := connect("172.31.0.1:0", "10.0.0.10:443")
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		_ = c.Close()
		if p, err := g.client.Ping(t.Context(), control.PingRequest{Host: "10.0.0.10"}); err != nil || p.Network != nwid.String() {
			t.Errorf("%s: ping %+v, %v, want it in network %s", tt.name, p, err, nwid)
		}
		if list := problemsOf(t, g.client, nwid); len(list) > 0 {
			t.Errorf("%s: problems of the first network: %q", tt.name, list)
		}
		faults := len(tt.refused)
		for _, r := range tt.refused {
			if strings.HasSuffix(r, "default routes are not taken") { // that of an exit is for members
				faults--
			}
		}
		if body := get(t, "http://"+cfg.Listen+"/metrics"); !strings.Contains(body, fmt.Sprintf("\nztgate_route_conflicts %d\n", faults)) {
			t.Errorf("%s: the metric doesn't count %d", tt.name, faults)
		}
	}
}

// problemsOf returns what status says of a network.
func problemsOf(t *testing.T, client *control.Client, id ztnode.NetworkID) []string {
	t.Helper()
	st, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range st.Networks {
		if n.ID == id {
			return n.Problems
		}
	}
	return nil
}

// agree reports whether problems name things with their reasons, and remedies.
func agree(problems, want []string) bool {
	if len(problems) != len(want) {
		return false
	}
	for _, w := range want {
		thing, reason, _ := strings.Cut(w, ": ")
		if !slices.ContainsFunc(problems, func(p string) bool {
			text, remedy, ok := strings.Cut(p, "; ")
			return ok && remedy != "" && strings.HasPrefix(text, thing+" is not used: ") && strings.Contains(text, reason)
		}) {
			return false
		}
	}
	return true
}

// TestMTU: the interface follows the largest network, unless it is told not to.
func TestMTU(t *testing.T) { inNamespace(t, testMTU) }

func testMTU(t *testing.T, nl *netlink.Handle) {
	const tun = "ztgt6"
	run := func(flags map[string][]string, check func(node *gatewaytest.Node, mtu func() int)) {
		t.Helper()
		dir := shortDir(t)
		all := map[string][]string{"home": {dir}, "socket": {filepath.Join(dir, "s")}, "listen": {""}, "tun": {tun},
			"network": {nwid.String(), second.String()}, "source": {gatewaytest.VPC.String()}}
		for k, v := range flags {
			all[k] = v
		}
		node := gatewaytest.NewNode()
		node.SetNetwork(okNetwork())
		g := startGateway(t, load(t, all), node)
		defer g.end(t)
		testwait.For(t, patience, "routes of the first network", func() bool { return slices.Contains(routes(nl), "10.147.17.0/24") })
		check(node, func() int {
			l, err := nl.LinkByName(tun)
			if err != nil {
				t.Fatal(err)
			}
			return l.Attrs().MTU
		})
	}
	large := secondNetwork([]string{"10.148.0.5/24"}, nil)
	large.MTU = 9000
	small := large
	small.MTU = 1400
	run(nil, func(node *gatewaytest.Node, mtu func() int) {
		for _, tt := range []struct {
			n    ztnode.Network
			want int
		}{{large, 9000}, {small, config.DefaultMTU}} {
			node.SetNetwork(tt.n)
			if !testwait.Poll(patience, func() bool { return mtu() == tt.want }) {
				t.Errorf("MTU %d with a network of %d, want %d", mtu(), tt.n.MTU, tt.want)
			}
		}
		node.SetNetwork(large)
		testwait.For(t, patience, "the large MTU", func() bool { return mtu() == large.MTU })
		if err := node.Leave(second); err != nil {
			t.Fatal(err)
		}
		testwait.For(t, patience, "the default MTU without the network", func() bool { return mtu() == config.DefaultMTU })
	})
	run(map[string][]string{"mtu": {"2000"}}, func(node *gatewaytest.Node, mtu func() int) {
		node.SetNetwork(large)
		testwait.For(t, patience, "routes of the large network", func() bool { return slices.Contains(routes(nl), "10.148.0.0/24") })
		if got := mtu(); got != 2000 {
			t.Errorf("MTU %d, want 2000 as configured", got)
		}
	})
}
