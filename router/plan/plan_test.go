package plan_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/config"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const (
	first  ztnode.NetworkID = 0x8056c2e21c000001
	second ztnode.NetworkID = 0x8056c2e21c000002
)

// load reads a configuration file with this text below a VPC of 172.31.0.0/16.
func load(t *testing.T, text string) *config.Config {
	t.Helper()
	if !strings.Contains(text, "vpc:") {
		text = "vpc: {sources: [172.31.0.0/16, \"fd00:31::/48\"]}\n" + text
	}
	path := filepath.Join(t.TempDir(), "ztgate.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}, "home": {t.TempDir()}}})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// host is an instance in that VPC, with a bridge of containers.
func host() *plan.Host {
	return &plan.Host{
		Routes: []plan.KernelRoute{
			{Target: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("172.31.16.1"), Device: "eth0"},
			{Target: netip.MustParsePrefix("172.31.16.0/20"), Device: "eth0"},
			{Target: netip.MustParsePrefix("172.17.0.0/16"), Device: "docker0"},
			{Target: netip.MustParsePrefix("10.99.0.0/16"), Via: netip.MustParseAddr("172.31.16.9"), Device: "eth0"},
			{Target: netip.MustParsePrefix("fd00:31:0:1::/64"), Device: "eth0"},
		},
		Addresses: []plan.HostAddress{{Addr: netip.MustParseAddr("172.31.16.5"), Device: "eth0"}, {Addr: netip.MustParseAddr("172.17.0.1"), Device: "docker0"},
			{Addr: netip.MustParseAddr("192.168.77.1"), Device: "lo"}},
		Underlay: []netip.Addr{netip.MustParseAddr("172.31.16.1"), netip.MustParseAddr("198.51.100.1")},
	}
}

// office is a network that works: ours is 10.0.0.1.
func office(id ztnode.NetworkID, routes ...string) ztnode.Network {
	n := ztnode.Network{ID: id, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10.0.0.1/24")}
	return withRoutes(n, routes...)
}

func withRoutes(n ztnode.Network, routes ...string) ztnode.Network {
	for _, r := range routes {
		target, via, _ := strings.Cut(r, " via ")
		route := ztnode.Route{Target: netip.MustParsePrefix(target)}
		if via != "" {
			route.Via = netip.MustParseAddr(via)
		}
		n.Routes = append(n.Routes, route)
	}
	return n
}

func targets(p *plan.Plan) (out []string) {
	for _, r := range p.Routes {
		out = append(out, r.Target.String())
	}
	return out
}

func texts(p *plan.Plan) (out []string) {
	for _, x := range p.Problems {
		out = append(out, x.String())
	}
	return out
}

// A managed route is judged by what it covers, in both directions.
func TestRoutes(t *testing.T) {
	for _, tt := range []struct {
		route string
		why   string // in the problem; "" = used
	}{
		{"192.168.10.0/24", ""},
		{"192.168.10.0/24 via 10.0.0.9", ""},
		{"172.31.0.0/16 via 10.0.0.1", ""}, // through ourselves: for the others, and no problem

		// The VPC, equal, inside, around and in halves.
		{"172.31.0.0/16", "it is the VPC's own 172.31.0.0/16"},
		{"172.31.0.0/28", "it lies inside the VPC's own"},
		{"172.31.0.10/32", "it lies inside the VPC's own"},
		{"172.31.0.0/17", "it lies inside the VPC's own"},
		{"172.31.128.0/17", "it lies inside the VPC's own"},
		{"172.16.0.0/12", "it covers the VPC's own"},
		{"172.31.255.255/12", "it covers the VPC's own"}, // host bits
		{"fd00:31::/64", "it lies inside the VPC's own"},
		{"fd00:31::/40", "it covers the VPC's own"},

		// What is nobody's.
		{"169.254.169.254/32", "link-local"},
		{"169.254.0.0/16", "link-local"},
		{"fd00:ec2::254/128", "metadata"},
		{"fd00:ec2::/32", "metadata"},
		{"fc00::/7", "metadata"},
		{"100.100.100.200/32", "metadata"},
		{"100.64.0.0/10", "metadata"},
		{"168.63.129.16/32", "metadata"},
		{"127.0.0.0/8", "loopback"},
		{"127.1.2.3/32", "loopback"},
		{"224.0.0.0/4", "multicast"},
		{"255.255.255.255/32", "reserved"},
		{"0.1.2.3/32", "addresses of this host"},
		{"fe80::/64", "link-local"},
		{"::1/128", "loopback"},
		{"::ffff:10.9.0.0/112", "malformed"},

		// The world.
		{"10.0.0.0/1", "never forwarded"},
		{"128.0.0.0/1", "never forwarded"},
		{"22.0.0.0/7", "isn't private address space as a whole"},
		{"8.8.8.8/32", "isn't private address space as a whole"},
		{"fc00::/6", "never forwarded"},
		{"2001:db8::/32", "isn't private address space as a whole"},
		{"192.168.0.0/15", "isn't private address space as a whole"},

		// This host.
		{"192.168.77.0/24", "it covers this host's own address 192.168.77.1 on lo"},
		{"198.51.100.0/24", "it covers 198.51.100.1"},
		{"172.17.0.0/16", "it covers this host's own address 172.17.0.1 on docker0"},
		{"172.17.5.0/24", "it lies inside 172.17.0.0/16, which is attached to docker0"},
		{"172.17.0.9/32", "it lies inside 172.17.0.0/16"},
		{"10.99.0.0/16", "the kernel already has it on eth0"},
		{"10.96.0.0/11", "it covers 10.99.0.0/16, which the kernel has on eth0"},
		{"10.99.5.0/24", ""}, // more specific than a route through a router, and not of vpc.sources
		{"100.127.255.0/24", "our own address 100.127.255.1"},
	} {
		p := plan.Make(plan.Input{Config: load(t, ""), Networks: []ztnode.Network{office(first, tt.route)}, Host: host()})
		target, _, _ := strings.Cut(tt.route, " ")
		masked := netip.MustParsePrefix(target).Masked()
		installed := slices.Contains(targets(p), masked.String())
		switch through := strings.Contains(tt.route, "via 10.0.0.1"); {
		case through && (installed || len(p.Problems) > 0):
			t.Errorf("%s: routes %v, problems %q", tt.route, targets(p), texts(p))
		case tt.why == "" && !through && (!installed || len(p.Problems) > 0 || p.Networks[0].Refused > 0):
			t.Errorf("%s is refused: %q", tt.route, texts(p))
		case tt.why != "" && (installed || len(p.Problems) != 1 || p.Networks[0].Refused != 1 || !strings.Contains(p.Problems[0].String(), tt.why)):
			t.Errorf("%s: routes %v, problems %q, want one with %q", tt.route, targets(p), texts(p), tt.why)
		case tt.why != "" && (p.Problems[0].Network != first || p.Problems[0].Remedy == "" || !strings.HasPrefix(p.Problems[0].String(), "managed route "+target)):
			t.Errorf("%s: %+v names no network, thing or remedy", tt.route, p.Problems[0])
		}
		if !slices.Contains(targets(p), "10.0.0.0/24") {
			t.Errorf("%s: the network's own subnet went too", tt.route)
		}
	}
}

// Without vpc.sources, whatever the kernel routes may be the VPC.
func TestNoSources(t *testing.T) {
	cfg := load(t, "vpc: {}\n")
	p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first, "10.99.5.0/24", "172.31.16.0/28", "172.31.0.0/28", "192.168.1.0/24")}, Host: host()})
	if got, want := targets(p), []string{"10.0.0.0/24", "172.31.0.0/28", "192.168.1.0/24"}; !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v; problems %q", got, want, texts(p))
	}
}

