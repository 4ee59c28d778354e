package netstack

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

func forward(from Side, proto uint8, listen, to string, masquerade bool) PortForward {
	return PortForward{From: from, Proto: proto, Listen: netip.MustParseAddrPort(listen), To: netip.MustParseAddrPort(to), Masquerade: masquerade}
}

func withForwards(list ...PortForward) func(*Config) {
	return func(c *Config) { c.Forwards = list }
}

func TestForwardFromOverlay(t *testing.T) {
	for _, masquerade := range []bool{false, true} {
		r := newRig(t, withForwards(forward(OverlaySide, ipkt.UDP, "10.0.0.1:9051", "172.31.0.20:91", masquerade)))
		src := "10.0.0.10:3333"
		_, v := r.fromOverlay(pkttest.UDP(src, "10.0.0.1:9051", "question"))
		if masquerade {
			src = "172.31.0.1:3333"
		}
		r.want("L-FWD-SRC", v, "udp "+src+" > 172.31.0.20:91")
		o, _ := r.fromVPC(pkttest.UDP("172.31.0.20:91", src, "answer"))
		r.want("answer", o, "udp 10.0.0.1:9051 > 10.0.0.10:3333")
		// Another peer with the same port.
		_, v = r.fromOverlay(pkttest.UDP("10.0.0.11:3333", "10.0.0.1:9051", "question"))
		if len(v) != 1 || masquerade == (v[0] == "udp 10.0.0.11:3333 > 172.31.0.20:91") {
			t.Errorf("L-FWD: second peer arrives as %q", v)
		}
		// The target's error.
		o, _ = r.fromVPC(pkttest.ICMPError("172.31.0.20", pkttest.Addr(src).Addr().String(), 3, 3, 0, pkttest.UDP(src, "172.31.0.20:91", "x"), 28))
		r.want("5508-REQ-5a", o, "icmp 3/3 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:3333 > 10.0.0.1:9051]")
	}
}

// TestForwardAfterLoss: L-LOSS-FWD, the target speaks first in a flow that isn't
// known.
func TestForwardAfterLoss(t *testing.T) {
	r := newRig(t, withForwards(forward(OverlaySide, ipkt.TCP, "10.0.0.1:9050", "172.31.0.20:90", false)))
	o, _ := r.fromVPC(pkttest.TCP("172.31.0.20:90", "10.0.0.10:3333", ipkt.ACK, 1, 1, "data"))
	r.want("L-LOSS-FWD", o, "tcp 10.0.0.1:9050 > 10.0.0.10:3333")
}

func TestForwardFromVPC(t *testing.T) {
	r := newRig(t, withForwards(forward(VPCSide, ipkt.TCP, "172.31.0.1:8443", "10.0.0.10:443", true), forward(VPCSide, ipkt.TCP, "0.0.0.0:8088", "172.31.0.20:80", false)))
	o, _ := r.fromVPC(pkttest.TCP("172.31.0.10:4000", "172.31.0.1:8443", ipkt.SYN, 1, 0, ""))
	r.want("to the overlay", o, "tcp 10.0.0.1:4000 > 10.0.0.10:443")
	_, v := r.fromOverlay(pkttest.TCP("10.0.0.10:443", "10.0.0.1:4000", ipkt.SYN|ipkt.ACK, 1, 2, ""))
	r.want("answer", v, "tcp 172.31.0.1:8443 > 172.31.0.10:4000")
	// Back into the VPC, also for the target itself.
	for _, client := range []string{"172.31.0.11", "172.31.0.20"} {
		_, v = r.fromVPC(pkttest.TCP(client+":5000", "172.31.0.1:8088", ipkt.SYN, 1, 0, ""))
		if len(v) != 1 {
			t.Fatalf("L-HAIRPIN from %s: %q", client, v)
		}
		var port int
		fmt.Sscanf(v[0], "tcp 172.31.0.1:%d > 172.31.0.20:80", &port)
		_, v = r.fromVPC(pkttest.TCP("172.31.0.20:80", fmt.Sprintf("172.31.0.1:%d", port), ipkt.SYN|ipkt.ACK, 1, 2, ""))
		r.want("L-HAIRPIN answer", v, "tcp 172.31.0.1:8088 > "+client+":5000")
	}
	r.drain()
	r.account()
}

