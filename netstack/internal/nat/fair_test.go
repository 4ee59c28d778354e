package nat

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// opener opens flows in a way of its own.
type opener struct {
	p      *player
	side   Side
	member uint64
	how    NewFlow
}

// open gives the first packet of a flow to the table and returns what came out.
func (o *opener) open(b []byte) (out string, why Refusal) {
	o.p.t.Helper()
	o.p.r.Enter()
	defer o.p.r.Leave()
	var v ipkt.View
	var k Key
	if r := ipkt.Parse(b, &v); r != ipkt.OK {
		o.p.t.Fatalf("packet refused: %v", r)
	}
	o.p.tab.KeyOf(o.side, &v, &k)
	f, dir := o.p.tab.Find(o.p.now, &k)
	if f == nil {
		n := o.how
		n.Member = o.member
		asked := o.p.tab.MayOpen(o.p.now, &k, &v, &n)
		if f, dir, why = o.p.tab.Open(o.p.now, &k, &v, &n); why != asked {
			o.p.t.Errorf("%s: asked, it is refused with %q, opened with %q", pkttest.Describe(b), RefusalNames[asked], RefusalNames[why])
		}
		if f == nil {
			return "", why
		}
	}
	if o.p.tab.Track(o.p.now, f, dir, &v) != Pass {
		return "", Accepted
	}
	f.Rewrite(dir, &v)
	return pkttest.Describe(b), Accepted
}

// flood is packets of one that takes whatever it gets.
type flood struct {
	name   string
	rate   int // packets between another's first packet and its answer
	packet func(i int) []byte
}

// greedy are the ways to be greedy from the VPC. to are addresses of servers.
func greedy(src func(i int) string, dst string) []flood {
	at := func(i int) string {
		return netip.AddrPortFrom(netip.MustParseAddr(src(i)), uint16(1024+i%60000)).String()
	}
	to := func(port int) string { return netip.AddrPortFrom(netip.MustParseAddr(dst), uint16(port)).String() }
	return []flood{
		{"SYN", 1000, func(i int) []byte { return pkttest.TCP(at(i), to(80), ipkt.SYN, 1, 0, "") }},
		{"UDP", 1000, func(i int) []byte { return pkttest.UDP(at(i), to(80), "x") }},
		{"echo", 1000, func(i int) []byte { return pkttest.Echo(src(i), dst, false, uint16(i), "x") }},
		{"SYN to many ports", 1000, func(i int) []byte { return pkttest.TCP(at(i/3), to(1+i%9999), ipkt.SYN, 1, 0, "") }},
		{"SYN from one port", 1000, func(i int) []byte { return pkttest.TCP(at(7), to(1+i%60000), ipkt.SYN, 1, 0, "") }},
		{"low ports", 200, func(i int) []byte {
			return pkttest.UDP(netip.AddrPortFrom(netip.MustParseAddr(src(i)), uint16(1+i%1023)).String(), to(1+i/1023), "x")
		}},
	}
}

var sources = map[string]func(i int) string{
	"one client": func(int) string { return "172.31.0.10" },
	"a /24":      func(i int) string { return fmt.Sprintf("172.31.0.%d", 1+i%250) },
	"the VPC":    func(i int) string { return fmt.Sprintf("172.31.%d.%d", i*7%256, 1+i*13%250) },
}

// notShort leaves floods of a single goroutine out where each step costs tenfold: under
// the race detector and under emulation.
func notShort(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("a long flood")
	}
}