func TestAllowGlobal(t *testing.T) {
	cfg := load(t, "networks: [{id: 8056c2e21c000001, allow_global: true}]\n")
	p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first, "8.8.8.0/24", "22.0.0.0/7", "0.0.0.0/1", "168.63.129.0/24", "0.0.0.0/0",
		"64:ff9b::a9fe:0/112", "64:ff9b::6464:64c8/128", "2001:db8::/32", "64:ff9b::a00:0/104")}, Host: host()})
	if got, want := targets(p), []string{"10.0.0.0/24", "8.8.8.0/24", "22.0.0.0/7", "2001:db8::/32", "64:ff9b::a00:0/104"}; !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v", got, want)
	}
}

// Assigned addresses are judged like routes.
func TestAddresses(t *testing.T) {
	for _, tt := range []struct{ address, why string }{
		{"10.0.0.1/24", ""},
		{"10.0.0.1/32", ""},
		{"fd80:56c2:e21c:0:199:9300::1/88", ""},
		{"172.31.0.10/24", "it lies inside the VPC's own"},
		{"172.31.0.10/32", "it lies inside the VPC's own"},
		{"10.0.0.1/1", "never forwarded"},
		{"10.0.0.1/0", "default routes"},
		{"172.17.3.9/24", "attached to docker0"}, // the underlay's own subnet
		{"172.17.0.1/32", "this host's own address"},
		{"8.8.8.8/24", "isn't private"},
		{"10.0.0.0/24", "the subnet itself"},
		{"10.0.0.255/24", "broadcast address"},
		{"169.254.7.7/16", "link-local"},
		{"::ffff:10.0.0.1/120", "malformed"},
	} {
		n := ztnode.Network{ID: first, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes(tt.address)}
		p := plan.Make(plan.Input{Config: load(t, ""), Networks: []ztnode.Network{n}, Host: host()})
		used := len(p.Networks[0].Addresses) == 1
		switch {
		case tt.why == "" && (!used || len(p.Problems) > 0):
			t.Errorf("%s is refused: %q", tt.address, texts(p))
		case tt.why != "" && (used || len(p.Routes) > 0 || len(p.Problems) != 1 || !strings.Contains(p.Problems[0].String(), tt.why)):
			t.Errorf("%s: addresses %v, routes %v, problems %q, want %q", tt.address, p.Networks[0].Addresses, targets(p), texts(p), tt.why)
		}
	}
}