// TestForwardSides: a forward is for clients of one side, those of the other don't
// reach it; the same address may lead to different hosts.
func TestForwardSides(t *testing.T) {
	fromVPC, fromOverlay := forward(VPCSide, ipkt.UDP, "0.0.0.0:9051", "172.31.0.20:91", false), forward(OverlaySide, ipkt.UDP, "0.0.0.0:9051", "172.31.0.21:92", true)
	vpc := func(r *rig) []string {
		_, v := r.fromVPC(pkttest.UDP("172.31.0.10:3333", "10.0.0.1:9051", "x"))
		return v
	}
	overlay := func(r *rig) []string {
		_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:3333", "10.0.0.1:9051", "x"))
		return v
	}
	r := newRig(t, withForwards(fromVPC))
	r.want("from the overlay, where it isn't served", overlay(r))
	if n := r.drops(OverlaySide, dropNoFlow); n != 1 {
		t.Errorf("%d drops counted, want 1", n)
	}
	r.want("from the VPC", vpc(r), "udp 10.0.0.1:3333 > 172.31.0.20:91")
	// A target of VPC clients is no server of the overlay.
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.20:91", "10.0.0.10:3333", "x"))
	r.want("the target speaks by itself", o, "udp 10.0.0.1:91 > 10.0.0.10:3333")

	r = newRig(t, withForwards(fromOverlay))
	if x := r.e.Explain(Question{Protocol: ipkt.UDP, Src: pkttest.Addr("172.31.0.10:3333"), Dst: pkttest.Addr("10.0.0.1:9051")}); x.Verdict != "local" {
		t.Errorf("from the VPC, where it isn't served: %+v", x)
	}
	r.want("from the overlay", overlay(r), "udp 172.31.0.1:3333 > 172.31.0.21:92")

	r = newRig(t, withForwards(fromVPC, fromOverlay))
	r.want("both, from the overlay", overlay(r), "udp 172.31.0.1:3333 > 172.31.0.21:92")
	r.want("both, from the VPC", vpc(r), "udp 10.0.0.1:3333 > 172.31.0.20:91")
	// Taking the one of a flow's side away ends it; the other one stays.
	if err := r.e.SetTranslation([]PortForward{fromOverlay}, nil); err != nil {
		t.Fatal(err)
	}
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:3333", "10.0.0.1:9051", "x"))
	r.want("goes on", v, "udp 172.31.0.1:3333 > 172.31.0.21:92")
	_, v = r.fromVPC(pkttest.UDP("172.31.0.20:91", "10.0.0.1:3333", "x"))
	r.want("has ended", v)
	if err := r.e.SetTranslation([]PortForward{fromOverlay, fromOverlay}, nil); err == nil {
		t.Error("two of one side are accepted")
	}
}

// TestForwardRouted: a forward may name an address that is routed to the gateway.
func TestForwardRouted(t *testing.T) {
	for _, listen := range []string{"192.0.2.7", "172.31.0.99"} { // out of the VPC's range, and in it
		r := newRig(t, withForwards(forward(VPCSide, ipkt.UDP, listen+":443", "10.0.0.10:443", true), forward(VPCSide, ipkt.UDP, listen+":80", "172.31.0.20:8080", false),
			forward(VPCSide, ipkt.UDP, listen+":81", listen+":82", false)))
		for range 2 {
			o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", listen+":443", "x"))
			r.want("out", o, "udp 10.0.0.1:4000 > 10.0.0.10:443")
			_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:443", "10.0.0.1:4000", "x"))
			r.want("answer", v, "udp "+listen+":443 > 172.31.0.10:4000")
		}
		_, v := r.fromOverlay(pkttest.ICMPError("10.0.0.10", "10.0.0.1", 3, 3, 0, pkttest.UDP("10.0.0.1:4000", "10.0.0.10:443", "x"), 28))
		r.want("error of the target", v, "icmp 3/3 "+listen+" > 172.31.0.10 [17 172.31.0.10:4000 > "+listen+":443]")
		r.e.SetPolicy(policy.New(policy.Accept, nil))
		o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", listen+":443", "x"))
		r.want("after a reload", o, "udp 10.0.0.1:4000 > 10.0.0.10:443")
		// Back into the VPC.
		_, v = r.fromVPC(pkttest.UDP("172.31.0.10:4000", listen+":80", "x"))
		r.want("hairpin", v, "udp "+listen+":4000 > 172.31.0.20:8080")
		_, v = r.fromVPC(pkttest.UDP("172.31.0.20:8080", listen+":4000", "x"))
		r.want("hairpin answer", v, "udp "+listen+":80 > 172.31.0.10:4000")
		// Nothing else is served there, and nobody else.
		for _, b := range [][]byte{pkttest.UDP("172.31.0.10:4001", listen+":444", "x"), pkttest.TCP("172.31.0.10:4001", listen+":443", ipkt.SYN, 1, 0, "")} {
			o, v = r.fromVPC(b)
			if len(o) > 0 || len(v) != 1 || v[0][:8] != "icmp 3/0" {
				t.Errorf("other ports: %q %q", o, v)
			}
		}
		o, v = r.fromVPC(pkttest.UDP("172.31.0.10:4001", listen+":81", "x"))
		r.want("a forward to itself", append(o, v...))
		o, v = r.fromOverlay(pkttest.UDP("10.0.0.11:4001", listen+":443", "x"))
		r.want("from the overlay", append(o, v...))
		r.drain()
		r.account()
	}
	// The same for clients of the overlay.
	r := newRig(t, withForwards(forward(OverlaySide, ipkt.UDP, "192.0.2.7:443", "172.31.0.20:443", false)))
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.11:4001", "192.0.2.7:443", "x"))
	r.want("from the overlay", v, "udp 10.0.0.11:4001 > 172.31.0.20:443")
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.20:443", "10.0.0.11:4001", "x"))
	r.want("answer", o, "udp 192.0.2.7:443 > 10.0.0.11:4001")
	o, v = r.fromVPC(pkttest.UDP("172.31.0.10:4000", "192.0.2.7:443", "x"))
	r.want("from the VPC", append(o, v...), "icmp 3/0 172.31.0.1 > 172.31.0.10 [17 172.31.0.10:4000 > 192.0.2.7:443]")
}

