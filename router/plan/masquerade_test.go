package plan_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// vpcWith is the VPC of [host] with addresses for overlay hosts.
func vpcWith(nat string) string {
	return "vpc: {sources: [172.31.0.0/16, \"fd00:31::/48\"], nat_address: [" + nat + "]}\n"
}

// TestNATAddress: an address is used that lies in the VPC and that nobody has; it is routed to
// us, told to its link, and no network may take it.
func TestNATAddress(t *testing.T) {
	h := host()
	h.Roots = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("fd00:31:0:1::9")}
	n := office(first, "172.16.0.0/12", "10.5.0.0/24")
	p := plan.Make(plan.Input{Config: load(t, vpcWith(`172.31.16.250, "fd00:31:0:1::250"`)), Host: h, Networks: []ztnode.Network{n}})
	if want := []plan.Announcement{{Addr: netip.MustParseAddr("172.31.16.250"), Device: "eth0"}, {Addr: netip.MustParseAddr("fd00:31:0:1::250"), Device: "eth0"}}; !slices.Equal(p.Announced, want) {
		t.Errorf("announced are %v, want %v", p.Announced, want)
	}
	if got := targets(p); !slices.Contains(got, "172.31.16.250/32") || !slices.Contains(got, "fd00:31:0:1::250/128") || !slices.Contains(got, "10.5.0.0/24") {
		t.Errorf("routes %v", got)
	}
	if len(p.Masquerade) != 2 {
		t.Fatalf("%+v", p.Masquerade)
	}
	for i, want := range []struct{ to, as, except string }{{"172.31.0.0/16", "172.31.16.250", "198.51.100.1/32"}, {"fd00:31::/48", "fd00:31:0:1::250", "fd00:31:0:1::9/128"}} {
		m := p.Masquerade[i]
		if m.To.String() != want.to || m.Address.String() != want.as || m.Host || len(m.Except) != 1 || m.Except[0].String() != want.except {
			t.Errorf("%+v, want %+v", m, want)
		}
	}
	// An address outside of the VPC's prefixes is as much ours.
	out := plan.Make(plan.Input{Config: load(t, vpcWith("10.44.0.9")), Host: host(), Networks: []ztnode.Network{office(first, "10.44.0.0/16")}})
	if got := strings.Join(texts(out), "\n"); !strings.Contains(got, "managed route 10.44.0.0/16 is not used: it covers our own address 10.44.0.9 in the VPC") {
		t.Errorf("problems:\n%s", got)
	}
	if out.Announced[0].Device != "" {
		t.Errorf("announced is %v", out.Announced)
	}
	// A forward may listen there.
	f := plan.Make(plan.Input{Config: load(t, vpcWith("172.31.16.250")+"forwards: [{listen: \"tcp/172.31.16.250:443\", to: \"10.0.0.10:443\"}]\n"), Host: host(), Networks: []ztnode.Network{office(first)}})
	if len(f.Forwards) != 1 || len(f.Problems) > 0 {
		t.Errorf("forwards %v, problems %q", f.Forwards, texts(f))
	}
}

// TestNATHost: by the host's own address nobody reaches the host itself; families with an
// address of their own don't need it, and without sources it holds for everybody.
func TestNATHost(t *testing.T) {
	p := plan.Make(plan.Input{Config: load(t, vpcWith("172.31.16.250, host")), Host: host()})
	if len(p.Masquerade) != 2 || p.Masquerade[0].Host || !p.Masquerade[1].Host || p.Masquerade[1].Address.IsValid() {
		t.Errorf("%+v", p.Masquerade)
	}
	p = plan.Make(plan.Input{Config: load(t, "vpc: {nat_address: [host]}\n"), Host: host()})
	if len(p.Masquerade) != 2 || p.Masquerade[0].To.Bits() != 0 || !p.Masquerade[0].Host {
		t.Fatalf("%+v", p.Masquerade)
	}
	for _, a := range []string{"172.31.16.5/32", "172.17.0.1/32", "192.168.77.1/32", "100.127.255.1/32"} {
		if !slices.Contains(p.Masquerade[0].Except, netip.MustParsePrefix(a)) {
			t.Errorf("%s of this host is reached: %v", a, p.Masquerade[0].Except)
		}
	}
	if p := plan.Make(plan.Input{Role: plan.Member, Config: load(t, vpcWith("host")), Host: host()}); len(p.Masquerade) > 0 {
		t.Errorf("a member: %+v", p.Masquerade)
	}
}