// Who was named first keeps what it has; while it doesn't work too.
func TestNetworks(t *testing.T) {
	intruder := ztnode.Network{ID: second, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("192.168.9.1/24")}
	for _, route := range []string{"10.0.0.10/32", "10.0.0.0/24", "10.0.0.128/25", "10.0.0.0/16"} {
		nets := []ztnode.Network{withRoutes(intruder, route), office(first)}
		p := plan.Make(plan.Input{Config: load(t, ""), Networks: nets, Host: host()})
		if got := targets(p); !slices.Equal(got, []string{"10.0.0.0/24", "192.168.9.0/24"}) {
			t.Errorf("%s: routes %v", route, got)
		}
		if got := texts(p); len(got) != 1 || !strings.Contains(got[0], first.String()) || p.Problems[0].Network != second {
			t.Errorf("%s: problems %q", route, got)
		}
		// Named first in the configuration, it is the other way round.
		cfg := load(t, "networks: [8056c2e21c000002, 8056c2e21c000001]\n")
		if p := plan.Make(plan.Input{Config: cfg, Networks: nets, Host: host()}); len(p.Networks[1].Addresses) != 0 || p.Networks[1].ID != first {
			t.Errorf("%s: the order of the configuration doesn't count: %+v", route, p.Networks)
		}
		// Joined by command, the first is who was joined first, unless the
		// configuration names one.
		for _, tt := range []struct {
			config string
			joined []ztnode.NetworkID
			first  ztnode.NetworkID
		}{
			{"", []ztnode.NetworkID{second, first}, second},
			{"", []ztnode.NetworkID{second}, second},
			{"networks: [8056c2e21c000001]\n", []ztnode.NetworkID{second, first}, first},
		} {
			if p := plan.Make(plan.Input{Config: load(t, tt.config), Networks: nets, Joined: tt.joined, Host: host()}); p.Networks[0].ID != tt.first || p.Networks[0].Refused > 0 {
				t.Errorf("%s, joined %v, %q: the first isn't %s: %+v", route, tt.joined, tt.config, tt.first, p.Networks)
			}
		}
		// The first one fails: nobody gets what it had.
		down := ztnode.Network{ID: first, Status: ztnode.StatusDenied}
		again := plan.Make(plan.Input{Config: load(t, ""), Networks: []ztnode.Network{nets[0], down}, Host: host(), Held: p.Held})
		if got := targets(again); !slices.Equal(got, []string{"192.168.9.0/24"}) || !again.KeepGuards {
			t.Errorf("%s, first network down: routes %v, guards kept %v", route, got, again.KeepGuards)
		}
		third := plan.Make(plan.Input{Config: load(t, ""), Networks: []ztnode.Network{nets[0], down}, Host: host(), Held: again.Held})
		if got := targets(third); !slices.Equal(got, []string{"192.168.9.0/24"}) {
			t.Errorf("%s, first network down for longer: routes %v", route, got)
		}
		// Left, it has nothing any more.
		left := plan.Make(plan.Input{Config: load(t, ""), Networks: nets[:1], Host: host(), Held: third.Held})
		if got := targets(left); len(got) != 2 {
			t.Errorf("%s, first network left: routes %v", route, got)
		}
	}
}

