package netstack

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// Addresses of the VPC that overlay hosts are masqueraded as.
const (
	behind4 = "172.31.0.250"
	behind6 = "fd77:1::250"
)

// hidden masquerades overlay hosts towards the VPC, where they may open everything.
func hidden(c *Config) {
	hide := func(to, as string) Masquerade {
		return Masquerade{To: netip.MustParsePrefix(to), Address: netip.MustParseAddr(as), Except: []netip.Prefix{netip.MustParsePrefix("172.31.0.9/32")}}
	}
	c.Masquerade = []Masquerade{hide("172.31.0.0/16", behind4), hide("fd77:1::/64", behind6)}
	c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
}

// inward are the ends of flows from the overlay into the VPC, in both families.
var inward = []struct{ name, member, other, server, behind, router string }{
	{"IPv4", "10.0.0.10", "10.0.0.11", "172.31.0.20", behind4, "172.31.0.2"},
	{"IPv6", "fd77:100::50", "fd77:100::51", "fd77:1::50", behind6, "fd77:1::2"},
}

func end(addr string, port int) string {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(port)).String()
}

// TestMasqueradeToVPC: VPC hosts see overlay hosts behind one address: TCP, UDP, echo, and
// errors of both sides about them.
func TestMasqueradeToVPC(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t, hidden)
			for range 3 { // the first packets open the flow, the others take the fast path
				_, v := r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.server, 53), "x"))
				r.want("out", v, "udp "+end(f.behind, 4000)+" > "+end(f.server, 53))
				o, _ := r.fromVPC(pkttest.UDP(end(f.server, 53), end(f.behind, 4000), "x"))
				r.want("answer", o, "udp "+end(f.server, 53)+" > "+end(f.member, 4000))
			}
			// One mapping for all servers; another member's gets another port (4787-REQ-1, REQ-3).
			_, v := r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.server, 54), "x"))
			r.want("another server", v, "udp "+end(f.behind, 4000)+" > "+end(f.server, 54))
			_, v = r.fromOverlay(pkttest.UDP(end(f.other, 4000), end(f.server, 53), "x"))
			if len(v) != 1 || strings.Contains(v[0], end(f.behind, 4000)+" ") || !strings.Contains(v[0], f.behind) {
				t.Errorf("another member: %q", v)
			}
			_, v = r.fromOverlay(pkttest.TCP(end(f.member, 4000), end(f.server, 80), ipkt.SYN, 1, 0, ""))
			r.want("SYN", v, "tcp "+end(f.behind, 4000)+" > "+end(f.server, 80))
			o, _ := r.fromVPC(pkttest.TCP(end(f.server, 80), end(f.behind, 4000), ipkt.SYN|ipkt.ACK, 7, 2, ""))
			r.want("SYN+ACK", o, "tcp "+end(f.server, 80)+" > "+end(f.member, 4000))
			typ := map[bool]string{true: "128", false: "8"}[strings.Contains(f.member, ":")]
			reply := map[bool]string{true: "129", false: "0"}[strings.Contains(f.member, ":")]
			_, v = r.fromOverlay(pkttest.Echo(f.member, f.server, false, 77, "x"))
			r.want("echo", v, "icmp "+typ+"/0 "+f.behind+" > "+f.server+" id 77")
			o, _ = r.fromVPC(pkttest.Echo(f.server, f.behind, true, 77, "x"))
			r.want("echo reply", o, "icmp "+reply+"/0 "+f.server+" > "+f.member+" id 77")

			// Errors: of the server, and of a router of the VPC.
			unreachable, code, exceeded := uint8(3), uint8(3), uint8(11)
			if typ == "128" {
				unreachable, code, exceeded = 1, 4, 3
			}
			quote := pkttest.UDP(end(f.behind, 4000), end(f.server, 53), "x")
			for _, x := range []struct {
				src       string
				typ, code uint8
			}{{f.server, unreachable, code}, {f.router, exceeded, 0}} {
				o, _ = r.fromVPC(pkttest.ICMPError(x.src, f.behind, x.typ, x.code, 0, quote, 100))
				r.want("error", o, fmt.Sprintf("icmp %d/%d %s > %s [17 %s > %s]", x.typ, x.code, x.src, f.member, end(f.member, 4000), end(f.server, 53)))
			}
			// The member's error about an answer.
			_, v = r.fromOverlay(pkttest.ICMPError(f.member, f.server, unreachable, code, 0, pkttest.UDP(end(f.server, 53), end(f.member, 4000), "x"), 100))
			r.want("error of the member", v, fmt.Sprintf("icmp %d/%d %s > %s [17 %s > %s]", unreachable, code, f.behind, f.server, end(f.server, 53), end(f.behind, 4000)))
			// Traceroute shows the gateway's overlay address first.
			last := pkttest.Packet{Src: pkttest.Addr(end(f.member, 4001)), Dst: pkttest.Addr(end(f.server, 33434)), TTL: 1}.Bytes()
			if o, _ = r.fromOverlay(last); len(o) != 1 || !strings.HasPrefix(o[0], fmt.Sprintf("icmp %d/0 ", exceeded)) {
				t.Errorf("at the end of its hops: %q", o)
			}
			r.drain()
			r.account()
		})
	}
}

