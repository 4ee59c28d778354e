package netstack

import (
	"fmt"
	"net/netip"
	"testing"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// overlapping is a VPC whose range is the network's as well: 10.0.0.0/24, where the
// VPC has hosts of its own at 10.0.0.1 and 10.0.0.10. Its hosts know the network's as
// 10.77.0.0/24, which know the VPC's as 10.88.0.0/24.
func overlapping(c *Config) {
	p := netip.MustParsePrefix
	c.VPC = VPC{Addresses: []netip.Prefix{p("172.31.0.1/24")}, Sources: []netip.Prefix{p("10.0.0.0/24"), p("172.31.0.0/16")}}
	c.Maps = []AddressMap{
		{Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.77.0.0/24")},
		{Hosts: VPCSide, Real: p("10.0.0.0/24"), Alias: p("10.88.0.0/24")},
	}
	c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In, Proto: ipkt.TCP}})
}

// masqueraded is without the map for VPC hosts, which the network sees as the gateway.
func masqueraded(c *Config) {
	overlapping(c)
	c.Maps = c.Maps[:1]
}

func TestOverlap(t *testing.T) {
	r := newRig(t, masqueraded)
	for range 3 { // the first packets open the flow, the others take the fast path
		o, _ := r.fromVPC(pkttest.UDP("10.0.0.55:4000", "10.77.0.10:53", "x"))
		r.want("to the alias", o, "udp 10.0.0.1:4000 > 10.0.0.10:53")
		_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "x"))
		r.want("answer", v, "udp 10.77.0.10:53 > 10.0.0.55:4000")
	}
	for _, src := range []string{"10.0.0.10:4001", "10.0.0.1:4002"} {
		o, _ := r.fromVPC(pkttest.UDP(src, "10.77.0.10:53", "x"))
		r.want("VPC host with an address of the network", o, "udp 10.0.0.1:"+src[len(src)-4:]+" > 10.0.0.10:53")
		_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:"+src[len(src)-4:], "x"))
		r.want("answer", v, "udp 10.77.0.10:53 > "+src)
	}
	o, v := r.fromVPC(pkttest.UDP("10.0.0.55:4000", "10.0.0.10:53", "x"))
	r.want("the VPC's host, which isn't here", append(o, v...), "icmp 3/0 172.31.0.1 > 10.0.0.55 [17 10.0.0.55:4000 > 10.0.0.10:53]")
	o, v = r.fromVPC(pkttest.Echo("10.0.0.55", "10.0.0.1", false, 7, "x"))
	r.want("the VPC's host at the gateway's address", append(o, v...), "icmp 3/0 172.31.0.1 > 10.0.0.55 [1 10.0.0.55 > 10.0.0.1 id 7]")
	o, v = r.fromVPC(pkttest.UDP("10.0.0.55:4000", "10.77.0.1:53", "x"), pkttest.UDP("10.0.0.55:4000", "10.77.0.255:53", "x"), pkttest.UDP("10.77.0.9:4000", "10.77.0.10:53", "x"))
	r.want("the gateway's alias, a broadcast, a forged source", append(o, v...))
	r.drain()
	r.account()
}

func TestOverlapFromOverlay(t *testing.T) {
	r := newRig(t, overlapping)
	for range 2 {
		_, v := r.fromOverlay(pkttest.TCP("10.0.0.10:5", "10.88.0.10:22", ipkt.SYN, 1, 0, ""))
		r.want("both mapped", v, "tcp 10.77.0.10:5 > 10.0.0.10:22")
		o, _ := r.fromVPC(pkttest.TCP("10.0.0.10:22", "10.77.0.10:5", ipkt.SYN|ipkt.ACK, 1, 2, ""))
		r.want("answer", o, "tcp 10.88.0.10:22 > 10.0.0.10:5")
	}
	_, v := r.fromOverlay(pkttest.TCP("10.0.0.10:6", "172.31.0.9:22", ipkt.SYN, 1, 0, ""))
	r.want("source mapped", v, "tcp 10.77.0.10:6 > 172.31.0.9:22")
	o, v := r.fromOverlay(pkttest.TCP("10.0.0.10:7", "10.0.0.55:22", ipkt.SYN, 1, 0, ""))
	r.want("a member of the network, whatever the VPC has there", append(o, v...))
	if n := r.drops(OverlaySide, dropNoFlow); n != 1 {
		t.Errorf("%d drops counted, want 1", n)
	}
	o, _ = r.fromVPC(pkttest.UDP("10.0.0.10:4000", "10.77.0.10:53", "x"))
	r.want("VPC host, mapped", o, "udp 10.88.0.10:4000 > 10.0.0.10:53")
	// The gateway itself, and ARP, for the network's hosts.
	r.fromOverlay(pkttest.Echo("10.0.0.10", "10.0.0.1", false, 7, "x"))
	r.e.local.sendAll()
	if o, v = r.take(); len(v) > 0 {
		t.Errorf("the answer of the gateway goes to the VPC: %q", v)
	}
	r.want("ping of the gateway", o, "icmp 0/0 10.0.0.1 > 10.0.0.10 id 7")
	r.fromVPC(pkttest.Echo("10.0.0.10", "172.31.0.1", false, 8, "x"))
	r.e.local.sendAll()
	_, v = r.take()
	r.want("ping from the VPC", v, "icmp 0/0 172.31.0.1 > 10.0.0.10 id 8")
}