// The VPC and the overlay have the same addresses: the overlay's hosts are known by
// others, and the kernel's routes to the VPC stay.
func TestOverlap(t *testing.T) {
	h := &plan.Host{Routes: []plan.KernelRoute{{Target: netip.MustParsePrefix("10.0.0.0/24"), Device: "eth0"}},
		Addresses: []plan.HostAddress{{Addr: netip.MustParseAddr("10.0.0.5"), Device: "eth0"}}}
	cfg := load(t, "vpc: {sources: [10.0.0.0/24]}\nmaps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}]\n")
	p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first)}, Host: h})
	if got := targets(p); !slices.Equal(got, []string{"10.77.0.0/24"}) || len(p.Problems) > 0 {
		t.Errorf("routes %v, problems %q", got, texts(p))
	}
	if n := p.Networks[0]; len(n.Addresses) != 1 || len(n.Routes) != 1 || n.Refused != 0 {
		t.Errorf("network %+v", n)
	}
	// What the map covers only in part can't be told from the VPC; the alias is taken.
	for route, why := range map[string]string{"10.0.0.0/23": "covers the VPC's own", "10.77.0.0/25": "lies inside the alias", "10.77.0.0/16": "covers the alias"} {
		p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first, route)}, Host: h})
		if got := texts(p); len(got) != 1 || !strings.Contains(got[0], why) {
			t.Errorf("%s: %q, want %q", route, got, why)
		}
	}
	// Two networks behind one alias would be one host for two.
	p = plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first), office(second)}, Host: h})
	if len(p.Networks[1].Addresses) != 0 || len(p.Problems) != 1 || p.Problems[0].Network != second {
		t.Errorf("two networks: %+v, %q", p.Networks, texts(p))
	}
	// With an alias each, both work.
	cfg = load(t, "vpc: {sources: [10.0.0.0/24]}\nmaps:\n  - {network: 8056c2e21c000001, hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}\n"+
		"  - {network: 8056c2e21c000002, hosts: overlay, real: 10.0.0.0/24, alias: 10.78.0.0/24}\n")
	p = plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first), office(second)}, Host: h})
	if got := targets(p); !slices.Equal(got, []string{"10.77.0.0/24", "10.78.0.0/24"}) || len(p.Problems) > 0 {
		t.Errorf("an alias each: routes %v, problems %q", got, texts(p))
	}
}