// TestMasqueradeIsClosed: behind the address nobody is reached who hasn't asked, and it is
// answered for pings alone; what the policy doesn't accept doesn't get out.
func TestMasqueradeIsClosed(t *testing.T) {
	for _, f := range inward {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t, hidden)
			r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.server, 53), "x"))
			stranger := map[string]string{"IPv4": "172.31.0.66", "IPv6": "fd77:1::66"}[f.name]
			o, v := r.fromVPC(pkttest.UDP(end(stranger, 53), end(f.behind, 4000), "x"), pkttest.UDP(end(f.server, 54), end(f.behind, 4000), "x"),
				pkttest.TCP(end(f.server, 53), end(f.behind, 4000), ipkt.SYN, 1, 0, ""), pkttest.UDP(end(f.server, 53), end(f.behind, 4001), "x"))
			r.want("from strangers", append(o, v...))
			if n := r.drops(VPCSide, dropNoFlow); n != 4 {
				t.Errorf("%d drops counted, want 4", n)
			}
			// In the address's own name, from either side.
			o, v = r.fromVPC(pkttest.UDP(end(f.behind, 4000), end(f.member, 53), "x"))
			r.want("forged in the VPC", append(o, v...))
			o, v = r.fromOverlay(pkttest.UDP(end(f.behind, 4000), end(f.server, 53), "x"))
			r.want("forged on the overlay", append(o, v...))
			o, v = r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.behind, 53), "x"))
			r.want("to the address, on the overlay", append(o, v...))
			r.e.SetPolicy(policy.New(policy.Accept, nil))
			o, v = r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.server, 53), "x"))
			r.want("without a rule", append(o, v...))
			r.account()
		})
	}
	r := newRig(t, hidden)
	o, v := r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "172.31.0.9:53", "x"), pkttest.UDP("10.0.0.10:4000", "169.254.169.254:80", "x"),
		pkttest.UDP("10.0.0.10:4000", "127.0.0.1:80", "x"), pkttest.UDP("10.0.0.10:4000", "172.31.255.255:80", "x"))
	r.want("what nobody gets to", append(o, v...))
	if n := r.drops(OverlaySide, dropForbidden); n != 3 { // loopback isn't even taken for a packet
		t.Errorf("%d drops counted, want 3", n)
	}
}

// TestMasqueradeWithoutAddress: hosts that should be hidden and can't be are refused.
func TestMasqueradeWithoutAddress(t *testing.T) {
	r := newRig(t, hidden)
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "172.31.0.20:53", "x"))
	r.want("with an address", v, "udp "+behind4+":4000 > 172.31.0.20:53")
	if err := r.e.SetMasquerade([]Masquerade{{To: netip.MustParsePrefix("172.31.0.0/16")}}); err != nil {
		t.Fatal(err)
	}
	o, v := r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "172.31.0.20:53", "x"))
	r.want("VPC", v)
	r.want("overlay", o, "icmp 3/0 10.0.0.1 > 10.0.0.10 [17 10.0.0.10:4000 > 172.31.0.20:53]")
	if n := r.drops(OverlaySide, dropNoAddress); n != 1 {
		t.Errorf("%d drops counted, want 1", n)
	}
	for _, bad := range []Masquerade{{}, {To: netip.MustParsePrefix("172.31.0.0/16"), Address: netip.MustParseAddr("fd00::1")},
		{To: netip.MustParsePrefix("0.0.0.0/0"), Address: netip.MustParseAddr("127.0.0.1")}} {
		if r.e.SetMasquerade([]Masquerade{bad}) == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
	r.account()
}

