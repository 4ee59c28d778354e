package netstack

import (
	"net/netip"
	"testing"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// exit carries overlay hosts to the internet behind the addresses that they have in the VPC.
func exit(c *Config) {
	hide := func(to, as string, except ...string) Masquerade {
		m := Masquerade{To: netip.MustParsePrefix(to), Address: netip.MustParseAddr(as), Invites: true}
		for _, e := range except {
			m.Except = append(m.Except, netip.MustParsePrefix(e))
		}
		return m
	}
	c.Masquerade = []Masquerade{
		{To: netip.MustParsePrefix("172.31.0.0/16"), Address: netip.MustParseAddr(behind4)}, {To: netip.MustParsePrefix("fd77:1::/64"), Address: netip.MustParseAddr(behind6)},
		hide("0.0.0.0/0", behind4, "10.0.0.0/8", "192.168.0.0/16", "44.128.0.10/32"), hide("::/0", behind6, "fc00::/7", "2600:1::10/128"),
	}
}

// TestExit: overlay hosts reach the internet, and nothing else, without a rule for it; the
// policy still refuses.
func TestExit(t *testing.T) {
	for _, f := range []struct{ name, member, behind, server, router, own, private, vpc, metadata, network string }{
		{"IPv4", "10.0.0.10", behind4, "44.129.0.80", "44.128.0.254", "44.128.0.10", "192.168.7.7", "172.31.0.20", "169.254.169.254", "10.0.0.99"},
		{"IPv6", "fd77:100::50", behind6, "2600:2::80", "2600:1::fe", "2600:1::10", "fd99::7", "fd77:1::50", "fd00:ec2::254", "fd77:100::99"},
	} {
		t.Run(f.name, func(t *testing.T) {
			r := newRig(t, exit)
			ask := func(to string) []byte { return pkttest.TCP(end(f.member, 4000), end(to, 80), ipkt.SYN, 1, 0, "") }
			for range 3 {
				_, v := r.fromOverlay(ask(f.server))
				r.want("out", v, "tcp "+end(f.behind, 4000)+" > "+end(f.server, 80))
			}
			o, _ := r.fromVPC(pkttest.TCP(end(f.server, 80), end(f.behind, 4000), ipkt.SYN|ipkt.ACK, 7, 2, ""))
			r.want("answer", o, "tcp "+end(f.server, 80)+" > "+end(f.member, 4000))
			exceeded := map[string]uint8{"IPv4": 11, "IPv6": 3}[f.name]
			o, _ = r.fromVPC(pkttest.ICMPError(f.router, f.behind, exceeded, 0, 0, pkttest.TCP(end(f.behind, 4000), end(f.server, 80), ipkt.SYN, 1, 0, ""), 100))
			if len(o) != 1 {
				t.Errorf("the error of a router on the way: %q", o)
			}
			// Nobody there opens anything.
			o, v := r.fromVPC(pkttest.TCP(end(f.server, 81), end(f.behind, 4000), ipkt.SYN, 1, 0, ""), pkttest.TCP(end(f.server, 81), end(f.member, 4000), ipkt.SYN, 1, 0, ""))
			r.want("from the internet", append(o, v...))
			for _, to := range []string{f.own, f.private, f.vpc, f.metadata, f.network, "127.0.0.1", "::1"} {
				if netip.MustParseAddr(to).Is4() == netip.MustParseAddr(f.member).Is4() {
					_, v = r.fromOverlay(ask(to))
					r.want("to "+to, v)
				}
			}
			for name, p := range map[string]*policy.Policy{
				"default drop": policy.New(policy.Drop, nil),
				"a rule":       policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, Proto: ipkt.TCP, Direction: policy.In, Ports: []policy.PortRange{{First: 25, Last: 80}}}}),
			} {
				r.e.SetPolicy(p)
				_, v = r.fromOverlay(ask(f.server))
				r.want(name, v)
			}
			r.e.SetPolicy(policy.New(policy.Drop, []policy.Rule{{Action: policy.Accept, Direction: policy.In, To: []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr(f.server), netip.MustParseAddr(f.server).BitLen())}}}))
			_, v = r.fromOverlay(pkttest.TCP(end(f.member, 4001), end(f.server, 80), ipkt.SYN, 1, 0, ""))
			if len(v) != 1 {
				t.Errorf("what a rule accepts: %q", v)
			}
			r.drain()
			r.account()
		})
	}
}