func TestMaps(t *testing.T) {
	for _, tt := range []struct {
		maps, why string
		fatal     bool
	}{
		{"{hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}", "", false},
		{"{hosts: vpc, real: 172.31.0.0/24, alias: 10.77.0.0/24}", "", false},
		{"{hosts: vpc, real: 10.1.0.0/24, alias: 10.77.0.0/24}", "outside vpc.sources", true},
		{"{hosts: overlay, real: 10.0.0.0/24, alias: 172.31.5.0/24}", "inside the VPC's own", true},
		{"{hosts: overlay, real: 10.0.0.0/24, alias: 169.254.169.0/24}", "link-local", true},
		{"{hosts: overlay, real: 10.0.0.0/24, alias: 172.17.9.0/24}", "attached to docker0", false},
		{"{hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}, {hosts: overlay, real: 10.1.0.0/24, alias: 10.77.0.0/24}", "overlaps the map", true},
	} {
		cfg := load(t, "maps: ["+tt.maps+"]\n")
		p := plan.Make(plan.Input{Config: cfg, Host: host()})
		got := strings.Join(texts(p), "\n")
		if tt.why == "" != (got == "") || !strings.Contains(got, tt.why) {
			t.Errorf("%s: %q, want %q", tt.maps, got, tt.why)
		}
		if err := plan.Check(cfg); (err != nil) != tt.fatal {
			t.Errorf("%s: by itself: %v", tt.maps, err)
		}
	}
}