// TestMasqueradeBeyond: destinations of a masquerade lie on the VPC side also outside of its
// sources, for those it hides, and routers on the way there may send errors; nobody there
// can open anything.
func TestMasqueradeBeyond(t *testing.T) {
	r := newRig(t, hidden, func(c *Config) {
		c.Masquerade = append(c.Masquerade, Masquerade{From: []netip.Prefix{netip.MustParsePrefix("10.0.0.10/32")}, To: netip.MustParsePrefix("0.0.0.0/0"), Address: netip.MustParseAddr(behind4)})
	})
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "198.51.100.7:53", "x"))
	r.want("out", v, "udp "+behind4+":4000 > 198.51.100.7:53")
	o, _ := r.fromVPC(pkttest.UDP("198.51.100.7:53", behind4+":4000", "x"))
	r.want("answer", o, "udp 198.51.100.7:53 > 10.0.0.10:4000")
	quote := pkttest.UDP(behind4+":4000", "198.51.100.7:53", "x")
	o, _ = r.fromVPC(pkttest.ICMPError("203.0.113.1", behind4, 11, 0, 0, quote, 28))
	r.want("error from the way", o, "icmp 11/0 203.0.113.1 > 10.0.0.10 [17 10.0.0.10:4000 > 198.51.100.7:53]")
	o, v = r.fromOverlay(pkttest.UDP("10.0.0.11:4000", "198.51.100.7:53", "x"))
	r.want("who isn't hidden", append(o, v...))
	o, v = r.fromVPC(pkttest.UDP("198.51.100.7:53", "10.0.0.10:4000", "x"), pkttest.ICMPError("203.0.113.1", "10.0.0.10", 11, 0, 0, quote, 28))
	r.want("from outside", append(o, v...))
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "10.9.0.10:53", "x"))
	r.want("what a network has", v)
	r.account()
}

// TestMasqueradeOpen: with endpoint-independent filtering everybody in the VPC reaches a
// member's mapping, as the policy allows.
func TestMasqueradeOpen(t *testing.T) {
	for _, f := range inward {
		r := newRig(t, hidden, func(c *Config) { c.NAT.FilterUDP = EndpointIndependent })
		r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(f.server, 53), "x"))
		stranger := map[string]string{"IPv4": "172.31.0.66", "IPv6": "fd77:1::66"}[f.name]
		o, _ := r.fromVPC(pkttest.UDP(end(stranger, 99), end(f.behind, 4000), "x"))
		r.want("a stranger", o, "udp "+end(stranger, 99)+" > "+end(f.member, 4000))
		_, v := r.fromOverlay(pkttest.UDP(end(f.member, 4000), end(stranger, 99), "x"))
		r.want("the answer to him", v, "udp "+end(f.behind, 4000)+" > "+end(stranger, 99))
		r.e.SetPolicy(policy.New(policy.Drop, nil))
		o, _ = r.fromVPC(pkttest.UDP(end(stranger, 98), end(f.behind, 4000), "x"))
		r.want("against the policy", o)
		r.account()
	}
}

// TestMasqueradeMapsAndForwards: an alias stays, a forward that hides its clients shows the
// address, and one that doesn't shows them.
func TestMasqueradeMapsAndForwards(t *testing.T) {
	r := newRig(t, hidden, func(c *Config) {
		c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.9.1.0/24"), Alias: netip.MustParsePrefix("10.77.1.0/24")}}
		c.VPC.Addresses = nil
		c.Forwards = []PortForward{forward(OverlaySide, ipkt.UDP, "0.0.0.0:81", "172.31.0.20:81", true), forward(OverlaySide, ipkt.UDP, "0.0.0.0:82", "172.31.0.20:82", false),
			forward(VPCSide, ipkt.UDP, "0.0.0.0:83", "10.0.0.10:83", true)}
	})
	_, v := r.fromOverlay(pkttest.UDP("10.9.1.5:4000", "172.31.0.20:53", "x"))
	r.want("by an alias", v, "udp 10.77.1.5:4000 > 172.31.0.20:53")
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "10.0.0.1:81", "x"))
	r.want("forward", v, "udp "+behind4+":4000 > 172.31.0.20:81")
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "10.0.0.1:82", "x"))
	r.want("forward that shows", v, "udp 10.0.0.10:4000 > 172.31.0.20:82")
	o, _ := r.fromVPC(pkttest.UDP("172.31.0.20:4000", behind4+":83", "x"))
	r.want("forward of the VPC at the address", o, "udp 10.0.0.1:4000 > 10.0.0.10:83")
	_, v = r.fromOverlay(pkttest.UDP("10.0.0.10:83", "172.31.0.20:90", "x"))
	if len(v) != 1 || strings.Contains(v[0], behind4+":83 ") {
		t.Errorf("a forwarded port is given away: %q", v)
	}
	r.account()
}

