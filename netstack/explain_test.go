package netstack

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// explainWorlds are configurations in which explanations are compared with what
// happens to packets.
var explainWorlds = map[string]func(*Config){
	"plain": func(c *Config) {},
	"scarce": func(c *Config) {
		c.NAT = NAT{MaxFlows: 25, MaxFlowsPerClient: 12, MaxPortsPerClient: 8, FlowRatePerClient: 3, Seed: [32]byte{1}}
	},
	"open": func(c *Config) {
		c.NAT = NAT{FilterUDP: EndpointIndependent, PortSharing: ByDestination, MaxHalfOpen: 5, MaxFlows: 40, Seed: [32]byte{1}}
		c.VPC.Sources = nil
	},
	"rules": func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{
			{Action: policy.Reject, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 80, Last: 80}}},
			{Action: policy.Drop, Proto: ipkt.UDP, From: []netip.Prefix{netip.MustParsePrefix("172.31.0.11/32")}},
			{Action: policy.Accept, Direction: policy.In},
		})
	},
	"overlapping": overlapping,
	"masqueraded": masqueraded,
	"hidden":      hidden,
	"hidden, scarce": func(c *Config) {
		hidden(c)
		c.NAT = NAT{MaxFlows: 25, MaxFlowsPerClient: 12, MaxPortsPerClient: 8, FlowRatePerClient: 3, Seed: [32]byte{1}}
	},
	"hidden, open": func(c *Config) {
		hidden(c)
		c.NAT = NAT{FilterUDP: EndpointIndependent, PortSharing: ByDestination, MaxHalfOpen: 5, MaxFlows: 40, Seed: [32]byte{1}}
		c.Masquerade = append(c.Masquerade, Masquerade{To: netip.MustParsePrefix("0.0.0.0/0"), Address: netip.MustParseAddr(behind4)})
	},
	"hidden, without an address": func(c *Config) {
		hidden(c)
		for i := range c.Masquerade {
			c.Masquerade[i].Address = netip.Addr{}
		}
	},
}

// TestExplainAgrees asks about random packets and sends them: the verdict, the reason
// and the translation are what happens, and asking changes nothing.
func TestExplainAgrees(t *testing.T) {
	p := netip.MustParsePrefix
	for name, world := range explainWorlds {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *Config) {
				c.Maps = []AddressMap{{Hosts: OverlaySide, Real: p("10.0.0.64/28"), Alias: p("100.64.0.64/28")}, {Hosts: VPCSide, Real: p("172.31.5.0/28"), Alias: p("10.0.0.32/28")}}
				c.Forwards = []PortForward{
					forward(VPCSide, ipkt.TCP, "0.0.0.0:443", "10.0.0.10:443", false), forward(OverlaySide, ipkt.TCP, "10.0.0.1:443", "172.31.0.20:443", true),
					forward(OverlaySide, ipkt.UDP, "0.0.0.0:53", "172.31.0.20:53", false), forward(VPCSide, ipkt.UDP, "192.0.2.7:53", "172.31.0.20:53", false),
					forward(VPCSide, ipkt.TCP, "192.0.2.7:80", "100.64.0.70:80", false),
				}
				world(c)
			})
			other := Network{ID: otherNet, MAC: ourMAC, MTU: 1400, Masquerade: true, Addresses: []netip.Prefix{p("10.7.0.1/24")}}
			if err := r.e.SetNetworks([]Network{testNetwork(), other}); err != nil {
				t.Fatal(err)
			}
			r.take()
			rng := rand.New(rand.NewPCG(7, 7))
			seen := map[string]int{}
			for i := range 4000 {
				q := randomQuestion(rng)
				x, out := r.compareExplained(q, i%100 == 0)
				seen[fmt.Sprint(x.Verdict, " ", x.Reason, " ", x.Established)]++
				if back, ok := answerTo(x, out); ok && rng.IntN(2) == 0 {
					x, _ = r.compareExplained(back, false)
					seen[fmt.Sprint("answer: ", x.Verdict, " ", x.Reason, " ", x.Established)]++
				}
				if t.Failed() {
					return
				}
				r.now = r.now.Add(50 * time.Millisecond)
				if i%500 == 0 {
					r.sleep(time.Duration(rng.IntN(200)) * time.Second)
					r.take()
				}
			}
			t.Log(seen)
			r.drain()
			r.account()
		})
	}
}

func pick[T any](rng *rand.Rand, list []T) T { return list[rng.IntN(len(list))] }