func TestForwardShadow(t *testing.T) {
	r := newRig(t, withForwards(forward(OverlaySide, ipkt.UDP, "10.0.0.1:9051", "172.31.0.20:91", false)))
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:9051", "10.0.0.10:5555", "x"))
	if len(o) != 1 || o[0] == "udp 10.0.0.1:9051 > 10.0.0.10:5555" {
		t.Errorf("L-FWD-SHADOW: left as %q", o)
	}
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:5555", "10.0.0.1:9051", "x"))
	r.want("L-FWD-SHADOW", v, "udp 10.0.0.10:5555 > 172.31.0.20:91")
}

func TestHairpin(t *testing.T) {
	r := newRig(t)
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"), pkttest.UDP("172.31.0.11:5000", "10.0.0.10:53", "x"))
	_, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.1:5000", "x"))
	r.want("4787-REQ-9: the other one hasn't sent yet", v)
	_, v = r.fromVPC(pkttest.UDP("172.31.0.11:5000", "10.0.0.1:4000", "x"))
	r.want("4787-REQ-9a", v, "udp 10.0.0.1:5000 > 172.31.0.10:4000")
	_, v = r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.1:5000", "x"))
	r.want("4787-REQ-9", v, "udp 10.0.0.1:4000 > 172.31.0.11:5000")
	_, v = r.fromVPC(pkttest.ICMPError("172.31.0.11", "10.0.0.1", 3, 3, 0, pkttest.UDP("10.0.0.1:4000", "172.31.0.11:5000", "x"), 28))
	r.want("5508-REQ-7", v, "icmp 3/3 10.0.0.1 > 172.31.0.10 [17 172.31.0.10:4000 > 10.0.0.1:5000]")
}

func TestEndpointIndependentFiltering(t *testing.T) {
	r := newRig(t, func(c *Config) { c.NAT.FilterUDP = EndpointIndependent })
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"))
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.11:5999", "10.0.0.1:4000", "x"))
	r.want("4787-REQ-8", v, "udp 10.0.0.11:5999 > 172.31.0.10:4000")
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.11:5999", "x"))
	r.want("answer", o, "udp 10.0.0.1:4000 > 10.0.0.11:5999")
	_, v = r.fromOverlay(pkttest.TCP("10.0.0.11:5999", "10.0.0.1:4000", ipkt.SYN, 1, 0, ""))
	r.want("7857-S6", v)
}

func TestAddressMaps(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, func(c *Config) {
		c.Maps = []AddressMap{
			{Hosts: VPCSide, Real: p("172.31.5.0/28"), Alias: p("10.0.0.32/28")},
			{Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("100.64.7.0/24")},
		}
	})
	o, _ := r.fromVPC(pkttest.UDP("172.31.5.3:4000", "10.0.0.10:53", "x"))
	r.want("out, mapped source", o, "udp 10.0.0.35:4000 > 10.0.0.10:53")
	_, v := r.fromOverlay(pkttest.TCP("10.0.0.11:5", "10.0.0.36:22", ipkt.SYN, 1, 0, ""))
	r.want("in, both mapped", v, "tcp 100.64.7.11:5 > 172.31.5.4:22")
	o, _ = r.fromVPC(pkttest.TCP("172.31.5.4:22", "100.64.7.11:5", ipkt.SYN|ipkt.ACK, 1, 2, ""))
	r.want("answer", o, "tcp 10.0.0.36:22 > 10.0.0.11:5")
	o, _ = r.fromVPC(pkttest.UDP("172.31.0.10:4000", "100.64.7.12:53", "x"))
	r.want("alias, masqueraded", o, "udp 10.0.0.1:4000 > 10.0.0.12:53")
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.12:53", "10.0.0.1:4000", "x"))
	r.want("answer", v, "udp 100.64.7.12:53 > 172.31.0.10:4000")
	o, _ = r.fromVPC(pkttest.Packet{Proto: 50, Src: pkttest.Addr("172.31.5.3"), Dst: pkttest.Addr("10.0.0.10"), Payload: make([]byte, 20)}.Bytes())
	r.want("ESP is mapped by address", o, "proto 50 10.0.0.35 > 10.0.0.10")
}