// TestMasqueradeFairly: a member that opens all it can leaves room for the others, and is
// told when it is refused.
func TestMasqueradeFairly(t *testing.T) {
	r := newRig(t, hidden, func(c *Config) { c.NAT = NAT{MaxFlows: 64000, Seed: [32]byte{1}} })
	other := [6]byte{2, 0, 0, 0, 0, 11}
	r.overlay.macs[netip.MustParseAddr("10.0.0.11")] = other
	open := func(mac [6]byte, client string) (told []string, ok bool) {
		o, v := r.fromMember(mac, pkttest.UDP(client, "172.31.0.20:53", "x"))
		if len(v) == 0 {
			return o, false
		}
		r.fromVPC(pkttest.UDP("172.31.0.20:53", strings.Fields(v[0])[1], "y"))
		r.fromMember(mac, pkttest.UDP(client, "172.31.0.20:53", "x"))
		return nil, true
	}
	var told []string
	for i := range 50000 { // established ones, from addresses behind it
		if o, ok := open(hostMAC, fmt.Sprintf("10.9.0.%d:%d", 1+i%200, 1024+i)); !ok {
			told = append(told, o...)
		}
	}
	if len(told) == 0 || !strings.HasPrefix(told[0], "icmp 3/1 10.0.0.1 > 10.9.0.") {
		t.Errorf("told %q", told[:min(len(told), 1)])
	}
	if _, ok := open(other, "10.0.0.11:4000"); !ok {
		t.Error("another member is refused")
	}
	r.account()
}

// TestMasqueradeShares: by destination, members share a port towards different servers.
func TestMasqueradeShares(t *testing.T) {
	r := newRig(t, hidden, func(c *Config) {
		c.NAT = NAT{PortSharing: ByDestination, MaxFlows: 1 << 18, MaxFlowsPerClient: 1 << 18, MaxPortsPerClient: 65535, Seed: [32]byte{1}}
	})
	refused := 0
	for i := range 70000 {
		_, v := r.fromOverlay(pkttest.UDP(fmt.Sprintf("10.9.%d.%d:%d", i/60000, 1+i%250, 1024+i%60000), fmt.Sprintf("172.31.%d.20:53", i/60000), "x"))
		if len(v) == 0 {
			refused++
		}
	}
	if refused > 0 {
		t.Errorf("%d of 70,000 flows refused", refused)
	}
}

// TestMasqueradePort: a port is kept for its member over a restart. [TestRestart] has what
// becomes of connections.
func TestMasqueradePort(t *testing.T) {
	r := newRig(t, hidden)
	r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "172.31.0.20:53", "x"))
	_, v := r.fromOverlay(pkttest.UDP("10.0.0.11:4000", "172.31.0.20:53", "x"))
	r = r.again(hidden)
	_, again := r.fromOverlay(pkttest.UDP("10.0.0.11:4000", "172.31.0.21:53", "x"))
	if len(v) != 1 || len(again) != 1 || strings.Fields(v[0])[1] != strings.Fields(again[0])[1] {
		t.Errorf("a member's port is another one after a restart: %q, %q", v, again)
	}
}

// TestMasqueradeMetrics: the ports of the address are counted for no network in particular.
func TestMasqueradeMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t, hidden, func(c *Config) { c.Registerer = reg })
	r.fromOverlay(pkttest.UDP("10.0.0.10:4000", "172.31.0.20:53", "x"), pkttest.UDP("10.0.0.11:4000", "172.31.0.20:53", "x"))
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "x"))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "ztgate_nat_ports_in_use" {
			continue
		}
		for _, m := range f.Metric { // labels in the order of their names
			got[m.Label[0].GetValue()+" "+m.Label[1].GetValue()] = m.GetGauge().GetValue()
		}
	}
	if got[" udp"] != 2 || got[networkLabel(testNet)+" udp"] != 1 {
		t.Errorf("ports in use: %v", got)
	}
}
