package nat

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// place is where clients are, and the server that they use.
type place struct {
	opener
	address func(i int) string
	server  string
}

// places returns where clients may be: in the VPC, behind two members, or in the VPC with
// IPv6 and without translation.
func places(p *player) map[string]place {
	masquerade := NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(external)}
	forward := NewFlow{To: VPC, Source: Masquerade, Address: ipkt.Bytes(netip.MustParseAddr("172.31.0.1")), Server: ipkt.Bytes(netip.MustParseAddr("172.31.0.20"))}
	v4 := func(net string) func(int) string {
		return func(i int) string { return fmt.Sprintf("%s.%d.%d", net, i/250%250, 1+i%250) }
	}
	return map[string]place{
		"the VPC":        {opener{p: p, side: VPC, how: masquerade}, v4("172.31"), "10.0.0.10"},
		"a member":       {opener{p: p, side: Overlay, member: 1, how: forward}, v4("10.9"), "172.31.0.1"},
		"another member": {opener{p: p, side: Overlay, member: 2, how: forward}, v4("10.8"), "172.31.0.1"},
		"the VPC, IPv6": {opener{p: p, side: VPC, how: NewFlow{To: Overlay}},
			func(i int) string { return fmt.Sprintf("fd77:1:0:%x::%x", i%250, 16+i/250) }, "fd77:100::50"},
	}
}

// ask sends the first packet of a flow, and returns its answer as it comes from the server.
func (l *place) ask(proto uint8, client string, port int) (answer []byte, why Refusal) {
	from := netip.AddrPortFrom(netip.MustParseAddr(client), uint16(port)).String()
	to := netip.AddrPortFrom(netip.MustParseAddr(l.server), 80).String()
	var b []byte
	switch proto {
	case ipkt.TCP:
		b = pkttest.TCP(from, to, ipkt.SYN, 100, 0, "")
	case ipkt.UDP:
		b = pkttest.UDP(from, to, "x")
	default:
		b = pkttest.Echo(client, l.server, false, uint16(port), "x")
	}
	out, why := l.open(b)
	if out == "" {
		return nil, why
	}
	var src, dst, rest string
	var id uint16
	switch proto {
	case ipkt.TCP:
		fmt.Sscanf(out, "tcp %s > %s", &src, &dst)
		return pkttest.TCP(dst, src, synack, 500, 101, ""), Accepted
	case ipkt.UDP:
		fmt.Sscanf(out, "udp %s > %s", &src, &dst)
		return pkttest.UDP(dst, src, "y"), Accepted
	}
	fmt.Sscanf(out, "icmp %s %s > %s id %d", &rest, &src, &dst, &id)
	return pkttest.Echo(dst, src, true, id, "x"), Accepted
}

// answer lets an answer come, and reports whether it reaches the client.
func (l *place) answer(b []byte, client string) bool {
	got, _ := l.p.send(1-l.side, b)
	client = netip.MustParseAddr(client).String()
	return strings.Contains(got, "> "+client) || strings.Contains(got, "> ["+client+"]")
}

// finish completes the handshake of a connection.
func (l *place) finish(client string, port int) {
	l.open(pkttest.TCP(netip.AddrPortFrom(netip.MustParseAddr(client), uint16(port)).String(),
		netip.AddrPortFrom(netip.MustParseAddr(l.server), 80).String(), ipkt.ACK, 101, 501, ""))
}