func TestPrefixTranslation(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, func(c *Config) {
		c.Maps = []AddressMap{{Hosts: VPCSide, Real: p("fd77:1::/64"), Alias: p("2001:db8:aa::/64")}}
	})
	in := pkttest.UDP("[fd77:1::50]:4000", "[fd77:100::50]:53", "x")
	r.feed([][]byte{in}, nil)
	o, _ := r.takeRaw()
	if len(o) != 1 {
		t.Fatalf("%d packets out", len(o))
	}
	got := pkttest.Describe(o[0])
	if want := "udp [2001:db8:aa:0:cf15::50]:4000 > [fd77:100::50]:53"; got != want {
		t.Errorf("6296: %q, want %q", got, want)
	}
	if string(o[0][46:48]) != string(in[46:48]) {
		t.Errorf("6296: checksum changed from %x to %x", in[46:48], o[0][46:48])
	}
	_, v := r.fromOverlay(pkttest.UDP("[fd77:100::50]:53", "[2001:db8:aa:0:cf15::50]:4000", "x"))
	r.want("6296: answer", v, "udp [fd77:100::50]:53 > [fd77:1::50]:4000")
	_, v = r.fromOverlay(pkttest.UDP("[fd77:100::51]:1", "[2001:db8:aa:0:cf15::50]:22", "x"))
	r.want("6296: from outside", v, "udp [fd77:100::51]:1 > [fd77:1::50]:22")
}

func TestNAT66(t *testing.T) {
	r := newRig(t)
	n := testNetwork()
	n.Masquerade6 = true
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	o, _ := r.fromVPC(pkttest.UDP("[fd77:1::50]:4000", "[fd77:100::50]:53", "x"))
	r.want("V6-NAT66", o, "udp [fd77:100::1]:4000 > [fd77:100::50]:53")
	_, v := r.fromOverlay(pkttest.UDP("[fd77:100::50]:53", "[fd77:100::1]:4000", "x"))
	r.want("answer", v, "udp [fd77:100::50]:53 > [fd77:1::50]:4000")
	_, v = r.fromOverlay(pkttest.ICMPError("fd77:100::2", "fd77:100::1", 2, 0, 1280, pkttest.UDP("[fd77:100::1]:4000", "[fd77:100::50]:53", "x"), 200))
	r.want("V6-NAT66, too big", v, "icmp 2/0 fd77:100::2 > fd77:1::50 [17 [fd77:1::50]:4000 > [fd77:100::50]:53]")
	o, _ = r.fromVPC(pkttest.Echo("fd77:1::50", "fd77:100::50", false, 7, "x"))
	r.want("echo", o, "icmp 128/0 fd77:100::1 > fd77:100::50 id 7")
}

func TestExempt(t *testing.T) {
	r := newRig(t)
	n := testNetwork()
	n.Exempt = []netip.Prefix{netip.MustParsePrefix("10.0.0.11/32")}
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.11:53", "x"), pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"))
	r.want("6888-REQ-6", o, "udp 172.31.0.10:4000 > 10.0.0.11:53", "udp 10.0.0.1:4000 > 10.0.0.10:53")
}

func TestReload(t *testing.T) {
	r := newRig(t)
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"), pkttest.UDP("172.31.0.10:4000", "10.0.0.10:54", "x"))
	r.e.SetPolicy(policy.New(policy.Accept, []policy.Rule{{Action: policy.Drop, Ports: []policy.PortRange{{First: 54, Last: 54}}}}))
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "x"), pkttest.UDP("10.0.0.10:54", "10.0.0.1:4000", "x"))
	r.want("still allowed", v, "udp 10.0.0.10:53 > 172.31.0.10:4000")
	if n := len(r.e.Flows(FlowFilter{})); n != 1 {
		t.Errorf("%d flows, want 1", n)
	}
	// L-ADDR: another overlay address.
	n := testNetwork()
	n.Addresses[0] = netip.MustParsePrefix("10.0.0.7/24")
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	r.take()
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"))
	r.want("L-ADDR", o, "udp 10.0.0.7:4000 > 10.0.0.10:53")
}

func TestPolicy(t *testing.T) {
	rules := []policy.Rule{
		{Action: policy.Reject, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 23, Last: 23}}},
		{Action: policy.Drop, To: []netip.Prefix{netip.MustParsePrefix("10.0.0.99/32")}},
		{Action: policy.Accept, Direction: policy.In, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 22, Last: 22}}},
	}
	r := newRig(t, func(c *Config) { c.Policy = policy.New(policy.Accept, rules) })
	n := testNetwork()
	n.Masquerade = false
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	_, v := r.fromVPC(pkttest.TCP("172.31.0.10:4000", "10.0.0.10:23", ipkt.SYN, 1, 0, ""))
	r.want("reject", v, "tcp 10.0.0.10:23 > 172.31.0.10:4000")
	o, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.99:53", "x"))
	r.want("drop", append(o, v...))
	_, v = r.fromOverlay(pkttest.TCP("10.0.0.10:4000", "172.31.0.10:22", ipkt.SYN, 1, 0, ""), pkttest.TCP("10.0.0.10:4000", "172.31.0.10:80", ipkt.SYN, 1, 0, ""))
	r.want("inbound only where a rule for it says so", v, "tcp 10.0.0.10:4000 > 172.31.0.10:22")
	pol := r.e.set.Load().policy
	for rule, want := range map[int]uint64{0: 1, 1: 1, 2: 1, -1: 0} {
		if got := pol.Hits(rule); got != want {
			t.Errorf("rule %d: %d hits, want %d", rule, got, want)
		}
	}
}