// TestOverlapUnmapped: without a map of its own a host of the network is none for the
// VPC, which takes its address for one of its own; nor does a bad route take traffic
// of the VPC.
func TestOverlapUnmapped(t *testing.T) {
	r := newRig(t, func(c *Config) { overlapping(c); c.Maps = nil })
	n := testNetwork()
	n.Routes = append(n.Routes, Route{Target: netip.MustParsePrefix("172.31.0.0/28"), Via: netip.MustParseAddr("10.0.0.2")},
		Route{Target: netip.MustParsePrefix("172.31.0.10/32"), Via: netip.MustParseAddr("10.0.0.2")})
	if err := r.e.SetNetworks([]Network{n}); err != nil {
		t.Fatal(err)
	}
	for i, src := range []string{"10.0.0.10", "172.31.0.10", "172.31.0.9", "172.31.0.1"} {
		_, v := r.fromOverlay(pkttest.TCP(src+":5", "172.31.0.20:22", ipkt.SYN, 1, 0, ""))
		r.want("claims to be of the VPC", v)
		if got := r.drops(OverlaySide, dropSpoofed); got != uint64(i+1) {
			t.Errorf("%s: %d drops counted", src, got)
		}
	}
	for _, dst := range []string{"10.0.0.10", "172.31.0.10", "172.31.0.9"} {
		o, _ := r.fromVPC(pkttest.UDP("10.0.0.55:4000", dst+":53", "x"))
		r.want("of the VPC: "+dst, o)
	}
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.9.0.10:53", "x"))
	r.want("from where a bad route points", o, "udp 10.0.0.1:4000 > 10.9.0.10:53")
	_, v := r.fromOverlay(pkttest.UDP("10.9.0.10:53", "10.0.0.1:4000", "x"))
	r.want("answer", v, "udp 10.9.0.10:53 > 172.31.0.10:4000")
	// An error from a router at an address of the VPC's.
	_, v = r.fromOverlay(pkttest.ICMPError("10.0.0.2", "10.0.0.1", 11, 0, 0, pkttest.UDP("10.0.0.1:4000", "10.9.0.10:53", "x"), 28))
	r.want("error that seems to be of the VPC", v)
}