func TestForwards(t *testing.T) {
	vpc := "vpc: {sources: [172.31.0.0/16]}\n"
	for _, tt := range []struct {
		forward string
		why     string // "" = used
		fatal   bool
		where   string // plane, host, both
		route   string // that the kernel gets for it
	}{
		{`{listen: "tcp/8443", to: "10.0.0.10:443"}`, "", false, "both", ""},
		{`{listen: "tcp/10.0.0.1:8443", to: "10.0.0.10:443"}`, "", false, "plane", ""},
		{`{listen: "tcp/172.31.16.5:8443", to: "10.0.0.10:443"}`, "", false, "host", ""},                  // the host's own address
		{`{listen: "tcp/100.127.255.1:8443", to: "10.0.0.10:443"}`, "", false, "host", ""},                // its own on the TUN
		{`{listen: "tcp/192.168.50.1:8443", to: "10.0.0.10:443"}`, "", false, "plane", "192.168.50.1/32"}, // one that the VPC routes to us
		{`{listen: "tcp/172.31.0.77:8443", to: "10.0.0.10:443"}`, "inside the VPC's own", false, "", ""},
		{`{listen: "tcp/172.17.0.7:8443", to: "10.0.0.10:443"}`, "attached to docker0", false, "", ""},
		{`{listen: "tcp/8443", to: "10.200.0.1:443"}`, "no joined network has a route to 10.200.0.1", false, "both", ""},
		{`{listen: "tcp/8443", to: "10.0.0.10:443", masquerade: false}`, "can't see clients' addresses", true, "", ""},
		{`{listen: "tcp/192.168.50.1:8443", to: "10.0.0.10:443", masquerade: false}`, "", false, "plane", "192.168.50.1/32"},
		{`{listen: "tcp/8443", to: "172.31.0.10:443", masquerade: false}`, "both in the VPC", true, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.10:443", proxy_protocol: v2}`, "", false, "both", ""},
		{`{listen: "tcp/10.0.0.1:8443", to: "10.0.0.10:443", accept_proxy: 172.31.0.7}`, "", false, "plane", ""},
		{`{listen: "tcp/172.31.16.5:8443", to: "10.0.0.10:443", proxy_protocol: v1}`, "", false, "host", ""},
		{`{listen: "tcp/8443", to: "172.31.0.10:443", proxy_protocol: v2}`, "are for hosts of the overlay", true, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.10:443", proxy_protocol: v2}, {listen: "tcp/10.0.0.1:8443", to: "10.0.0.11:443", accept_proxy: 172.31.0.7}`,
			"another forward with a PROXY header listens", false, "both", ""},
		{`{listen: "tcp/8443", to: "127.0.0.1:443"}`, "loopback", true, "", ""},
		{`{listen: "tcp/8443", to: "0.0.0.0:443"}`, "addresses of this host", true, "", ""},
		{`{listen: "tcp/8443", to: "[::]:443"}`, "the unspecified and the loopback address", true, "", ""},
		{`{listen: "tcp/8443", to: "[fe80::1]:443"}`, "link-local", true, "", ""},
		{`{listen: "tcp/8443", to: "255.255.255.255:443"}`, "reserved", true, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.1:443"}`, "this gateway's own address on the overlay", false, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.255:443"}`, "the broadcast address of its subnet", false, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.0:443"}`, "the address of the subnet itself", false, "", ""},
		{`{listen: "tcp/10.0.0.255:8443", to: "10.0.0.10:443"}`, "the broadcast address of its subnet", false, "", ""},
		{`{listen: "tcp/8443", to: "169.254.169.254:80"}`, "link-local", true, "", ""},
		{`{listen: "tcp/8443", to: "100.100.100.200:80"}`, "metadata", true, "", ""},
		{`{listen: "tcp/8443", to: "[64:ff9b::a9fe:a9fe]:80"}`, "metadata", true, "", ""},
		{`{listen: "tcp/8443", to: "[::ffff:169.254.169.254]:80"}`, "IPv4 addresses in IPv6 form", true, "", ""},
		{`{listen: "tcp/127.0.0.1:8443", to: "10.0.0.10:443"}`, "loopback", true, "", ""},
		{`{listen: "tcp/10.0.0.1:2222", to: "172.31.0.10:22", from: overlay}`, "", false, "plane", ""},
		{`{listen: "tcp/2222", to: "172.31.0.10:22", from: overlay}`, "", false, "plane", ""},
		{`{listen: "tcp/2222", to: "10.0.0.10:22", from: overlay}`, "outside vpc.sources", true, "", ""},
		{`{listen: "tcp/10.9.9.9:2222", to: "172.31.0.10:22", from: overlay}`, "no network has given us the address 10.9.9.9", false, "plane", ""},
		{`{listen: "tcp/172.31.16.5:2222", to: "172.31.0.10:22", from: overlay}`, "at an address of the VPC", true, "", ""},
		{`{listen: "tcp/2222", to: "169.254.169.254:80", from: overlay}`, "link-local", true, "", ""},
		{`{listen: "tcp/8443", to: "10.0.0.10:443"}, {listen: "tcp/8443", to: "10.0.0.11:443"}`, "another one listens there", true, "both", ""},
		{`{listen: "tcp/8443", to: "10.0.0.10:443"}, {listen: "tcp/172.31.16.5:8443", to: "10.0.0.11:443"}`, "another forward listens at all of this host's addresses", false, "both", ""},
	} {
		cfg := load(t, vpc+"forwards: ["+tt.forward+"]\n")
		p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first)}, Host: host()})
		got := strings.Join(texts(p), "\n")
		if tt.why == "" != (got == "") || !strings.Contains(got, tt.why) {
			t.Errorf("%s: %q, want %q", tt.forward, got, tt.why)
		}
		where := map[[2]int]string{{1, 0}: "plane", {0, 1}: "host", {1, 1}: "both"}[[2]int{len(p.Forwards), len(p.HostForwards)}]
		if where != tt.where {
			t.Errorf("%s: served on %q, want %q", tt.forward, where, tt.where)
		}
		if tt.route != "" != slices.Contains(targets(p), tt.route) || len(p.Routes) > 2 {
			t.Errorf("%s: routes %v, want %q", tt.forward, targets(p), tt.route)
		}
		if err := plan.Check(cfg); (err != nil) != tt.fatal {
			t.Errorf("%s: by itself: %v", tt.forward, err)
		}
	}
	// Without vpc.sources only the networks say what is on the overlay.
	cfg := load(t, "vpc: {}\nforwards: [{listen: tcp/2222, to: \"10.0.0.10:22\", from: overlay}]\n")
	p := plan.Make(plan.Input{Config: cfg, Networks: []ztnode.Network{office(first)}, Host: host()})
	if len(p.Forwards) != 0 || len(p.Problems) != 1 || !strings.Contains(p.Problems[0].String(), "is on the overlay") {
		t.Errorf("overlay to overlay: %v, %q", p.Forwards, texts(p))
	}
}