func TestNeverForwarded(t *testing.T) {
	r := newRig(t)
	n := testNetwork()
	n.Routes = append(n.Routes, Route{Target: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.0.2")})
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{"169.254.169.254", "240.0.0.1", "255.255.255.255", "224.0.0.251", "10.0.0.255", "172.31.0.255"} {
		o, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", dst+":80", "x"))
		r.want("to "+dst, append(o, v...))
	}
	for _, src := range []string{"169.254.1.1", "203.0.113.9", "10.0.0.1", "172.31.0.1", "172.31.0.255"} {
		o, v := r.fromVPC(pkttest.UDP(src+":4000", "10.0.0.10:80", "x"))
		r.want("from "+src, append(o, v...))
	}
	o, v := r.fromOverlay(pkttest.UDP("10.0.0.10:1", "169.254.169.254:80", "x"), pkttest.UDP("172.31.0.10:1", "10.0.0.1:80", "x"))
	r.want("from the overlay", append(o, v...))
	r.drain()
	r.account()
}

// TestMetadata: nobody reaches the metadata service of another machine's cloud, by
// whatever route, alias or forward.
func TestMetadata(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, withForwards(forward(VPCSide, ipkt.UDP, "172.31.0.1:80", "100.100.100.200:80", false), forward(VPCSide, ipkt.UDP, "[fd77:1::1]:80", "[fd00:ec2::254]:80", false)),
		func(c *Config) {
			c.Maps = []AddressMap{{Hosts: OverlaySide, Real: p("169.254.169.0/24"), Alias: p("10.66.0.0/24")}, {Hosts: OverlaySide, Real: p("168.63.129.0/24"), Alias: p("10.67.0.0/24")}}
		})
	n := testNetwork()
	n.Routes = append(n.Routes, Route{p("0.0.0.0/0"), netip.MustParseAddr("10.0.0.2")}, Route{p("::/0"), netip.MustParseAddr("fd77:100::2")},
		Route{Target: p("100.100.100.0/24")}, Route{Target: p("fd00:ec2::/32")}, Route{Target: p("168.63.129.16/32")})
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{"169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "172.31.0.1", "10.66.0.254", "10.67.0.16"} {
		o, v := r.fromVPC(pkttest.UDP("172.31.0.10:4000", dst+":80", "x"), pkttest.TCP("172.31.0.10:4001", dst+":80", ipkt.SYN, 1, 0, ""))
		if len(o) > 0 || len(v) > 0 && dst != "172.31.0.1" {
			t.Errorf("to %s: %q %q", dst, o, v)
		}
	}
	for _, dst := range []string{"fd00:ec2::254", "fd00:ec2::123", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fe80::1", "64:ff9b::a9fe:a9fe", "fd77:1::1"} {
		o, v := r.fromVPC(pkttest.UDP("[fd77:1::50]:4000", "["+dst+"]:80", "x"))
		r.want("to "+dst, append(o, v...))
	}
	if got := r.drops(VPCSide, dropForbidden); got != 14+7+1 { // TCP to our own address has no forward
		t.Errorf("%d were forbidden", got)
	}
	o, v := r.fromOverlay(pkttest.UDP("10.0.0.10:1", "168.63.129.16:80", "x"), pkttest.UDP("100.100.100.200:80", "172.31.0.10:1", "x"))
	r.want("from the overlay", append(o, v...))
}

// TestErrorLimit: errors to one destination are limited, and others still get
// theirs.
func TestErrorLimit(t *testing.T) {
	r := newRig(t)
	count := func(src string, n int) (out int) {
		for range n {
			_, v := r.fromVPC(pkttest.Packet{Src: pkttest.Addr(src), Dst: pkttest.Addr("10.0.0.10:80"), TTL: 1}.Bytes())
			out += len(v)
		}
		return out
	}
	if n := count("172.31.0.10:4000", 5000); n == 0 || n > 300 {
		t.Errorf("1812-4.3.2.8: %d errors for 5000 packets", n)
	}
	for range 10 { // mtr -i 0.2 from another host
		if n := count("172.31.0.11:4000", 1); n != 1 {
			t.Error("1812-4.3.2.8: mtr would see a loss")
		}
		r.sleep(200 * time.Millisecond)
	}
}

func TestTableFullIsTold(t *testing.T) {
	r := newRig(t, func(c *Config) { c.NAT = NAT{MaxFlows: 10, MaxFlowsPerClient: 10} })
	for i := range 10 {
		r.fromVPC(pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 4000+i), "10.0.0.10:53", "x"))
		r.fromOverlay(pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 4000+i), "x"))
		r.fromVPC(pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 4000+i), "10.0.0.10:53", "x"))
	}
	_, v := r.fromVPC(pkttest.UDP("172.31.0.11:5000", "10.0.0.10:53", "x"))
	r.want("D3", v, "icmp 3/1 172.31.0.1 > 172.31.0.11 [17 172.31.0.11:5000 > 10.0.0.10:53]")
	if n := r.drops(VPCSide, dropTableFull); n != 1 {
		t.Errorf("%d drops counted, want 1", n)
	}
}