// TestGreedy floods the table and goes on at full rate, while others open a connection
// each tenth of a second: not one is refused or loses its port before the answer comes.
func TestGreedy(t *testing.T) {
	notShort(t)
	settings := map[string]Settings{
		"plain":                {},
		"by destination":       {PortSharing: ByDestination},
		"endpoint independent": {FilterUDP: EndpointIndependent, FilterTCP: EndpointIndependent},
		"small table":          {MaxFlows: 20000},
	}
	const first = 64500
	for setting, set := range settings {
		for from, src := range sources {
			if setting != "plain" && from != "the VPC" {
				continue
			}
			for _, g := range greedy(src, "10.0.0.10") {
				t.Run(fmt.Sprint(setting, "/", from, "/", g.name), func(t *testing.T) {
					p := newPlayer(t, set)
					masquerade := NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external)}
					attacker := opener{p: p, side: VPC, how: masquerade}
					p.handshake("172.31.7.7:4000", ro)
					n := 0
					spray := func(count int) {
						for range count {
							attacker.open(g.packet(n))
							n++
						}
					}
					spray(first)
					for i := range 10 {
						p.sleep(100 * time.Millisecond)
						victim(p, i, func() { spray(g.rate) })
					}
					p.mustPass("established flow of another", VPC, pkttest.TCP("172.31.7.7:4000", o1, ipkt.ACK, 101, 501, "x"))
					p.check()
				})
			}
		}
	}
}

// victim opens a connection, a UDP flow and an echo, the first two at ports of each
// class, with a pause before the answers.
func victim(p *player, i int, meanwhile func()) {
	p.t.Helper()
	host := fmt.Sprintf("172.31.0.%d", 66+i/3)
	type flow struct{ client, outside string }
	var conns, datagrams []flow
	for _, port := range []int{20000 + i, 700 + i} {
		client := fmt.Sprintf("%s:%d", host, port)
		got, why := p.send(VPC, pkttest.TCP(client, o1, ipkt.SYN, 100, 0, ""))
		if got == "" {
			p.t.Fatalf("connection %d refused: %s", i, RefusalNames[why])
		}
		conns = append(conns, flow{client, got[len("tcp ") : len(got)-len(" > 10.0.0.10:80")]})
		if got, why = p.send(VPC, pkttest.UDP(client, o1, "x")); got == "" {
			p.t.Fatalf("UDP flow %d refused: %s", i, RefusalNames[why])
		}
		datagrams = append(datagrams, flow{client, got[len("udp ") : len(got)-len(" > 10.0.0.10:80")]})
	}
	if got, why := p.send(VPC, pkttest.Echo(host, "10.0.0.10", false, uint16(7000+i), "x")); got == "" {
		p.t.Fatalf("echo %d refused: %s", i, RefusalNames[why])
	}
	p.now += int64(20 * time.Millisecond)
	meanwhile()
	for _, f := range conns {
		p.mustPass("SYN/ACK", Overlay, pkttest.TCP(o1, f.outside, synack, 500, 101, ""))
		p.mustPass("ACK", VPC, pkttest.TCP(f.client, o1, ipkt.ACK, 101, 501, ""))
	}
	for _, f := range datagrams {
		p.mustPass("UDP answer", Overlay, pkttest.UDP(o1, f.outside, "y"))
	}
}

// TestGreedyEstablished: one client with all the established flows it can get leaves
// enough of the ports and of the table to others, and so does a second one.
func TestGreedyEstablished(t *testing.T) {
	notShort(t)
	for _, set := range []Settings{{}, {MaxFlows: 20000}, {PortSharing: ByDestination}} {
		p := newPlayer(t, set)
		got := 0
		for _, host := range []string{"172.31.0.10", "172.31.0.11", "172.31.0.12"} {
			for i := range 62000 {
				out, _ := p.send(VPC, pkttest.UDP(fmt.Sprintf("%s:%d", host, 1024+i), o1, "x"))
				if out == "" {
					continue
				}
				got++
				p.mustPass("answer", Overlay, pkttest.UDP(o1, out[len("udp "):len(out)-len(" > 10.0.0.10:80")], "y"))
				p.mustPass("after it", VPC, pkttest.UDP(fmt.Sprintf("%s:%d", host, 1024+i), o1, "x"))
			}
		}
		all := min(61512, p.tab.Limit())
		if got < all*9/10 {
			t.Errorf("%d flows in all, want most of %d", got, all)
		}
		if c := p.tab.clients[clientKey{addr: ipkt.Bytes(netip.MustParseAddr("172.31.0.10"))}]; c.refused == 0 {
			t.Error("what was refused to the greedy client isn't counted")
		}
		for i := range 20 {
			victim(p, i, func() {})
		}
		waiters(p)
		p.check()
	}
	// Limits that are configured are those that hold.
	p := newPlayer(t, Settings{MaxPortsPerClient: 60000, MaxFlowsPerClient: 200000})
	for i := range 60000 {
		p.mustPass("within its limit", VPC, pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 1024+i), o1, "x"))
		p.mustPass("answer", Overlay, pkttest.UDP(o1, "10.0.0.1:"+portOf(p, 1024+i), "y"))
		p.mustPass("after it", VPC, pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 1024+i), o1, "x"))
	}
}