// TestExitOfAliases: the internet doesn't know overlay hosts by the aliases that the VPC has
// for them. Sockets of the host don't tell networks apart, so they are refused there.
func TestExitOfAliases(t *testing.T) {
	for _, byHost := range []bool{false, true} {
		h := &handed{}
		r := newRig(t, exit, func(c *Config) {
			c.Host = h
			c.Maps = []AddressMap{{Hosts: OverlaySide, Real: netip.MustParsePrefix("10.0.0.0/24"), Alias: netip.MustParsePrefix("10.9.0.0/24")}}
			c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}})
			if byHost {
				c.Masquerade[2].Address, c.Masquerade[2].ByHost = netip.Addr{}, true
			}
		})
		h.e = r.e
		_, v := r.fromOverlay(pkttest.TCP("10.0.0.10:4000", "172.31.0.20:80", ipkt.SYN, 1, 0, ""))
		r.want("to the VPC", v, "tcp 10.9.0.10:4000 > 172.31.0.20:80")
		o, v := r.fromOverlay(pkttest.TCP("10.0.0.10:4000", "44.129.0.80:80", ipkt.SYN, 1, 0, ""))
		if byHost {
			r.want("to the internet", v)
			if len(o) != 1 || len(h.seen) > 0 || r.drops(OverlaySide, dropNoAddress) != 1 {
				t.Errorf("by the host's sockets: answer %q, handed over %v", o, h.seen)
			}
			continue
		}
		r.want("to the internet", v, "tcp "+end(behind4, 4000)+" > 44.129.0.80:80")
	}
}

// TestExitBesideVPC: an exit that has no address in the VPC changes nothing of the way there,
// whether its addresses are private or the internet's: a forward leads there, and whoever
// else wants to needs a rule.
func TestExitBesideVPC(t *testing.T) {
	const public = "44.130.0.0/16"
	for _, server := range []string{"172.31.0.20", "44.130.0.20"} {
		t.Run(server, func(t *testing.T) {
			h := &handed{}
			r := newRig(t, func(c *Config) {
				c.VPC.Sources = append(c.VPC.Sources, netip.MustParsePrefix(public))
				c.Host = h
				c.Masquerade = []Masquerade{{To: netip.MustParsePrefix("172.31.0.0/16"), Routed: true}, {To: netip.MustParsePrefix(public), Routed: true},
					{To: netip.MustParsePrefix("0.0.0.0/0"), ByHost: true, Invites: true, Except: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}}}
				c.Forwards = []PortForward{{From: OverlaySide, Proto: ipkt.TCP, Listen: netip.MustParseAddrPort("10.0.0.1:2222"), To: netip.AddrPortFrom(netip.MustParseAddr(server), 22)}}
			})
			h.e = r.e
			_, v := r.fromOverlay(pkttest.TCP("10.0.0.10:4000", "10.0.0.1:2222", ipkt.SYN, 1, 0, ""))
			r.want("by a forward", v, "tcp 10.0.0.10:4000 > "+end(server, 22))
			_, v = r.fromOverlay(pkttest.TCP("10.0.0.10:4000", end(server, 80), ipkt.SYN, 1, 0, ""))
			r.want("without a rule", v)
			r.e.SetPolicy(policy.New(policy.Accept, []policy.Rule{{Action: policy.Accept, Direction: policy.In}}))
			_, v = r.fromOverlay(pkttest.TCP("10.0.0.10:4000", end(server, 80), ipkt.SYN, 1, 0, ""))
			r.want("with a rule", v, "tcp 10.0.0.10:4000 > "+end(server, 80))
			if len(h.seen) > 0 {
				t.Errorf("by the host's sockets: %v", h.seen)
			}
		})
	}
}