func TestFragmentIDs(t *testing.T) {
	r := newRig(t)
	ids := map[uint16]int{}
	for _, src := range []string{"172.31.0.10:4000", "172.31.0.11:4001"} {
		b := pkttest.Packet{Src: pkttest.Addr(src), Dst: pkttest.Addr("10.0.0.10:53"), ID: 0x7777, Payload: make([]byte, 2048)}.Bytes()
		parts := pkttest.Fragments(b, 800, 800)
		slices.Reverse(parts)
		r.feed(parts, nil)
		o, _ := r.takeRaw()
		if len(o) != 3 {
			t.Fatalf("4787-REQ-14: %d fragments out", len(o))
		}
		for _, f := range o {
			ids[uint16(f[4])<<8|uint16(f[5])]++
		}
	}
	if len(ids) != 2 {
		t.Errorf("7857-S11: IDs %v of two packets", ids)
	}
}

func TestMSS(t *testing.T) {
	r := newRig(t)
	n := testNetwork()
	n.MTU = 1400
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	mss := func(b []byte) uint16 {
		var v ipkt.View
		ipkt.Parse(b, &v)
		return v.MSS()
	}
	for in, want := range map[uint16]uint16{1460: 1360, 536: 536, 1361: 1360, 0: 0} {
		p := pkttest.Packet{Proto: ipkt.TCP, Flags: ipkt.SYN, Src: pkttest.Addr(fmt.Sprintf("172.31.0.10:%d", 5000+in)), Dst: pkttest.Addr("10.0.0.10:80"), Seq: 1}
		if in > 0 {
			p.Options = []byte{2, 4, byte(in >> 8), byte(in)}
		}
		r.feed([][]byte{p.Bytes()}, nil)
		o, _ := r.takeRaw()
		if len(o) != 1 || mss(o[0]) != want || pkttest.Describe(o[0]) != fmt.Sprintf("tcp 10.0.0.1:%d > 10.0.0.10:80", 5000+in) {
			t.Errorf("L-MSS: %d became %d", in, mss(o[0]))
		}
	}
	p := pkttest.Packet{Proto: ipkt.TCP, Flags: ipkt.SYN | ipkt.ACK, Src: pkttest.Addr("10.0.0.10:80"), Dst: pkttest.Addr("10.0.0.1:6460"), Seq: 9, Ack: 2, Options: []byte{2, 4, 5, 180}}
	r.feed(nil, [][]byte{p.Bytes()})
	if _, v := r.takeRaw(); len(v) != 1 || mss(v[0]) != 1360 {
		t.Error("L-MSS: SYN/ACK not clamped")
	}
}

// TestSetMTU changes the MTU of the VPC device under flows of both paths.
func TestSetMTU(t *testing.T) {
	r := newRig(t)
	mss := func() uint16 {
		p := pkttest.Packet{Proto: ipkt.TCP, Flags: ipkt.SYN, Src: pkttest.Addr(fmt.Sprintf("172.31.0.10:%d", 5000+len(r.e.Flows(FlowFilter{})))),
			Dst: pkttest.Addr("10.0.0.10:80"), Seq: 1, Options: []byte{2, 4, 0xff, 0xff}}
		r.feed([][]byte{p.Bytes()}, nil)
		o, _ := r.takeRaw()
		var v ipkt.View
		ipkt.Parse(o[0], &v)
		return v.MSS()
	}
	answer := func(df bool) []string {
		p := pkttest.Packet{Src: pkttest.Addr("10.0.0.10:53"), Dst: pkttest.Addr("10.0.0.1:4000"), Payload: make([]byte, 1472), DF: df}
		o, v := r.fromOverlay(p.Bytes())
		return append(o, v...)
	}
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"))
	r.want("fits", answer(true), "udp 10.0.0.10:53 > 172.31.0.10:4000")
	if got := mss(); got != 2760 {
		t.Errorf("MSS %d, want 2760", got)
	}
	if err := r.e.SetMTU(1400); err != nil {
		t.Fatal(err)
	}
	r.want("too big now", answer(true), "icmp 3/4 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:53 > 10.0.0.1:4000]")
	if got := len(answer(false)); got != 2 {
		t.Errorf("%d fragments, want 2", got)
	}
	if got := mss(); got != 1360 {
		t.Errorf("MSS %d, want 1360", got)
	}
	if err := r.e.SetMTU(1279); err == nil {
		t.Error("too small for IPv6, and accepted")
	}
	if err := r.e.SetMTU(1500); err != nil {
		t.Fatal(err)
	}
	r.want("fits again", answer(true), "udp 10.0.0.10:53 > 172.31.0.10:4000")
}