// portOf is the external port of the client's port.
func portOf(p *player, port int) string {
	k := clientKey{addr: ipkt.Bytes(netip.MustParseAddr("172.31.0.10"))}
	return fmt.Sprint(p.tab.pools[1].find(p.tab, &k, uint16(port)))
}

// TestGreedyMember: one overlay member that comes through forwards, from whatever
// addresses, half-open or answered, leaves room to the VPC and to other members.
func TestGreedyMember(t *testing.T) {
	notShort(t)
	const forward, target = "172.31.0.1:443", "172.31.0.20:443"
	for _, how := range []NewFlow{
		{To: VPC, Source: Keep, Server: ipkt.Bytes(netip.MustParseAddr("172.31.0.20"))},
		{To: VPC, Source: Masquerade, Address: ipkt.Bytes(netip.MustParseAddr("172.31.0.1")), Server: ipkt.Bytes(netip.MustParseAddr("172.31.0.20"))},
	} {
		for _, answered := range []bool{false, true} {
			for name, src := range map[string]func(i int) string{
				"one address": func(int) string { return "10.0.0.10" },
				"its /16":     func(i int) string { return fmt.Sprintf("10.9.%d.%d", i/250%250, 1+i%250) },
			} {
				p := newPlayer(t, Settings{MaxFlows: 40000})
				attacker := opener{p: p, side: Overlay, member: 1, how: how}
				other := opener{p: p, side: Overlay, member: 2, how: how}
				spray := func(n int) {
					for i := range n {
						out, _ := attacker.open(pkttest.UDP(fmt.Sprintf("%s:%d", src(i), 1024+i), forward, "x"))
						if out != "" && answered {
							var from, to string
							fmt.Sscanf(out, "udp %s > %s", &from, &to)
							p.send(VPC, pkttest.UDP(to, from, "y"))
						}
					}
				}
				spray(62000)
				for i := range 20 {
					p.sleep(100 * time.Millisecond)
					spray(500)
					victim(p, i, func() {})
					if out, why := other.open(pkttest.TCP(fmt.Sprintf("10.0.0.11:%d", 4000+i), forward, ipkt.SYN, 1, 0, "")); out == "" {
						t.Fatalf("%s, answered %v, source %d: another member is refused: %s", name, answered, how.Source, RefusalNames[why])
					}
					if out, why := other.open(pkttest.UDP(fmt.Sprintf("10.0.0.11:%d", 4000+i), forward, "x")); out == "" {
						t.Fatalf("%s, answered %v, source %d: another member's datagram is refused: %s", name, answered, how.Source, RefusalNames[why])
					}
				}
				p.check()
			}
		}
	}
}

// TestGreedy6: without translation only the table is scarce.
func TestGreedy6(t *testing.T) {
	notShort(t)
	for name, src := range map[string]func(i int) string{
		"one client": func(int) string { return "fd77:1::10" },
		"a /64":      func(i int) string { return fmt.Sprintf("fd77:1::%x", 16+i) },
		"a /48":      func(i int) string { return fmt.Sprintf("fd77:1:0:%x::10", i%60000) },
	} {
		p := newPlayer(t, Settings{MaxFlows: 20000})
		o := opener{p: p, side: VPC, how: NewFlow{To: Overlay}}
		for _, g := range greedy(src, "fd77:100::50") {
			n := 0
			spray := func(count int) {
				for range count {
					o.open(g.packet(n))
					n++
				}
			}
			spray(30000)
			for i := range 20 {
				p.sleep(100 * time.Millisecond)
				client, server := fmt.Sprintf("[fd77:1::7]:%d", 2000+i), "[fd77:100::50]:80"
				if out, why := o.open(pkttest.TCP(client, server, ipkt.SYN, 100, 0, "")); out == "" {
					t.Fatalf("%s, %s: connection %d refused: %s", name, g.name, i, RefusalNames[why])
				}
				spray(1000)
				p.mustPass("SYN/ACK", Overlay, pkttest.TCP(server, client, synack, 500, 101, ""))
				p.mustPass("RST", VPC, pkttest.TCP(client, server, ipkt.RST, 101, 0, ""))
			}
		}
		p.check()
	}
}