// TestNATAddressRefused: what can never work is an error, what the host speaks against a
// problem; then overlay hosts are refused, and not shown by another address.
func TestNATAddressRefused(t *testing.T) {
	for nat, why := range map[string]string{
		"169.254.1.1": "link-local", "127.0.0.1": "loopback", "224.0.0.1": "multicast", "172.31.255.255": "broadcast", "100.127.255.1": "vpc.address",
		"168.63.129.16": "metadata",
	} {
		if err := plan.Check(load(t, vpcWith(nat))); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", nat, err, why)
		}
	}
	if err := plan.Check(load(t, vpcWith("10.77.0.9")+"maps: [{hosts: overlay, real: 10.0.0.0/24, alias: 10.77.0.0/24}]\n")); err == nil || !strings.Contains(err.Error(), "alias") {
		t.Errorf("in an alias: %v", err)
	}
	h := host()
	h.Routes = append(h.Routes, plan.KernelRoute{Target: netip.MustParsePrefix("172.31.20.7/32"), Via: netip.MustParseAddr("172.31.16.9"), Device: "eth0"})
	for nat, why := range map[string]string{
		"172.31.16.5":   "this host's kernel has it on eth0, and keeps what comes for it; run ip address del 172.31.16.5 dev eth0",
		"172.31.16.1":   "this host sends the overlay's own packets to it",
		"172.31.20.7":   "the kernel already has a route to it on eth0",
		"172.31.31.255": "broadcast",
	} {
		p := plan.Make(plan.Input{Config: load(t, vpcWith(nat)), Host: h})
		if got := strings.Join(texts(p), "\n"); !strings.Contains(got, why) {
			t.Errorf("%s: %q, want %q", nat, got, why)
		}
		if len(p.Announced) > 0 || len(p.Masquerade) != 1 || p.Masquerade[0].Address.IsValid() || p.Masquerade[0].Host {
			t.Errorf("%s: %+v, %v", nat, p.Masquerade, p.Announced)
		}
	}
	// Of a family that the VPC doesn't have.
	p := plan.Make(plan.Input{Config: load(t, "vpc: {sources: [172.31.0.0/16], nat_address: [\"fd00:31::9\"]}\n"), Host: host()})
	if got := strings.Join(texts(p), "\n"); !strings.Contains(got, "vpc.sources has no prefix of the family of fd00:31::9") {
		t.Errorf("problems %q", got)
	}
}

// Who is carried on as this host, or to the internet, doesn't get to what this host and its
// neighbours answer for too: broadcast and anycast addresses of its subnets.
func TestNATEverybody(t *testing.T) {
	h := host()
	h.Routes = append(h.Routes, plan.KernelRoute{Target: netip.MustParsePrefix("198.51.100.0/26"), Device: "eth1"},
		plan.KernelRoute{Target: netip.MustParsePrefix("2600:5::/64"), Device: "eth1"}, plan.KernelRoute{Target: netip.MustParsePrefix("198.51.100.128/31"), Device: "eth2"})
	for _, config := range []string{
		"vpc: {sources: [172.31.0.0/16, 198.51.100.0/24, \"fd00:31::/32\", \"2600:5::/56\"], nat_address: host}\n",
		"vpc: {nat_address: 172.31.200.1}\nexit: true\n",
		"exit: true\n",
	} {
		p := plan.Make(plan.Input{Config: load(t, config), Host: h})
		for _, m := range p.Masquerade {
			if !m.Host && !m.Invites {
				continue
			}
			for _, a := range nettest.Prefixes("172.31.31.255/32", "172.31.16.0/32", "172.17.255.255/32", "198.51.100.63/32", "198.51.100.0/32", "fd00:31:0:1::/128", "2600:5::/128") {
				excepted := slices.ContainsFunc(m.Except, func(p netip.Prefix) bool { return p.Contains(a.Addr()) })
				if m.To.Contains(a.Addr()) && !excepted {
					t.Errorf("%q: %v is reached through %v", config, a, m.To)
				}
			}
			if slices.ContainsFunc(m.Except, func(p netip.Prefix) bool {
				return p.IsSingleIP() && slices.Contains(nettest.Prefixes("198.51.100.128/32", "198.51.100.129/32", "10.99.0.0/32", "10.99.255.255/32"), p)
			}) {
				t.Errorf("%q: hosts are left out: %v", config, m.Except)
			}
		}
	}
}