func TestExplain(t *testing.T) {
	r := newRig(t, withForwards(forward(OverlaySide, ipkt.TCP, "10.0.0.1:8443", "172.31.0.20:443", false)), func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 23, Last: 23}}}})
	})
	ask := func(overlay bool, src, dst string) Explanation {
		return r.e.Explain(Question{FromOverlay: overlay, Network: testNet, Protocol: ipkt.TCP, Src: pkttest.Addr(src), Dst: pkttest.Addr(dst)})
	}
	for _, tt := range []struct {
		overlay  bool
		src, dst string
		want     string
	}{
		{false, "172.31.0.10:4000", "10.0.0.10:443", "forward  rule -1 masquerade 10.0.0.1:0 > 10.0.0.10:443 by 10.0.0.0/24 hop 10.0.0.10"},
		{false, "172.31.0.10:4000", "10.9.1.1:443", "forward  rule -1 masquerade 10.0.0.1:0 > 10.9.1.1:443 by 10.9.0.0/16 hop 10.0.0.2"},
		{false, "172.31.0.10:4000", "10.0.0.10:23", "reject policy rule 0 keep 172.31.0.10:4000 > 10.0.0.10:23 by invalid Prefix hop invalid IP"},
		{false, "172.31.0.10:4000", "192.0.2.1:443", "reject no_route rule -2 keep 172.31.0.10:4000 > 192.0.2.1:443 by invalid Prefix hop invalid IP"},
		{false, "172.31.0.10:4000", "169.254.169.254:80", "drop forbidden_address rule -2 keep 172.31.0.10:4000 > 169.254.169.254:80 by invalid Prefix hop invalid IP"},
		{false, "172.31.0.10:4000", "172.31.0.1:80", "local  rule -2 keep 172.31.0.10:4000 > 172.31.0.1:80 by invalid Prefix hop invalid IP"},
		{true, "10.0.0.10:4000", "10.0.0.1:8443", "forward  rule -1 keep 10.0.0.10:4000 > 172.31.0.20:443 by invalid Prefix hop invalid IP"},
		{true, "10.0.0.10:4000", "10.0.0.1:80", "drop no_flow rule -2 keep 10.0.0.10:4000 > 10.0.0.1:80 by invalid Prefix hop invalid IP"},
		{true, "172.31.0.10:4000", "10.0.0.1:80", "drop spoofed_source rule -2 keep 172.31.0.10:4000 > 10.0.0.1:80 by invalid Prefix hop invalid IP"},
	} {
		x := ask(tt.overlay, tt.src, tt.dst)
		got := fmt.Sprintf("%s %s rule %d %s %v > %v by %v hop %v", x.Verdict, x.Reason, x.Rule, x.SourceHow, x.Source, x.Destination, x.Route, x.NextHop)
		if got != tt.want {
			t.Errorf("%s > %s:\n got %s\nwant %s", tt.src, tt.dst, got, tt.want)
		}
	}
	if h := r.e.set.Load().policy.Hits(0); h != 0 {
		t.Errorf("asking counted %d hits", h)
	}
	r.fromVPC(pkttest.TCP("172.31.0.10:4000", "10.0.0.10:443", ipkt.SYN, 1, 0, ""))
	if x := ask(false, "172.31.0.10:4000", "10.0.0.10:443"); !x.Established || x.Source.Port() != 4000 {
		t.Errorf("of a known flow: %+v", x)
	}
}

func TestNoAllocs(t *testing.T) {
	r := newRig(t)
	b := pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "question")
	back := pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "answer")
	r.fromVPC(b)
	r.fromOverlay(back)
	bufs, sizes := [][]byte{make([]byte, vpcOffset+readSize)}, []int{len(b)}
	h := ethernetHeader(ourMAC, hostMAC, false)
	frames := [][]byte{append(h[:], back...)}
	r.e.cfg.Overlay, r.e.dev = discardOverlay{}, discardDevice{}
	if n := testing.AllocsPerRun(100, func() {
		copy(bufs[0][vpcOffset:], b)
		r.e.vpcBatch(bufs, sizes)
		copy(frames[0][ethernetLen:], back)
		r.e.Deliver(testNet, frames)
	}); n != 0 {
		t.Errorf("%v allocations for a packet each way", n)
	}
}

type discardOverlay struct{}

func (discardOverlay) WriteFrames(_ uint64, bufs [][]byte, _ []int, _ int) (int, error) {
	return len(bufs), nil
}

type discardDevice struct{ Device }

func (discardDevice) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