func TestOverlapErrors(t *testing.T) {
	r := newRig(t, masqueraded)
	r.fromVPC(pkttest.UDP("10.0.0.55:4000", "10.77.0.10:53", "x"), pkttest.UDP("10.0.0.55:4000", "10.9.0.10:53", "x"))
	seen := pkttest.UDP("10.0.0.1:4000", "10.0.0.10:53", "x")
	for _, src := range []string{"10.0.0.10", "10.0.0.3"} {
		_, v := r.fromOverlay(pkttest.ICMPError(src, "10.0.0.1", 3, 3, 0, seen, 28))
		r.want("from the network", v, "icmp 3/3 10.77.0.10 > 10.0.0.55 [17 10.0.0.55:4000 > 10.77.0.10:53]")
	}
	_, v := r.fromOverlay(pkttest.ICMPError("10.0.0.2", "10.0.0.1", 11, 0, 0, pkttest.UDP("10.0.0.1:4000", "10.9.0.10:53", "x"), 28))
	r.want("from a router of the network, under its alias", v, "icmp 11/0 10.77.0.2 > 10.0.0.55 [17 10.0.0.55:4000 > 10.9.0.10:53]")
	o, _ := r.fromVPC(pkttest.ICMPError("10.0.0.55", "10.77.0.10", 3, 3, 0, pkttest.UDP("10.77.0.10:53", "10.0.0.55:4000", "x"), 28))
	r.want("from the VPC", o, "icmp 3/3 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:53 > 10.0.0.1:4000]")
	_, v = r.fromVPC(pkttest.Packet{Src: pkttest.Addr("10.0.0.55:4000"), Dst: pkttest.Addr("10.77.0.10:53"), TTL: 1}.Bytes())
	r.want("our own, to the VPC", v, "icmp 11/0 172.31.0.1 > 10.0.0.55 [17 10.0.0.55:4000 > 10.77.0.10:53]")
	o, _ = r.fromOverlay(pkttest.Packet{Src: pkttest.Addr("10.0.0.10:53"), Dst: pkttest.Addr("10.0.0.1:4000"), TTL: 1}.Bytes())
	r.want("our own, to the network", o, "icmp 11/0 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:53 > 10.0.0.1:4000]")
	// Without an address on the VPC side the gateway speaks from the alias of the
	// one that it has: at its own address the VPC has another host.
	r = newRig(t, func(c *Config) { masqueraded(c); c.VPC.Addresses = nil })
	_, v = r.fromVPC(pkttest.Packet{Src: pkttest.Addr("10.0.0.55:4000"), Dst: pkttest.Addr("10.77.0.10:53"), TTL: 1}.Bytes())
	r.want("our own, by alias", v, "icmp 11/0 10.77.0.1 > 10.0.0.55 [17 10.0.0.55:4000 > 10.77.0.10:53]")
}

func TestOverlapFragments(t *testing.T) {
	r := newRig(t, masqueraded)
	out := pkttest.Packet{Src: pkttest.Addr("10.0.0.55:4000"), Dst: pkttest.Addr("10.77.0.10:53"), Payload: make([]byte, 1600)}.Bytes()
	if o, _ := r.fromVPC(pkttest.Fragments(out, 800, 800)...); len(o) != 3 || o[0][:28] != "udp 10.0.0.1:4000 > 10.0.0.1" {
		t.Errorf("out: %q", o)
	}
	back := pkttest.Packet{Src: pkttest.Addr("10.0.0.10:53"), Dst: pkttest.Addr("10.0.0.1:4000"), Payload: make([]byte, 1600)}.Bytes()
	if _, v := r.fromOverlay(pkttest.Fragments(back, 800, 800)...); len(v) != 3 {
		t.Errorf("back: %q", v)
	}
}

// TestOverlapReload: what stays allowed goes on, what isn't ends.
func TestOverlapReload(t *testing.T) {
	r := newRig(t, masqueraded)
	r.fromVPC(pkttest.UDP("10.0.0.55:4000", "10.77.0.10:53", "x"))
	answer := func() []string {
		_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "x"))
		return v
	}
	if err := r.e.SetNetworks([]Network{testNetwork()}); err != nil {
		t.Fatal(err)
	}
	r.e.SetPolicy(policy.New(policy.Accept, nil))
	r.want("goes on", answer(), "udp 10.77.0.10:53 > 10.0.0.55:4000")
	if err := r.e.SetTranslation(nil, nil); err != nil {
		t.Fatal(err)
	}
	r.want("without its map", answer())
}

// TestOverlapForwards: the target of a forward is who the VPC means by its address.
func TestOverlapForwards(t *testing.T) {
	r := newRig(t, masqueraded, withForwards(forward(VPCSide, ipkt.UDP, "172.31.0.1:1001", "10.77.0.10:53", true),
		forward(VPCSide, ipkt.UDP, "172.31.0.1:1002", "10.0.0.10:53", false), forward(OverlaySide, ipkt.UDP, "10.0.0.1:1003", "10.0.0.10:53", false)))
	o, _ := r.fromVPC(pkttest.UDP("10.0.0.55:4000", "172.31.0.1:1001", "x"))
	r.want("to a host of the network", o, "udp 10.0.0.1:4000 > 10.0.0.10:53")
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "x"))
	r.want("answer", v, "udp 172.31.0.1:1001 > 10.0.0.55:4000")
	_, v = r.fromVPC(pkttest.UDP("10.0.0.55:4000", "172.31.0.1:1002", "x"))
	r.want("to a VPC host", v, "udp 172.31.0.1:4000 > 10.0.0.10:53")
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "10.0.0.1:1003", "x"))
	r.want("from the network", v, "udp 10.77.0.10:4000 > 10.0.0.10:53")
	o, _ = r.fromVPC(pkttest.UDP("10.0.0.10:53", "10.77.0.10:4000", "x"))
	r.want("answer", o, "udp 10.0.0.1:1003 > 10.0.0.10:4000")
	if mac, ok := r.e.Neighbour(testNet, pkttest.Addr("10.77.0.10").Addr()); !ok || mac != hostMAC {
		t.Errorf("neighbour by alias: %x, %v", mac, ok)
	}
}