// TestGreedyHairpin: flows to other clients' mappings take from the same ports.
func TestGreedyHairpin(t *testing.T) {
	notShort(t)
	p := newPlayer(t, Settings{})
	p.mustPass("the mapping", VPC, pkttest.UDP(v2, o1, "x"))
	hairpin := opener{p: p, side: VPC, how: NewFlow{To: VPC, Source: Masquerade, Address: ipkt.Bytes(external), Filtered: true,
		Server: ipkt.Bytes(netip.MustParseAddr("172.31.0.11")), ServerPort: 4000}}
	for i := range 64500 {
		hairpin.open(pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 1024+i), ro, "x"))
	}
	for i := range 20 {
		victim(p, i, func() { hairpin.open(pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 1024+i), ro, "x")) })
	}
	p.want("the mapping", Overlay, pkttest.UDP(o1, ro, "y"), "udp 10.0.0.10:80 > 172.31.0.11:4000")
	p.check()
}

// waiters checks that those who have much and ask for more take nothing from those who
// wait for their first answer.
func waiters(p *player) {
	p.t.Helper()
	n := 0
	for i := 20; i < 30; i++ {
		victim(p, i, func() {
			for range 500 {
				n++
				p.send(VPC, pkttest.UDP(fmt.Sprintf("172.31.0.%d:%d", 10+n%3, 63100+n%1000), o1, "x"))
			}
		})
	}
}

// TestGreedyQuarantine: ports that are quarantined after a flood are no reason to
// refuse anybody, and a flood costs nobody a port that is kept for it.
func TestGreedyQuarantine(t *testing.T) {
	notShort(t)
	for _, filter := range []Filtering{AddressAndPortDependent, EndpointIndependent} {
		p := newPlayer(t, Settings{FilterUDP: filter})
		for i := range 64500 {
			p.send(VPC, pkttest.UDP(fmt.Sprintf("172.31.%d.10:%d", 100+i%100, 1024+i), o1, "x"))
		}
		p.sleep(121 * time.Second)
		if n := p.tab.pools[1].inQuarantine; n < 50000 {
			t.Fatalf("%d ports are quarantined", n)
		}
		for i := range 20 {
			victim(p, i, func() {})
		}
		waiters(p)
		p.check()
	}
	p := newPlayer(t, Settings{})
	var kept []Mapping
	for i := range 40000 {
		kept = append(kept, Mapping{Proto: ipkt.TCP, Client: netip.MustParseAddrPort(endpoint(i)), External: netip.AddrPortFrom(external, uint16(1024+i))})
	}
	if n := p.tab.Import(p.now, kept); n != len(kept) {
		t.Fatalf("%d of %d mappings taken", n, len(kept))
	}
	for i := range 64500 {
		p.send(VPC, pkttest.TCP(fmt.Sprintf("172.31.%d.10:%d", 100+i%100, 1024+i), o1, ipkt.SYN, 1, 0, ""))
	}
	lost := 0
	for i := 0; i < len(kept); i += 100 {
		if got, _ := p.send(VPC, pkttest.TCP(endpoint(i), o1, ipkt.ACK, 1, 1, "")); got != fmt.Sprintf("tcp 10.0.0.1:%d > 10.0.0.10:80", 1024+i) {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d kept ports lost", lost, len(kept)/100)
	}
}