// A member behind a path that carries less than usual gets small segments, from both
// ends of a connection, whatever the client's MTU is and whether the member is known or
// has to be looked for; other members get what they always got.
func TestMSSFollowsPath(t *testing.T) {
	carries := map[[6]byte]int{hostMAC: 1334}
	r := newRig(t, func(c *Config) {
		c.PathMTU = func(nwid uint64, member [6]byte) int {
			if nwid != testNet {
				t.Errorf("asked about network %x", nwid)
			}
			return carries[member]
		}
	})
	n := testNetwork()
	n.Direct = 1394
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	r.take()
	port := uint16(5000)
	mss := func(in uint16, host string) (syn, answer uint16) {
		t.Helper()
		port++
		read := func(list [][]byte) uint16 {
			var v ipkt.View
			if len(list) != 1 || ipkt.Parse(list[0], &v) != ipkt.OK || !v.ChecksumOK() {
				t.Fatalf("%d packets", len(list))
			}
			return v.MSS()
		}
		client, server := fmt.Sprintf("172.31.0.10:%d", port), host+":80"
		outside := fmt.Sprintf("10.0.0.1:%d", port)
		if strings.Contains(host, ":") {
			client, server = fmt.Sprintf("[fd77:1::10]:%d", port), "["+host+"]:80"
			outside = client
		}
		p := pkttest.Packet{Proto: ipkt.TCP, Flags: ipkt.SYN, Src: pkttest.Addr(client), Dst: pkttest.Addr(server), Seq: 1, Options: []byte{2, 4, byte(in >> 8), byte(in)}}
		r.feed([][]byte{p.Bytes()}, nil)
		o, _ := r.takeRaw()
		syn = read(o)
		p = pkttest.Packet{Proto: ipkt.TCP, Flags: ipkt.SYN | ipkt.ACK, Src: pkttest.Addr(server), Dst: pkttest.Addr(outside), Seq: 9, Ack: 2, Options: []byte{2, 4, byte(in >> 8), byte(in)}}
		r.feed(nil, [][]byte{p.Bytes()})
		_, v := r.takeRaw()
		return syn, read(v)
	}
	for _, c := range []struct {
		in    uint16
		host  string
		path  int
		want  uint16
		fresh bool
	}{
		{1460, "10.0.0.10", 1334, 1294, true},
		{1460, "10.0.0.10", 1334, 1294, false},
		{8960, "10.0.0.10", 1334, 1294, false}, // else it would fill whole frames
		{1000, "10.0.0.10", 1334, 1000, false},
		{1460, "fd77:100::10", 1334, 1274, true},
		{1460, "10.0.0.11", 0, 1354, true},
		{8960, "10.0.0.11", 0, 2760, false},
		{1460, "10.0.0.11", 8862, 1354, false}, // nobody else's path is the longer for it
		{1460, "10.0.0.11", 1, 400, false},
	} {
		carries[hostMAC] = c.path
		if _, known := r.e.Neighbour(testNet, netip.MustParseAddr(c.host)); known == c.fresh {
			t.Errorf("%s: known: %v", c.host, known)
		}
		if syn, answer := mss(c.in, c.host); syn != c.want || answer != c.want {
			t.Errorf("%s with %d over a path of %d: SYN %d, answer %d, want %d", c.host, c.in, c.path, syn, answer, c.want)
		}
	}
}

// TestForwardShown: without masquerading the host sees the client itself, whatever the
// network does otherwise, and what it sends back comes from the forward.
func TestForwardShown(t *testing.T) {
	for _, tt := range []struct{ client, listen, host string }{
		{"172.31.0.10:4000", "192.0.2.7:443", "10.0.0.10:8443"},
		{"172.31.0.10:4000", "10.0.0.1:443", "10.9.0.10:8443"}, // behind a router
		{"[fd77:1::10]:4000", "[fd00:7::7]:443", "[fd77:100::10]:8443"},
	} {
		for _, masquerades := range []bool{true, false} {
			tcp, udp := forward(VPCSide, ipkt.TCP, tt.listen, tt.host, false), forward(VPCSide, ipkt.UDP, tt.listen, tt.host, false)
			r := newRig(t, withForwards(tcp, udp))
			n := testNetwork()
			n.Masquerade, n.Masquerade6 = masquerades, masquerades
			if err := r.e.SetNetworks([]Network{n}); err != nil {
				t.Fatal(err)
			}
			r.take()
			o, _ := r.fromVPC(pkttest.UDP(tt.client, tt.listen, "x"), pkttest.TCP(tt.client, tt.listen, ipkt.SYN, 1, 0, ""))
			r.want("out", o, "udp "+tt.client+" > "+tt.host, "tcp "+tt.client+" > "+tt.host)
			for range 2 { // along both paths
				_, v := r.fromOverlay(pkttest.UDP(tt.host, tt.client, "x"), pkttest.TCP(tt.host, tt.client, ipkt.SYN|ipkt.ACK, 1, 2, ""))
				r.want("answers", v, "udp "+tt.listen+" > "+tt.client, "tcp "+tt.listen+" > "+tt.client)
			}
			x := r.e.Explain(Question{Protocol: ipkt.TCP, Src: pkttest.Addr(tt.client), Dst: pkttest.Addr(tt.listen)})
			if x.SourceHow != "keep" || x.Destination != pkttest.Addr(tt.host) || !x.Established {
				t.Errorf("%+v", x)
			}
			// Nobody gets in without having been asked.
			o, v := r.fromOverlay(pkttest.UDP(tt.host, strings.Replace(tt.client, ":4000", ":4001", 1), "x"))
			r.want("uninvited", append(o, v...))
			// After a restart the host may speak first.
			again := newRig(t, withForwards(tcp, udp), func(c *Config) { c.Mappings = r.e.Mappings() })
			if err := again.e.SetNetworks([]Network{n}); err != nil {
				t.Fatal(err)
			}
			again.take()
			_, v = again.fromOverlay(pkttest.UDP(tt.host, tt.client, "x"))
			r.want("after a restart", v, "udp "+tt.listen+" > "+tt.client)
			// Its end by a reload.
			if err := r.e.SetTranslation(nil, nil); err != nil {
				t.Fatal(err)
			}
			_, v = r.fromOverlay(pkttest.UDP(tt.host, tt.client, "x"))
			r.want("without the forward", v)
			r.drain()
			r.account()
		}
	}
}