// TestOverlapLocal: the gateway itself means the network's hosts, by either address.
func TestOverlapLocal(t *testing.T) {
	for _, dst := range []string{"10.0.0.10:53", "10.77.0.10:53"} {
		r := newRig(t, masqueraded)
		c, err := r.e.DialUDP(t.Context(), pkttest.Addr(dst))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		r.e.local.sendAll()
		o, v := r.take()
		r.want("to the VPC", v)
		var port int
		if len(o) == 1 {
			fmt.Sscanf(o[0], "udp 10.0.0.1:%d > 10.0.0.10:53", &port)
		}
		if port == 0 {
			t.Fatalf("%s: sent %q", dst, o)
		}
		_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", port), "answer"))
		r.want("answer", v)
		b := make([]byte, 10)
		if n, err := c.Read(b); err != nil || string(b[:n]) != "answer" {
			t.Errorf("%s: read %q, %v", dst, b[:n], err)
		}
		c.Close()
	}
}

// TestTwins: two networks with the same ranges and the same address of ours.
func TestTwins(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, func(c *Config) {
		c.Maps = []AddressMap{
			{Network: testNet, Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.77.0.0/24")},
			{Network: otherNet, Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.78.0.0/24")},
		}
	})
	twin := testNetwork()
	twin.ID = otherNet
	if err := r.e.SetNetworks([]Network{testNetwork(), twin}); err != nil {
		t.Fatal(err)
	}
	r.take()
	reply := func(network uint64, to string) (vpc []string) {
		h := ethernetHeader(ourMAC, hostMAC, false)
		r.e.Deliver(network, [][]byte{append(h[:], pkttest.UDP("10.0.0.10:53", to, "x")...)})
		_, v := r.take()
		return v
	}
	for i, network := range []uint64{testNet, otherNet} {
		alias, client := fmt.Sprintf("10.%d.0.10:53", 77+i), fmt.Sprintf("172.31.0.1%d:4000", i)
		o, _ := r.fromVPC(pkttest.UDP(client, alias, "x"))
		if len(o) != 1 {
			t.Fatalf("out: %q", o)
		}
		var port int
		fmt.Sscanf(o[0], "udp 10.0.0.1:%d > 10.0.0.10:53", &port)
		to := fmt.Sprintf("10.0.0.1:%d", port)
		r.want("from the other one", reply(network^testNet^otherNet, to))
		r.want("answer", reply(network, to), "udp "+alias+" > "+client)
		if f := r.e.Flows(FlowFilter{Network: network}); len(f) != 1 {
			t.Errorf("%d flows of network %x, want 1", len(f), network)
		}
	}
}

// TestAliasInSubnet: the VPC knows hosts of one network by addresses that another one has,
// which is behind an alias of its own. Neither our address there nor that network's broadcast
// address is theirs for the VPC.
func TestAliasInSubnet(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, func(c *Config) {
		c.Maps = []AddressMap{
			{Network: otherNet, Hosts: OverlaySide, Real: p("10.20.0.0/24"), Alias: p("10.0.0.0/24")},
			{Network: testNet, Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.77.0.0/24")},
		}
	})
	other := Network{ID: otherNet, MAC: ourMAC, MTU: 2800, Masquerade: true, Addresses: []netip.Prefix{p("10.20.0.9/20")}}
	for _, nets := range [][]Network{{other}, {other, testNetwork()}} {
		if err := r.e.SetNetworks(nets); err != nil {
			t.Fatal(err)
		}
		for alias, real := range map[string]string{"10.0.0.1": "10.20.0.1", "10.0.0.10": "10.20.0.10", "10.0.0.255": "10.20.0.255"} {
			x := r.e.Explain(Question{Protocol: ipkt.UDP, Src: netip.MustParseAddrPort("172.31.0.10:4000"), Dst: netip.MustParseAddrPort(alias + ":53")})
			if x.Network != otherNet || x.Destination.Addr().String() != real {
				t.Errorf("%d networks: %s goes to %s of network %x, %s %s", len(nets), alias, x.Destination, x.Network, x.Verdict, x.Reason)
			}
		}
	}
}

// TestTwinTuples: hosts of two such networks open connections that look the same. One is
// served; the other one's packets never pass for its, in either direction.
func TestTwinTuples(t *testing.T) {
	p := netip.MustParsePrefix
	r := newRig(t, func(c *Config) {
		c.Maps = []AddressMap{
			{Network: testNet, Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.77.0.0/24")},
			{Network: otherNet, Hosts: OverlaySide, Real: p("10.0.0.0/24"), Alias: p("10.78.0.0/24")},
		}
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
	})
	twin := testNetwork()
	twin.ID = otherNet
	if err := r.e.SetNetworks([]Network{testNetwork(), twin}); err != nil {
		t.Fatal(err)
	}
	r.take()
	from := func(network uint64, pkt []byte) (overlay, vpc []string) {
		h := ethernetHeader(ourMAC, hostMAC, false)
		r.e.Deliver(network, [][]byte{append(h[:], pkt...)})
		return r.take()
	}
	for range 2 { // the first packets open the flows, the others take the fast path
		_, v := from(testNet, pkttest.UDP("10.0.0.10:5000", "172.31.0.10:80", "x"))
		r.want("the first", v, "udp 10.77.0.10:5000 > 172.31.0.10:80")
		o, v := from(otherNet, pkttest.UDP("10.0.0.10:5000", "172.31.0.10:80", "x"))
		r.want("its twin", append(o, v...))
		for alias, network := range map[string]uint64{"10.77.0.10:5000": testNet, "10.78.0.10:5000": otherNet} {
			from := map[uint64]string{testNet: "172.31.0.10:80", otherNet: "10.0.0.1:80"}[network]
			o, _ := r.fromVPC(pkttest.UDP("172.31.0.10:80", alias, "x"))
			r.want("to "+alias, o, "udp "+from+" > 10.0.0.10:5000")
			for _, f := range r.e.Flows(FlowFilter{Network: network}) {
				if f.External.String() != alias && f.Target.String() != alias {
					t.Errorf("a flow of network %x is %+v", network, f)
				}
			}
		}
	}
	if got := r.drops(OverlaySide, dropSpoofed); got != 2 {
		t.Errorf("%d of the twin's packets are refused, want 2", got)
	}
}

// TestSeenByVPC: the VPC reaches hosts by what it is told, or they are out of its reach.
func TestSeenByVPC(t *testing.T) {
	a := netip.MustParseAddr
	mapped, plain := newRig(t, overlapping), newRig(t)
	plain.fromVPC(pkttest.UDP("172.31.0.9:4000", "10.0.0.10:53", "x"))
	for _, c := range []struct {
		r        *rig
		network  uint64
		host     string
		want     string
		reached  bool
		whatever string
	}{
		{mapped, testNet, "10.0.0.10", "10.77.0.10", true, "by its alias"},
		{mapped, testNet, "10.77.0.10", "10.77.0.10", false, "the network has no such host"},
		{mapped, testNet, "172.31.0.9", "172.31.0.9", false, "the VPC's own"},
		{mapped, testNet + 1, "10.0.0.10", "10.0.0.10", false, "no such network"},
		{plain, testNet, "10.0.0.10", "10.0.0.10", true, "by its own address"},
		{plain, testNet, "192.0.2.1", "192.0.2.1", false, "no route"},
	} {
		got, ok := c.r.e.SeenByVPC(c.network, a(c.host))
		if ok != c.reached || ok && got != a(c.want) {
			t.Errorf("%s: %v, %v", c.whatever, got, ok)
		}
	}
	known := map[netip.Addr][6]byte{}
	plain.e.Neighbours(testNet, func(host netip.Addr, mac [6]byte) { known[host] = mac })
	if known[a("10.0.0.10")] != hostMAC {
		t.Errorf("neighbours %v", known)
	}
	plain.e.Neighbours(testNet+1, func(netip.Addr, [6]byte) { t.Error("a network that isn't there has hosts") })
}