func randomQuestion(rng *rand.Rand) Question {
	vpc := []string{"172.31.0.10", "172.31.0.11", "172.31.0.20", "172.31.5.3", "172.31.0.9", behind4, "10.0.0.10", "10.0.0.55", "10.0.0.1", "172.31.0.255", "172.31.0.1", "192.0.2.9", "169.254.1.1", "100.64.0.70"}
	overlay := []string{"10.0.0.10", "10.0.0.11", "10.0.0.70", "10.9.0.10", "10.7.0.9", "10.0.0.1", "10.77.0.10", "10.88.0.10", "10.0.0.255", "10.0.0.35", "100.64.0.70", "192.0.2.7", "169.254.169.254", "224.0.0.1", "172.31.0.1", "127.0.0.1", behind4}
	vpc6, overlay6 := []string{"fd77:1::50", "fd77:1::1", "fe80::1"}, []string{"fd77:100::50", "fd77:100::1", "fd00:ec2::254", "2001:db8::1"}
	q := Question{FromOverlay: rng.IntN(3) == 0, Network: testNet, Protocol: pick(rng, []uint8{6, 6, 6, 17, 17, 17, 1, 1, 50, 47, 136, 132, 51})}
	if q.FromOverlay && rng.IntN(20) == 0 {
		q.Network = pick(rng, []uint64{otherNet, otherNet + 1})
	}
	v6 := rng.IntN(8) == 0
	if v6 {
		vpc, overlay = vpc6, overlay6
		if q.Protocol == ipkt.ICMP {
			q.Protocol = ipkt.ICMPv6
		}
		if q.Protocol == 51 {
			q.Protocol = 50
		}
	}
	from, to := vpc, overlay
	if q.FromOverlay {
		from, to = overlay, vpc
	}
	if rng.IntN(5) == 0 {
		to = append(append([]string(nil), vpc...), overlay...)
	}
	if rng.IntN(4) > 0 { // most are sensible
		from = from[:3]
		to = to[:min(len(to), 4)]
		if q.FromOverlay && !v6 {
			to = append([]string{"10.0.0.1", "10.88.0.10"}, to...)
		}
	}
	sport, dport := uint16(4000+rng.IntN(12)), pick(rng, []uint16{53, 80, 443, 22, 4000, 4001, 4002, 61005})
	switch q.Protocol {
	case ipkt.ICMP, ipkt.ICMPv6:
		dport = 0
	case ipkt.TCP, ipkt.UDP:
	default:
		sport, dport = 0, 0
	}
	q.Src, q.Dst = netip.AddrPortFrom(netip.MustParseAddr(pick(rng, from)), sport), netip.AddrPortFrom(netip.MustParseAddr(pick(rng, to)), dport)
	return q
}

// answerTo is about the answer to a UDP packet that was forwarded as out.
func answerTo(x Explanation, out []byte) (back Question, ok bool) {
	var v ipkt.View
	if out == nil || ipkt.Parse(out, &v) != ipkt.OK || v.Proto != ipkt.UDP {
		return back, false
	}
	return Question{FromOverlay: x.To == OverlaySide, Network: x.Network, Protocol: ipkt.UDP,
		Src: netip.AddrPortFrom(v.Destination(), v.DPort), Dst: netip.AddrPortFrom(v.Source(), v.SPort)}, true
}

// compareExplained asks about a packet and sends it. It returns what was forwarded.
func (r *rig) compareExplained(q Question, thorough bool) (x Explanation, forwarded []byte) {
	r.t.Helper()
	before := ""
	if thorough {
		before = r.state() + fmt.Sprint(r.e.Mappings())
	}
	x = r.e.Explain(q)
	if thorough && before != r.state()+fmt.Sprint(r.e.Mappings()) {
		r.t.Errorf("asking about %+v changed something", q)
	}
	side := VPCSide
	if q.FromOverlay {
		side = OverlaySide
	}
	s := &r.e.stats
	drops := make([]uint64, numDrops)
	for i := range drops {
		drops[i] = s.drops[side][i].Load()
	}
	b := pkttest.Packet{Proto: q.Protocol, Flags: ipkt.SYN, Src: q.Src, Dst: q.Dst, Payload: []byte("12345678")}
	packet := b.Bytes()
	switch q.Protocol {
	case ipkt.ICMP, ipkt.ICMPv6:
		packet = pkttest.Echo(q.Src.Addr().String(), q.Dst.Addr().String(), false, q.Src.Port(), "x")
	}
	if q.FromOverlay {
		h := ethernetHeader(ourMAC, hostMAC, q.Src.Addr().Is6())
		r.e.Deliver(q.Network, [][]byte{append(h[:], packet...)})
	} else {
		r.feed([][]byte{packet}, nil)
	}
	o, v := r.takeRaw()
	reason := ""
	for i := range drops {
		if s.drops[side][i].Load() != drops[i] {
			reason += drop(i).String()
		}
	}
	verdict, out, told := "local", [][]byte(nil), v
	if q.FromOverlay {
		told = o
	}
	switch {
	case reason == "" && x.To == OverlaySide && len(o) == 1:
		verdict, out = "forward", o
	case reason == "" && x.To == VPCSide && len(v) == 1:
		verdict, out = "forward", v
	case reason == "" && len(o)+len(v) > 0:
		verdict = fmt.Sprintf("%d packets to the overlay and %d to the VPC", len(o), len(v))
	case reason != "" && len(told) > 0:
		verdict = "reject"
	case reason != "":
		verdict = "drop"
	}
	if x.Verdict != verdict || x.Reason != reason {
		r.t.Errorf("%+v:\nasked %+v\nwas %s %s", q, x, verdict, reason)
		return x, nil
	}
	var got ipkt.View
	if verdict != "forward" || ipkt.Parse(out[0], &got) != ipkt.OK {
		return x, nil
	}
	src, dst := netip.AddrPortFrom(got.Source(), got.SPort), netip.AddrPortFrom(got.Destination(), got.DPort)
	if x.Source.Port() == 0 || got.SPort == 0 {
		src, x.Source = netip.AddrPortFrom(src.Addr(), 0), netip.AddrPortFrom(x.Source.Addr(), 0)
	}
	if got.DPort == 0 {
		x.Destination = netip.AddrPortFrom(x.Destination.Addr(), 0)
	}
	if src != x.Source || dst != x.Destination {
		r.t.Errorf("%+v:\nasked %+v\nwas %v > %v", q, x, src, dst)
	}
	return x, out[0]
}