// TestStanding floods table and ports from more addresses than they have room for, and so
// fast that all is used up before an answer comes, one and a half times over. A client
// that has shown that it gets its answers keeps whatever it opens. One that was never
// seen does if its answer comes before half of it is used up.
func TestStanding(t *testing.T) {
	notShort(t)
	floods := map[string]func(l *place, from string, port int){
		"SYN":  func(l *place, from string, port int) { l.ask(ipkt.TCP, from, port) },
		"UDP":  func(l *place, from string, port int) { l.ask(ipkt.UDP, from, port) },
		"echo": func(l *place, from string, port int) { l.ask(ipkt.ICMP, from, port) },
		"SYN, answered": func(l *place, from string, port int) {
			if b, _ := l.ask(ipkt.TCP, from, port); b != nil {
				l.answer(b, from)
			}
		},
		"UDP, answered": func(l *place, from string, port int) {
			if b, _ := l.ask(ipkt.UDP, from, port); b != nil {
				l.answer(b, from)
			}
		},
		"SYN, FIN": func(l *place, from string, port int) {
			l.ask(ipkt.TCP, from, port)
			l.open(pkttest.TCP(netip.AddrPortFrom(netip.MustParseAddr(from), uint16(port)).String(),
				netip.AddrPortFrom(netip.MustParseAddr(l.server), 80).String(), fin, 101, 7, ""))
		},
		"SYN, RST, data": func(l *place, from string, port int) {
			l.ask(ipkt.TCP, from, port)
			client, server := netip.AddrPortFrom(netip.MustParseAddr(from), uint16(port)).String(), netip.AddrPortFrom(netip.MustParseAddr(l.server), 80).String()
			l.open(pkttest.TCP(client, server, ipkt.RST, 101, 0, ""))
			l.open(pkttest.TCP(client, server, ipkt.ACK, 101, 7, "x"))
		},
	}
	for _, way := range [][2]string{{"the VPC", "the VPC"}, {"the VPC, IPv6", "the VPC, IPv6"}, {"the VPC", "a member"},
		{"a member", "the VPC"}, {"a member", "another member"}, {"a member", "a member"}} {
		for name, flood := range floods {
			for what, set := range map[string]Settings{"table": {MaxFlows: 4000}, "ports": {MaxFlows: 40000}} {
				if what == "ports" && way[0] == "the VPC, IPv6" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/from %s beside %s", what, name, way[0], way[1]), func(t *testing.T) {
					p := newPlayer(t, set)
					attacker, us := places(p)[way[0]], places(p)[way[1]]
					room, first := set.MaxFlows, 1024
					if what == "ports" { // of the lower class there are few
						room, first = 1023, 1
					}
					if way[0] == "a member" {
						room /= 2
					}
					rng, n := rand.New(rand.NewPCG(1, 1)), 0
					spray := func(count int) {
						for range count {
							flood(&attacker, attacker.address(1000+rng.IntN(60000)), first+n%1000)
							n++
						}
					}
					known := us.address(0)
					if b, why := us.ask(ipkt.TCP, known, first+900); !us.answer(b, known) {
						t.Fatalf("before the flood: %s", RefusalNames[why])
					}
					us.finish(known, first+900)
					spray(room)

					type asked struct {
						proto  uint8
						client string
						port   int
						answer []byte
					}
					ask := func(round int, client string, each int) (list []asked) {
						for i := range each {
							for _, proto := range []uint8{ipkt.TCP, ipkt.UDP, ipkt.ICMP} {
								port := first + round*each + i
								b, why := us.ask(proto, client, port)
								if b == nil {
									t.Fatalf("round %d: %s is refused flow %d of protocol %d: %s", round, client, i, proto, RefusalNames[why])
								}
								list = append(list, asked{proto, client, port, b})
							}
						}
						return list
					}
					all := func(round int, list []asked) {
						for i, a := range list {
							if !us.answer(a.answer, a.client) {
								t.Fatalf("round %d: %s lost flow %d of protocol %d", round, a.client, i, a.proto)
							}
							if a.proto == ipkt.TCP {
								us.finish(a.client, a.port)
							}
						}
					}
					for round := range 3 {
						p.sleep(100 * time.Millisecond)
						list := ask(round, known, 10)
						spray(room * 3 / 2)
						all(round, list)

						list = ask(round, us.address(1+round), 1)
						spray(room / 2)
						all(round, list)
					}
					p.check()
				})
			}
		}
	}
}

// TestNobodyTakesAllByProof: a client that is proven and greedy takes nothing from one that
// was never seen.
func TestNobodyTakesAllByProof(t *testing.T) {
	notShort(t)
	for name, side := range map[string]string{"VPC": "the VPC", "member": "a member", "IPv6": "the VPC, IPv6"} {
		p := newPlayer(t, Settings{MaxFlows: 4000})
		greedy, us := places(p)[side], places(p)[side]
		for _, other := range []int{7, 8, 9} { // each alone may have half
			b, _ := greedy.ask(ipkt.TCP, greedy.address(other), 2000)
			greedy.answer(b, greedy.address(other))
			greedy.finish(greedy.address(other), 2000)
		}
		n := 0
		spray := func(count int) {
			for range count {
				greedy.ask(ipkt.TCP, greedy.address(7+n%3), 3000+n)
				n++
			}
		}
		spray(6000)
		for i := range 20 {
			client := us.address(1000 + i)
			b, why := us.ask(ipkt.TCP, client, 4000)
			if b == nil {
				t.Fatalf("%s: newcomer %d is refused: %s", name, i, RefusalNames[why])
			}
			spray(6000)
			if !us.answer(b, client) {
				t.Fatalf("%s: newcomer %d lost its connection", name, i)
			}
		}
		p.check()
	}
}

