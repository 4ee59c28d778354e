package plan_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const allowed = "networks: [{id: 8056c2e21c000001, allow_default: true}, {id: 8056c2e21c000002, allow_default: true}]\n"

// A default route is used by a member that allows it, through one exit of each family.
func TestExits(t *testing.T) {
	dual := func(id ztnode.NetworkID, net string, routes ...string) ztnode.Network {
		n := ztnode.Network{ID: id, Status: ztnode.StatusOK, MTU: 2800, Addresses: nettest.Prefixes("10."+net+".0.7/24", "fd00:"+net+"::7/64")}
		return withRoutes(n, routes...)
	}
	for _, tt := range []struct {
		name     string
		config   string
		nets     []ztnode.Network
		exits    string
		why      string // in the only problem
		declined bool
	}{
		{"allowed", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.1")}, "10.1.0.1", "", false},
		{"both families", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.1", "::/0 via fd00:1::1")}, "10.1.0.1 fd00:1::1", "", false},
		{"twice the same", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.1", "0.0.0.0/0 via 10.1.0.1")}, "10.1.0.1", "", false},
		{"the exit itself", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.7")}, "", "", false},
		{"nobody asked", "", []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.1")}, "", "set allow_default", true},
		{"of another network", "networks: [{id: 8056c2e21c000002, allow_default: true}]\n", []ztnode.Network{dual(first, "1", "::/0 via fd00:1::1")}, "", "set allow_default", true},
		{"no member", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0")}, "", "it names no member", false},
		{"elsewhere", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.2.0.1")}, "", "10.2.0.1 is in no subnet", false},
		{"wrong family", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via fd00:1::1")}, "", "malformed", false},
		{"two exits", allowed, []ztnode.Network{dual(first, "1", "0.0.0.0/0 via 10.1.0.1", "0.0.0.0/0 via 10.1.0.2")}, "10.1.0.1", "through 10.1.0.1 is used", false},
		{"two networks", allowed, []ztnode.Network{dual(second, "2", "0.0.0.0/0 via 10.2.0.1"), dual(first, "1", "0.0.0.0/0 via 10.1.0.1")}, "10.1.0.1", "that of network " + first.String(), false},
		{"one each", allowed, []ztnode.Network{dual(second, "2", "::/0 via fd00:2::1"), dual(first, "1", "0.0.0.0/0 via 10.1.0.1")}, "10.1.0.1 fd00:2::1", "", false},
		{"down", allowed, []ztnode.Network{{ID: first, Status: ztnode.StatusDenied, Routes: dual(first, "1", "0.0.0.0/0 via 10.1.0.1").Routes}}, "", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := plan.Make(plan.Input{Role: plan.Member, Config: load(t, tt.config), Networks: tt.nets, Host: host()})
			var got []string
			for _, x := range p.Exits {
				got = append(got, x.Via.String())
			}
			if strings.Join(got, " ") != tt.exits {
				t.Errorf("exits %v, want %s", got, tt.exits)
			}
			if slices.ContainsFunc(p.Routes, func(r plan.Route) bool { return r.Target.Bits() == 0 }) {
				t.Errorf("a default route among the others: %v", targets(p))
			}
			switch {
			case tt.why == "" && len(p.Problems) > 0, tt.why != "" && (len(p.Problems) != 1 || !strings.Contains(p.Problems[0].String(), tt.why)):
				t.Errorf("problems %q, want %q", texts(p), tt.why)
			case tt.why != "" && p.Problems[0].Declined != tt.declined:
				t.Errorf("%q: declined %v", texts(p), p.Problems[0].Declined)
			}
		})
	}
}

// A gateway takes none: that of a network is no fault, but who allows one is told.
func TestGatewayTakesNoExit(t *testing.T) {
	p := plan.Make(plan.Input{Config: load(t, ""), Networks: []ztnode.Network{office(first, "0.0.0.0/0 via 10.0.0.9", "::/0")}, Host: host()})
	if len(p.Exits) > 0 || len(p.Problems) != 2 || !p.Problems[0].Declined || !p.Problems[1].Declined || p.Networks[0].Refused > 0 {
		t.Errorf("%+v, problems %q", p.Exits, texts(p))
	}
	cfg := load(t, allowed)
	if err := plan.Check(cfg); err == nil || !strings.Contains(err.Error(), "takes no default route") {
		t.Errorf("a gateway: %v", err)
	}
	if err := plan.CheckMember(cfg); err != nil {
		t.Errorf("a member: %v", err)
	}
}

func TestKeptOut(t *testing.T) {
	d := plan.KeptOut(load(t, "vpc: {sources: [172.31.0.0/16, 0.0.0.0/0]}\n"), host())
	for _, want := range []string{"169.254.0.0/16", "224.0.0.0/4", "100.100.100.200/32", "fd00:ec2::/32", "172.31.0.0/16"} {
		if !slices.Contains(d.To, netip.MustParsePrefix(want)) {
			t.Errorf("%s isn't kept out: %v", want, d.To)
		}
	}
	if slices.ContainsFunc(d.To, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
		t.Errorf("all is kept out: %v", d.To)
	}
	many := host()
	for a := netip.MustParseAddr("10.200.0.1"); len(many.Addresses) < 1000; a = a.Next() {
		many.Addresses = append(many.Addresses, plan.HostAddress{Addr: a, Device: "kube-ipvs0"})
	}
	if n := len(plan.KeptOut(load(t, ""), many).From); n != 256 {
		t.Errorf("%d addresses have a rule each", n)
	}
	if got := fmt.Sprint(d.From); got != "[172.31.16.5 172.17.0.1 192.168.77.1]" {
		t.Errorf("from %s", got)
	}
}

// The internet is all but this host, what is private and the VPC, which stays behind the
// policy's rules.
func TestInternet(t *testing.T) {
	const networks = "networks: [8056c2e21c000001]\n"
	for _, tt := range []struct {
		name, config string
		want         []string // by which overlay hosts are masqueraded, in order
	}{
		{"off", "vpc: {sources: [172.31.0.0/16], nat_address: 172.31.200.1}\n", []string{"172.31.0.0/16 as 172.31.200.1"}},
		{"an address", "vpc: {sources: [172.31.0.0/16], nat_address: 172.31.200.1}\nexit: true\n", []string{"172.31.0.0/16 as 172.31.200.1", "0.0.0.0/0 as 172.31.200.1 invites"}},
		{"both families", "vpc: {sources: [172.31.0.0/16], nat_address: [172.31.200.1, \"2600:1::1\"]}\nexit: true\n",
			[]string{"172.31.0.0/16 as 172.31.200.1", "0.0.0.0/0 as 172.31.200.1 invites", "::/0 as 2600:1::1 invites"}},
		{"the host", "vpc: {sources: [172.31.0.0/16], nat_address: host}\nexit: true\n",
			[]string{"172.31.0.0/16 as host", "0.0.0.0/0 as host invites", "::/0 as host invites"}},
		{"no address", "vpc: {sources: [172.31.0.0/16]}\nexit: true\n", []string{"172.31.0.0/16 routed", "0.0.0.0/0 as host invites", "::/0 as host invites"}},
		{"a VPC with public addresses", "vpc: {sources: [172.31.0.0/16, 198.18.0.0/15, \"2600:1::/56\"]}\nexit: true\n",
			[]string{"172.31.0.0/16 routed", "198.18.0.0/15 routed", "0.0.0.0/0 as host invites", "2600:1::/56 routed", "::/0 as host invites"}},
		{"without sources", "vpc: {nat_address: 172.31.200.1}\nexit: true\n",
			[]string{"10.0.0.0/8 as 172.31.200.1", "100.64.0.0/10 as 172.31.200.1", "172.16.0.0/12 as 172.31.200.1", "192.0.0.0/24 as 172.31.200.1",
				"192.168.0.0/16 as 172.31.200.1", "198.18.0.0/15 as 172.31.200.1", "0.0.0.0/0 as 172.31.200.1 invites"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := plan.Make(plan.Input{Config: load(t, tt.config+networks), Networks: []ztnode.Network{office(first)}, Host: host()})
			var got []string
			for _, m := range p.Masquerade {
				as := m.Address.String()
				if m.Host {
					as = "host"
				}
				s := m.To.String() + " as " + as
				if m.Routed {
					s = m.To.String() + " routed"
				}
				if m.Invites {
					s += " invites"
				}
				got = append(got, s)
				if !m.Invites || m.To.Addr().Is6() {
					continue
				}
				for _, a := range []string{"10.9.9.9/32", "192.168.1.1/32", "172.31.16.5/32", "172.17.0.1/32", "192.168.77.1/32"} {
					if !slices.ContainsFunc(m.Except, func(p netip.Prefix) bool { return p.Contains(netip.MustParsePrefix(a).Addr()) }) {
						t.Errorf("%s is reached as the internet: %v", a, m.Except)
					}
				}
				if slices.ContainsFunc(m.Except, func(p netip.Prefix) bool {
					return p.Contains(netip.MustParseAddr("8.8.8.8")) || p.Contains(netip.MustParseAddr("198.51.100.1"))
				}) {
					t.Errorf("the internet isn't reached: %v", m.Except)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q; problems %q", got, tt.want, texts(p))
			}
		})
	}
}