// A member judges by its own host, and has no VPC.
func TestMember(t *testing.T) {
	cfg := load(t, "")
	n := withRoutes(ztnode.Network{ID: first, Status: ztnode.StatusOK, MTU: 9000, Addresses: nettest.Prefixes("10.0.0.1/24")},
		"172.31.0.0/24", "172.31.16.0/24", "172.31.16.1/32", "169.254.169.254/32", "10.99.5.0/24")
	p := plan.Make(plan.Input{Role: plan.Member, Config: cfg, Networks: []ztnode.Network{n}, Host: host()})
	if got, want := targets(p), []string{"10.0.0.0/24", "172.31.0.0/24", "10.99.5.0/24"}; !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v; problems %q", got, want, texts(p))
	}
}

func TestMTU(t *testing.T) {
	n := office(first)
	n.MTU = 9000
	for vpc, want := range map[string]int{"vpc: {}\n": 9000, "vpc: {mtu: 1400}\n": 1400} {
		if p := plan.Make(plan.Input{Config: load(t, vpc), Networks: []ztnode.Network{office(second, "192.168.1.0/24"), n}}); p.MTU != want {
			t.Errorf("%s: MTU %d, want %d", vpc, p.MTU, want)
		}
	}
	// An interface that isn't ours has the MTU that it has.
	for vpc, want := range map[string]int{"": 1500, "vpc: {mtu: 1400}": 1400, "vpc: {mtu: 9000}": 1500} {
		in := plan.Input{Config: load(t, vpc), Networks: []ztnode.Network{n}, Host: &plan.Host{MTU: 1500}}
		if p := plan.Make(in); p.MTU != want {
			t.Errorf("%q on an interface with 1500: MTU %d, want %d", vpc, p.MTU, want)
		}
	}
	if p := plan.Make(plan.Input{Config: load(t, "")}); p.MTU != config.DefaultMTU {
		t.Errorf("without networks: MTU %d", p.MTU)
	}
}

// TestCommonAlias: behind an alias for hosts of all networks, too, a network that is named
// later takes nothing from an earlier one, whether or not the VPC knows either otherwise.
func TestCommonAlias(t *testing.T) {
	vpc := "vpc: {sources: [10.0.1.0/24]}\nmaps: [{hosts: overlay, real: 10.0.0.0/20, alias: 172.30.0.0/20}]\n"
	wide := ztnode.Network{ID: first, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10.0.0.1/20")}    // overlaps the VPC
	narrow := ztnode.Network{ID: second, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10.0.0.1/28")} // doesn't
	for _, nets := range [][]ztnode.Network{{wide, narrow}, {narrow, wide}} {
		cfg := load(t, vpc+"networks: ["+"\""+nets[0].ID.String()+"\", \""+nets[1].ID.String()+"\"]\n")
		p := plan.Make(plan.Input{Config: cfg, Networks: nets, Host: host()})
		if got := strings.Join(texts(p), "\n"); len(p.Networks[0].Routes) != 1 || len(p.Networks[1].Routes) != 0 || !strings.Contains(got, "which was named first") {
			t.Errorf("%v before %v: %q", nets[0].Addresses, nets[1].Addresses, got)
		}
	}
}