// TestProofOutlivesFlows: a client is still known when all its connections have ended, but
// not more clients than there is room for.
func TestProofOutlivesFlows(t *testing.T) {
	notShort(t)
	p := newPlayer(t, Settings{})
	l := places(p)["the VPC"]
	connect := func(client string) {
		b, _ := l.ask(ipkt.TCP, client, 4000)
		l.answer(b, client)
		l.finish(client, 4000)
		from, to := client+":4000", l.server+":80"
		p.mustPass("RST", VPC, pkttest.TCP(from, to, ipkt.RST, 101, 0, ""))
	}
	standing := func(client string) standing {
		if c := p.tab.clients[clientKey{addr: ipkt.Bytes(netip.MustParseAddr(client))}]; c != nil {
			return c.standing
		}
		return silent
	}
	connect(l.address(0))
	p.sleep(5 * time.Minute)
	if p.tab.Len() != 0 || standing(l.address(0)) != proven {
		t.Fatalf("%d flows left; the client's standing is %d", p.tab.Len(), standing(l.address(0)))
	}
	p.check()
	for i := range maxRemembered {
		connect(l.address(1 + i))
		p.sleep(5 * time.Minute)
	}
	if standing(l.address(0)) == proven || standing(l.address(1)) != proven {
		t.Error("not the oldest one is forgotten")
	}
	p.check()
}

// TestForgedProof: what a forger sends who doesn't see the answers proves nothing, whatever
// scale the SYN announces, and doesn't make a flow that never makes room.
func TestForgedProof(t *testing.T) {
	p := newPlayer(t, Settings{})
	rng := rand.New(rand.NewPCG(1, 1))
	firm := 0
	const tries = 2000
	for i := range tries {
		client := fmt.Sprintf("172.31.%d.%d:4000", 1+i/250, 1+i%250)
		syn := pkttest.Packet{Proto: ipkt.TCP, Src: pkttest.Addr(client), Dst: pkttest.Addr(o1), Flags: ipkt.SYN, Seq: 100, Window: 65535, Options: []byte{3, 3, 14, 0}}
		out := p.mustPass("SYN", VPC, syn.Bytes())
		answer := pkttest.Packet{Proto: ipkt.TCP, Src: pkttest.Addr(o1), Dst: pkttest.Addr(strings.Fields(out)[1]), Flags: synack, Seq: rng.Uint32(), Ack: 101, Window: 65535, Options: []byte{3, 3, 14, 0}}
		p.mustPass("SYN/ACK", Overlay, answer.Bytes())
		for range 4 {
			p.send(VPC, pkttest.TCP(client, o1, []uint8{ipkt.ACK, fin}[rng.IntN(2)], 101, rng.Uint32(), ""))
		}
		c := p.tab.clients[clientKey{addr: ipkt.Bytes(pkttest.Addr(client).Addr())}]
		if c.standing > answered || c.half.Count() == 0 {
			firm++
		}
	}
	if firm > 3 {
		t.Errorf("%d of %d forged handshakes were taken for finished ones", firm, tries)
	}
	p.check()
}

// TestFloodLeavesClosed: a flood doesn't take the flows and ports of connections that have
// just ended. Their servers may still ask, and take a new connection from the same port for
// the old one.
func TestFloodLeavesClosed(t *testing.T) {
	notShort(t)
	for what, set := range map[string]Settings{"table": {MaxFlows: 4000}, "ports": {MaxFlows: 40000}} {
		p := newPlayer(t, set)
		l := places(p)["the VPC"]
		room, first := 4000, 1024
		if what == "ports" {
			room, first = 1023, 1
		}
		client := func(i int) string { return fmt.Sprintf("172.31.0.1:%d", first+i) }
		for i := range 50 {
			p.handshake(client(i), fmt.Sprintf("10.0.0.1:%d", first+i))
			p.close(client(i), fmt.Sprintf("10.0.0.1:%d", first+i))
		}
		for i := range 3 * room {
			l.ask(ipkt.TCP, l.address(1000+i), first+i%1000)
		}
		for i := range 50 {
			p.want(what, Overlay, pkttest.TCP(o1, fmt.Sprintf("10.0.0.1:%d", first+i), fin, 501, 102, ""), "tcp 10.0.0.10:80 > "+client(i))
		}
		p.check()
	}
}
