package conformance

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"ztgate/netstack"
)

// realHosts marks rows that only programs on real hosts can show; the mode e2e
// runs them.
func realHosts(b *bench) { panic(notHere("needs real hosts: make conformance runs it in namespaces")) }

// established opens a TCP flow with a window of 64240 both ways.
func (b *bench) established() *flow { return b.tcpFlow(at(v1, b.port()), at(o1, 80)) }

// both runs what a row does with a TCP connection in both orientations: opened
// from inside (TA), and from outside through a forward (TB).
func (b *bench) both(row func(f *flow)) {
	b.t.Helper()
	row(b.established())
	row(b.forwarded())
	b.note("TA and TB")
}

// userPorts: ports, timers and MSS.
func userPorts() []row {
	return []row{
		{"L-PORT", "source port preserved", func(b *bench) {
			for _, p := range append([]int{40000}, classPorts...) {
				want(b, fmt.Sprintf("UDP %d", p), int(b.openUDP(at(v1, p), at(o1, 5000)).Port()), p)
				want(b, fmt.Sprintf("TCP %d", p), int(b.openTCP(at(v1, p), at(o1, 5000)).Port()), p)
			}
			b.note("all preserved")
		}},
		{"L-PORT-SHARED", "one source port twice", func(b *bench) {
			f, g := b.tcpFlow(at(v1, 40077), at(o1, 80)), b.tcpFlow(at(v2, 40077), at(o1, 80))
			if f.ext == g.ext {
				b.failf("both are %s", f.ext)
			}
			f.talk()
			g.talk()
			b.note("%d and %d, both work", f.ext.Port(), g.ext.Port())
		}},
		{"L-UDP-TIMERS", "UDP timers", same("4787-REQ-5", "4787-REQ-5c")},
		{"L-TCP-TIMERS", "TCP timers", same("5382-REQ-5e", "5382-REQ-5t", "7857-S2.2")},
		{"L-OTHER-TIMERS", "ICMP timers", func(b *bench) {
			f := b.echoFlow(v1, o1, 7)
			b.advance(58 * time.Second)
			b.in(f.pong())
			p := b.out(ping(v16, o16, 7, 1, "x"))
			b.advance(58 * time.Second)
			b.in(pong(o16, v16, p.sport, 1, "x"))
			b.note("ICMP and ICMPv6 delivered at 58 s")
		}},
		{"L-MSS", "MSS clamped", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			nop := append([]byte{1, 1}, mssOption(9000)...)
			for i, c := range []struct {
				opts []byte
				want uint16
			}{{mssOption(1460), 1360}, {mssOption(536), 536}, {nil, 0}, {nop, 1360}, {mssOption(1361), 1360}} {
				p := b.out(tcp(at(v1, 4000+i), at(o1, 80), segment{flags: syn, seq: 1, opts: c.opts}))
				want(b, fmt.Sprintf("MSS of %x", c.opts), mssOf(p), c.want)
				want(b, "length of the options", len(p.tcp().Options()), (len(c.opts)+3)/4*4)
				r := b.in(tcp(at(o1, 80), p.from(), segment{flags: syn | ack, seq: 9, ack: 2, opts: mssOption(1460)}))
				want(b, "MSS of the SYN/ACK", mssOf(r), 1360)
			}
			p := b.out(tcp(at(v16, 4000), at(o16, 80), segment{flags: syn, seq: 1, opts: mssOption(1440)}))
			want(b, "IPv6 MSS", mssOf(p), 1340)
			b.note("1360, 536, none, 1360, 1360; SYN/ACK 1360; IPv6 1340")
		}},
		{"L-HAIRPIN", "forward from its target's network", func(b *bench) { hairpinForward(b, true) }},
	}
}

// userPing: ping.
func userPing() []row {
	return []row{
		{"L-PING-ID", "pings with one identifier", func(b *bench) {
			f, g := b.echoFlow(v1, o1, 77), b.echoFlow(v2, o1, 77)
			for i := range 10 {
				for _, x := range []*flow{f, g} {
					p := b.out(ping(x.in.Addr(), o1, 77, uint16(i), "abc"))
					want(b, "identifier", p.sport, x.ext.Port())
					r := b.in(pong(o1, ro, p.sport, uint16(i), "abc"))
					want(b, "back at", r.to(), x.in)
				}
			}
			b.in(pong(o1, ro, f.ext.Port(), 3, "abc")) // a duplicate
			b.in(pong(o1, ro, f.ext.Port(), 99, "abc"))
			b.none(overlay, pong(o2, ro, g.ext.Port(), 3, "abc"))
			b.note("0 lost; second leaves with id %d; duplicates delivered, another host's refused", g.ext.Port())
		}},
		{"L-PING-BIG", "fragmented ping", func(b *bench) {
			for i, n := range []int{4000, 65507} {
				data := b.random(n)
				parts := cut(ping(v1, o1, 7, 1, data), uint32(n), 1480)
				_, o := b.push(vpc, reversed(parts)...)
				w := reassemble(o)
				if w == nil || string(w.payload) != data {
					b.failf("request of %d bytes, reversed: %s", n, list(o))
				}
				v, _ := b.push(overlay, reversed(cut(pong(o1, ro, w.sport, 1, data), uint32(n+i), 1480))...)
				if w = reassemble(v); w == nil || string(w.payload) != data || w.dst != v1 {
					b.failf("reply of %d bytes, reversed: %s", n, list(v))
				}
			}
			b.note("4000 and 65507 bytes, reversed fragments, both ways")
		}},
		{"L-PING-UNSOL", "unsolicited echo reply", func(b *bench) {
			b.none(overlay, pong(o1, ro, 77, 1, "x"))
			b.none(vpc, pong(v1, o1, 77, 1, "x"))
			b.note("neither delivered nor leaked, counted")
		}},
	}
}

// userTraceroute: traceroute.
func userTraceroute() []row {
	return []row{
		{"L-TRACE-UDP", "traceroute by UDP", func(b *bench) {
			for hop := 1; hop <= 3; hop++ {
				b.probe(hop, udp(at(v1, 40000+hop), at(hh, 33434+hop), "probe", ttl(uint8(hop))))
			}
			b.note("%s, %s, %s", rv, mm, hh)
		}},
		{"L-TRACE-ICMP", "traceroute by ICMP", func(b *bench) {
			for hop := 1; hop <= 3; hop++ {
				for _, v := range []netip.Addr{v1, v2} {
					b.probe(hop, ping(v, hh, 119, uint16(hop), "probe", ttl(uint8(hop))))
				}
			}
			b.note("three hops for two hosts with one id")
		}},
		{"L-TRACE-TCP", "traceroute by TCP", func(b *bench) {
			for hop := 1; hop <= 3; hop++ {
				b.probe(hop, tcp(at(v1, 40000+hop), at(hh, 22), segment{flags: syn, seq: 1}, ttl(uint8(hop))))
			}
			b.note("%s, %s, %s", rv, mm, hh)
		}},
		{"L-TRACE-MTR", "mtr without false loss", func(b *bench) {
			for i := range 20 {
				b.advance(200 * time.Millisecond)
				for hop := 1; hop <= 3; hop++ {
					b.probe(hop, ping(v1, hh, 300, uint16(i*10+hop), "mtr", ttl(uint8(hop))))
					b.probe(hop, udp(at(v2, 41000), at(hh, 33000+i), "mtr", ttl(uint8(hop))))
					b.probe(hop, tcp(at(v1, 42000+i*4+hop), at(hh, 22), segment{flags: syn, seq: 1}, ttl(uint8(hop))))
				}
			}
			b.note("ICMP, UDP and TCP, 180 probes, 0 %% lost")
		}},
		{"L-TRACE-6", "traceroute by IPv6", func(b *bench) {
			for hop := 1; hop <= 3; hop++ {
				b.probe(hop, udp(at(v16, 40000+hop), at(hh6, 33434+hop), "probe", ttl(uint8(hop))))
				b.probe(hop, ping(v16, hh6, 119, uint16(hop), "probe", ttl(uint8(hop))))
				b.probe(hop, tcp(at(v16, 41000+hop), at(hh6, 80), segment{flags: syn, seq: 1}, ttl(uint8(hop))))
			}
			b.note("three hops by UDP, ICMP and TCP")
		}},
		{"L-TRACE-IN", "traceroute from outside", func(b *bench) {
			b.start(func(s *setup) { s.forwards = []forward{{protoTCP, at(ro, 8080), at(v1, 80)}} })
			e := b.inErr(tcp(at(o1, 7000), at(ro, 8080), segment{flags: syn, seq: 1}, ttl(1)), 11, 0)
			want(b, "first hop", e.src, ro)
			got := b.in(tcp(at(o1, 7001), at(ro, 8080), segment{flags: syn, seq: 1}, ttl(2)))
			e = b.out(icmpError(addr("10.77.1.9"), 11, 0, 0, got.b, 8)) // a router inside
			want(b, "second hop", e.src, ro)
			want(b, "quoted", e.quoted().to(), at(ro, 8080))
			b.note("both hops are %s", ro)
		}},
	}
}

// userPathMTU: path MTU.
func userPathMTU() []row {
	return []row{
		{"L-PMTUD-OUT", "path MTU outbound", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(hh, 80))
			p := b.out(tcp(f.in, f.out, segment{flags: ack, seq: f.iss, ack: f.irs, data: pad(1460)}, df))
			e := b.in(icmpError(mm, 3, 4, 1400, p.b, 8))
			translated(b, e, f, mm, 3, 4)
			want(b, "MTU", e.mtu, 1400)
			u := b.udpFlow(at(v1, b.port()), at(hh, 5000))
			e = b.in(icmpError(mm, 3, 4, 1400, u.seen(), 8))
			translated(b, e, u, mm, 3, 4)
			i := b.echoFlow(v1, hh, 9)
			e = b.in(icmpError(mm, 3, 4, 1400, ping(i.ext.Addr(), hh, i.ext.Port(), 1, "abc"), 8))
			translated(b, e, &flow{in: i.in, out: at(hh, 9)}, mm, 3, 4)
			b.note("3/4 from M about TCP, UDP and echo reaches V1, MTU 1400")
		}},
		{"L-PMTUD-IN", "path MTU inbound", func(b *bench) {
			b.start(func(s *setup) { s.vpcMTU = 1300 })
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			e := b.inErr(tcp(f.out, f.ext, segment{flags: ack, seq: f.irs, ack: f.iss, data: pad(1460)}, df), 3, 4)
			want(b, "source", e.src, ro)
			want(b, "MTU", e.mtu, 1300)
			want(b, "quoted destination", e.quoted().to(), f.ext)
			f.talk()
			b.note("3/4 from %s, inner %s, MTU 1300", ro, f.ext)
		}},
		{"L-BLACKHOLE", "path MTU black hole", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			p := b.out(tcp(at(v1, 4000), at(hh, 80), segment{flags: syn, seq: 1, opts: mssOption(1460)}))
			r := b.in(tcp(at(hh, 80), p.from(), segment{flags: syn | ack, seq: 9, ack: 2, opts: mssOption(1460)}))
			if mssOf(p) > 1360 || mssOf(r) > 1360 {
				b.failf("MSS %d and %d", mssOf(p), mssOf(r))
			}
			b.note("clamp on by default: %d and %d", mssOf(p), mssOf(r))
		}},
	}
}

// userFragments: fragments.
func userFragments() []row {
	return []row{
		{"L-FRAG-DUP", "duplicate fragment", func(b *bench) {
			payload := strings.Repeat("0123456789abcdef", 128)
			parts := split(udp(at(v1, 4000), at(o1, 5000), payload), 0x700, 800, 800)
			_, o := b.push(vpc, parts[0], parts[0], parts[1], parts[2])
			b.whole(o, at(ro, 4000), payload)
			b.note("datagram whole, %d fragments out for 4", len(o))
		}},
		{"L-FRAG-OVERLAP", "overlapping fragment", func(b *bench) {
			b.overlap(udp(at(v1, 4000), at(o1, 5000), pad(72)), 40)
			b.note("nothing whole out")
		}},
		{"L-FRAG-TAIL", "fragment past the end", func(b *bench) {
			p := udp(at(v1, 4000), at(o1, 5000), pad(200))
			b.none(vpc, fragment(p, 8, 65512, false, []byte(pad(100))))
			b.note("dropped, counted")
		}},
		{"L-FRAG-DF", "fragments with DF", func(b *bench) {
			payload := strings.Repeat("0123456789abcdef", 128)
			b.fragments(vpc, split(udp(at(v1, 4000), at(o1, 5000), payload, df), 0x700, 800, 800), []int{0, 1, 2}, at(ro, 4000), payload)
			b.note("delivered")
		}},
		{"L-FRAG-8", "fragments of 8 bytes", func(b *bench) {
			payload := pad(24)
			b.fragments(vpc, split(udp(at(v1, 4000), at(o1, 5000), payload), 0x700, 8, 8), []int{0, 1, 2}, at(ro, 4000), payload)
			b.note("8+8+16 delivered")
		}},
	}
}

// userResets: resets.
func userResets() []row {
	return []row{
		{"L-RST-EXACT", "exact RST", func(b *bench) {
			b.both(func(f *flow) {
				f.pass(overlay, f.inSeg(int(rst), ""))
			})
			b.note("passed")
		}},
		{"L-RST-WIN", "RST in the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				f.pass(overlay, tcp(f.out, f.ext, segment{flags: rst, seq: f.irs + 20000}))
				b.advance(13 * time.Second)
				f.talk()
			})
			b.note("passed, data 13 s later delivered")
		}},
		{"L-RST-OUT", "RST outside the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				b.none(overlay, tcp(f.out, f.ext, segment{flags: rst, seq: f.irs + 1<<30}))
				f.talk()
			})
			b.note("dropped, flow lives")
		}},
		{"L-RST-SYN", "RST for a SYN", func(b *bench) {
			f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			b.none(overlay, tcp(f.out, f.ext, segment{flags: rst | ack, ack: 77777}))
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: rst | ack, ack: 1001}))
			b.note("wrong one dropped, right one passed")
		}},
	}
}

// userSegments: TCP segments.
func userSegments() []row {
	return []row{
		{"L-TCP-OOW", "segments outside the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				b.none(overlay, tcp(f.out, f.ext, segment{flags: ack, seq: f.irs + 3<<28, ack: f.iss, data: "x"}))
				b.none(vpc, tcp(f.in, f.out, segment{flags: ack, seq: f.iss + 3<<28, ack: f.irs, data: "x"}))
				b.none(overlay, tcp(f.out, f.ext, segment{flags: ack, seq: f.irs, ack: f.iss + 1<<28, data: "x"}))
				f.talk()
			})
			b.note("dropped all three, flow lives")
		}},
		{"L-TCP-PICKUP", "picked up from inside", func(b *bench) {
			f := &flow{b: b, in: at(v1, 4000), out: at(o1, 80), ext: at(ro, 4000), iss: 5000, irs: 7000}
			f.talk()
			b.start(func(s *setup) { s.strictTCP = true })
			b.engineOnly()
			b.none(vpc, tcp(at(v1, 4000), at(o1, 80), segment{flags: ack | psh, seq: 1, ack: 1, data: "x"}))
			b.note("on by default, port preserved; off: dropped")
		}},
		{"L-TCP-INMID", "not picked up from outside", func(b *bench) {
			b.none(overlay, tcp(at(o1, 80), at(ro, b.port()), segment{flags: ack | psh, seq: 1, ack: 1, data: "x"}))
			b.note("silent")
		}},
		{"L-TCP-FLAGS", "impossible flags", func(b *bench) {
			for i, fl := range impossibleFlags {
				b.none(vpc, tcp(at(v1, 4000+i), at(o1, 80), segment{flags: flagsOf(fl), seq: 1}))
			}
			b.out(tcp(at(v1, 4100), at(o1, 80), segment{flags: psh | ack, seq: 1, ack: 1}))
			b.note("seven dropped and counted, PA accepted as pickup")
		}},
		{"L-TCP-BAD", "broken segments", func(b *bench) {
			b.allow = true
			b.none(vpc, tcp(at(v1, 4000), at(o1, 80), segment{flags: syn, seq: 1}, badSum))
			b.allow = false
			for _, off := range []byte{4, 15} {
				p := tcp(at(v1, 4001), at(o1, 80), segment{flags: syn, seq: 1})
				p[20+12] = off << 4
				b.none(vpc, fixTransport(p))
			}
			b.push(vpc, tcp(at(v1, 4002), at(o1, 80), segment{flags: syn, seq: 1, opts: []byte{2, 0, 5, 180}}))
			b.note("checksum, data offset 4 and 15: dropped, counted; option of length 0 survived")
		}},
		{"L-TCP-OPTS", "segments untouched", func(b *bench) {
			opts := append(mssOption(1360), 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7)
			for i, o := range [][]byte{opts, append(mssOption(536), 34, 10, 1, 2, 3, 4, 5, 6, 7, 8), {30, 12, 0, 0x81, 1, 2, 3, 4, 5, 6, 7, 8},
				append([]byte{19, 18}, []byte("0123456789abcdef")...)} {
				p := tcp(at(v1, 4000+i), at(o1, 80), segment{flags: syn | 0xc0, seq: 0xfffffff0, opts: o, data: pad(i)})
				sameSegment(b, p, b.out(p))
			}
			p := tcp(at(v1, 4100), at(o1, 80), segment{flags: syn, seq: 1})
			p[20+12] |= 0x0e
			sameSegment(b, fixTransport(p), b.out(p))
			b.both(func(f *flow) {
				f.pass(vpc, tcp(f.in, f.out, segment{flags: ack | urg | 0x40, seq: f.iss, ack: f.irs, urgent: 0x1234, window: 77, data: "x"}))
				f.pass(overlay, tcp(f.out, f.ext, segment{flags: ack | urg | 0x40, seq: f.irs, ack: f.iss, urgent: 0x1234, window: 77, data: "x"}))
			})
			b.note("options, sequence numbers, ECE and CWR, reserved bits, urgent pointer identical")
		}},
	}
}

// userLimits: floods, a full table and used up ports.
func userLimits() []row {
	return []row{
		{"L-SYNFLOOD", "flood of SYNs", func(b *bench) { floodWith(b, protoTCP) }},
		{"L-TABLE-FULL", "flood of datagrams", func(b *bench) { floodWith(b, protoUDP) }},
		{"L-TABLE-ASSURED", "table full of answered flows", tableAssured},
		{"L-TABLE-GC", "expired flows go", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{UDP: 30 * time.Second} })
			e := b.engineOnly()
			n := b.scale(60_000)
			b.fillPorts(protoUDP, v1, at(o1, 5000), 1024, 1024+n-1)
			b.advance(61 * time.Second)
			if err := e.waitGone(1024 + uint16(n/2)); err != nil {
				b.failf("%v", err)
			}
			for range 200 {
				if len(e.engine.Flows(netstack.FlowFilter{})) == 0 {
					b.note("%d entries gone by themselves after 2 x timer", n)
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			b.failf("%d of %d entries left after 2 x timer", len(e.engine.Flows(netstack.FlowFilter{})), n)
		}},
		{"L-PORT-EXHAUST", "ports used up", func(b *bench) {
			b.engineOnly()
			b.fillPorts(protoUDP, v1, at(o1, 5000), 1, 1023)
			e := b.outErr(udp(at(v2, 500), at(o1, 5000), "x"), 3, 1)
			want(b, "told", e.dst, v2)
			for i := range 5 {
				b.advance(time.Second)
				b.outErr(udp(at(v2, 501+i), at(o1, 5000), "x"), 3, 1)
			}
			want(b, "existing flow", b.out(udp(at(v1, 700), at(o1, 5000), "x")).sport, 700)
			b.in(udp(at(o1, 5000), at(ro, 700), "x"))
			b.openUDP(at(v2, 4000), at(o1, 5000)) // the other class
			b.openTCP(at(v2, 500), at(o1, 80))
			b.note("low ports used up: 3/1 to the sender and counted; existing flows, high ports and TCP fine")
		}},
		{"L-PER-HOST", "limit per client", limitPorts},
	}
}

// userChanges: races and a changed address.
func userChanges() []row {
	return []row{
		{"L-RACE", "first packets at once", func(b *bench) {
			var ps [][]byte
			for i := range 200 {
				p := udp(at(v1, 10000+i), at(o1, 5000), "x")
				ps = append(ps, p, append([]byte(nil), p...))
			}
			_, o := b.push(vpc, ps...)
			ports := map[uint16]int{}
			for _, p := range o {
				ports[p.sport]++
			}
			want(b, "packets", len(o), 400)
			want(b, "ports", len(ports), 200)
			b.note("400 packets, 200 ports")
			if _, ok := b.r.(*engineRouter); ok {
				b.concurrent(o, ps)
				b.note("four readers of the overlay beside the one of the VPC: nothing lost")
			}
		}},
		{"L-ADDR", "outside address changes", func(b *bench) {
			e := b.engineOnly()
			f, g := b.udpFlow(at(v1, 4000), at(o1, 5000)), b.tcpFlow(at(v1, 4000), at(o1, 80))
			n := b.setup.network
			fresh := addr("10.77.100.3")
			n.Addresses = []netip.Prefix{netip.PrefixFrom(fresh, 24), prefix("fd77:100::1/64")}
			if err := e.engine.SetNetworks([]netstack.Network{n}); err != nil {
				b.failf("new address: %v", err)
			}
			v, o := b.push(overlay, f.reply(), g.inSeg(psa, "x"))
			want(b, "packets for the old address at the VPC", len(v), 0)
			want(b, "answers", len(o), 0)
			want(b, "source now", b.out(f.outgoing()).src, fresh)
			for _, p := range [][]byte{g.outSeg(psa, "x"), udp(at(v2, 1), at(o2, 2), "x")} {
				if _, o := b.push(vpc, p); len(o) > 0 {
					want(b, "source now", o[0].src, fresh)
				}
			}
			if err := e.engine.SetNetworks(nil); err != nil {
				b.failf("no network: %v", err)
			}
			_, o = b.push(vpc, f.outgoing())
			want(b, "without a network: packets on the overlay", len(o), 0)
			b.note("old mappings end, new flows use %s", fresh)
		}},
	}
}

// userRestarts: restarts that lose all state.
func userRestarts() []row {
	return []row{
		{"L-LOSS-OUT", "restart, inside first", func(b *bench) {
			f := b.established()
			f.talk()
			ext := f.ext
			b.restart()
			p := b.out(f.outSeg(psa, "after the restart"))
			want(b, "outside end", p.from(), ext)
			f.pass(overlay, f.inSeg(psa, "answer"))
			b.note("survives on port %d", ext.Port())
		}},
		{"L-LOSS-IN", "restart, outside first", func(b *bench) {
			f := b.established()
			f.talk()
			b.restart()
			b.none(overlay, tcp(f.out, f.ext, segment{flags: psa8, seq: f.irs, ack: f.iss, data: "first"}))
			f.talk()
			fw := func(s *setup) { s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}} }
			f = b.forwarded()
			f.talk()
			b.restart(fw)
			f.pass(overlay, f.inSeg(psa, "outside first"))
			f.talk()
			b.note("silent, then survives; TB: survives at once")
		}},
		{"L-LOSS-COLLIDED", "restart, replaced port", func(b *bench) {
			seed := func(s *setup) { s.seeded = true }
			b.start(seed)
			f, g := b.tcpFlow(at(v1, 4000), at(o1, 80)), b.tcpFlow(at(v2, 4000), at(o1, 80))
			b.restart(seed)
			p := b.out(g.outSeg(psa, "V2 first"))
			if p.from() == f.ext {
				b.failf("V2 took V1's port %d", f.ext.Port())
			}
			want(b, "V2's outside end", p.from(), g.ext)
			want(b, "V1's outside end", b.out(f.outSeg(psa, "V1 second")).from(), f.ext)
			b.note("both keep their ports, %d and %d", f.ext.Port(), g.ext.Port())
		}},
		{"L-LOSS-FWD", "restart, forward", func(b *bench) {
			fw := func(s *setup) { s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}} }
			b.start(fw)
			b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: syn, seq: 1}))
			b.out(tcp(at(v1, 90), at(o1, 7000), segment{flags: syn | ack, seq: 5, ack: 2}))
			b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: ack, seq: 2, ack: 6}))
			b.restart(fw)
			p := b.out(tcp(at(v1, 90), at(o1, 7000), segment{flags: psa8, seq: 6, ack: 2, data: "inside first"}))
			want(b, "source", p.from(), at(ro, 9050))
			b.note("leaves as %s", p.from())
			b.forwardMasked()
		}},
	}
}

// userForwards: forwards.
func userForwards() []row {
	return []row{
		{"L-FWD", "forwards", func(b *bench) {
			b.start(func(s *setup) {
				s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}, {protoUDP, at(ro, 9051), at(v1, 91)}}
			})
			for _, o := range []netip.Addr{o1, o2} {
				p := b.in(tcp(at(o, 3333), at(ro, 9050), segment{flags: syn, seq: 1}))
				want(b, "target", p.to(), at(v1, 90))
				want(b, "peer as the target sees it", p.from(), at(o, 3333))
				r := b.out(tcp(at(v1, 90), at(o, 3333), segment{flags: syn | ack, seq: 5, ack: 2}))
				want(b, "answer", r.from(), at(ro, 9050))
				p = b.in(udp(at(o, 3333), at(ro, 9051), "x"))
				want(b, "UDP target", p.to(), at(v1, 91))
				want(b, "UDP answer", b.out(udp(at(v1, 91), at(o, 3333), "y")).from(), at(ro, 9051))
			}
			b.note("TCP and UDP, two peers with source port 3333")
		}},
		{"L-FWD-SRC", "source that targets see", func(b *bench) {
			b.start(func(s *setup) { s.forwards = []forward{{protoTCP, at(rv, 443), at(o1, 443)}} })
			b.engineOnly()
			p := b.out(tcp(at(v1, 3333), at(rv, 443), segment{flags: syn, seq: 1}))
			want(b, "target", p.to(), at(o1, 443))
			want(b, "source with masquerade", p.src, ro)
			r := b.in(tcp(at(o1, 443), p.from(), segment{flags: syn | ack, seq: 5, ack: 2}))
			want(b, "answer", r.from(), at(rv, 443))
			want(b, "answer to", r.to(), at(v1, 3333))
			b.noLeak = true
			b.start(func(s *setup) {
				s.forwards = []forward{{protoTCP, at(rv, 443), at(o1, 443)}}
				s.network.Masquerade = false
			})
			p = b.out(tcp(at(v1, 3333), at(rv, 443), segment{flags: syn, seq: 1}))
			want(b, "source without", p.from(), at(v1, 3333))
			b.note("%s with masquerade, %s without", ro, v1)
		}},
		{"L-FWD-SHADOW", "forwarded port is reserved", func(b *bench) {
			b.start(func(s *setup) { s.forwards = []forward{{protoUDP, at(ro, 9051), at(v1, 91)}} })
			p := b.out(udp(at(v2, 9051), at(o1, 5555), "x"))
			if p.sport == 9051 {
				b.failf("V2 got the forwarded port")
			}
			want(b, "the forward's packet", b.in(udp(at(o1, 5555), at(ro, 9051), "y")).to(), at(v1, 91))
			b.note("V2 got %d, the forward still reaches V1", p.sport)
		}},
		{"L-FWD-DEAD", "dead target", func(b *bench) {
			b.start(func(s *setup) { s.forwards = []forward{{protoTCP, at(rv, 443), at(ox, 443)}} })
			b.engineOnly()
			b.push(vpc, tcp(at(v1, 3333), at(rv, 443), segment{flags: syn, seq: 1}))
			got := b.await(vpc, 8)
			if len(got) != 1 || got[0].typ != 3 || got[0].code != 1 || got[0].quoted().to() != at(rv, 443) {
				b.failf("want 3/1 quoting %s:443, got %s", rv, list(got))
			}
			b.note("3/1 quoting the forward's address")
		}},
	}
}

// userLeaks: nothing leaks, nothing enters.
func userLeaks() []row {
	return []row{
		{"L-LEAK", "no inside source leaves", func(b *bench) {
			b.allow = true // forwarded with a wrong checksum is no leak
			kinds := leakKinds(b)
			for _, p := range kinds {
				before := b.accounted()
				if v, o := b.push(vpc, p); len(v)+len(o) == 0 {
					b.counted(before, 1, vpc, [][]byte{b.frame(p)})
				}
			}
			b.note("%d kinds, none left; the watcher runs in every row", len(kinds))
		}},
		{"L-DIRECT", "inside addresses from outside", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.none(overlay, udp(at(o1, 6000), at(v1, 4000), "unsolicited"))
			b.none(overlay, udp(f.out, f.in, "the flow's inside tuple"))
			b.none(overlay, udp(at(v2, 4000), at(v1, 4000), "spoofed"))
			f.answer()
			b.note("all refused, counted")
		}},
	}
}

// userProtocols: protocols without ports (decision D5).
func userProtocols() []row {
	return []row{
		{"L-SCTP", "SCTP", func(b *bench) {
			init := []byte{0x0f, 0xa0, 0x0b, 0x59, 0, 0, 0, 0, 1, 2, 3, 4, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1}
			b.none(vpc, ipPacket(v1, o1, 132, init))
			b.unwanted(ipPacket(o1, ro, 132, init))
			b.note("dropped and counted (D5)")
		}},
		{"L-DCCP", "DCCP", func(b *bench) { otherProtocol(b, 33) }},
		{"L-UDPLITE", "UDP-Lite", func(b *bench) { otherProtocol(b, 136) }},
		{"L-GRE", "GRE", func(b *bench) { otherProtocol(b, 47) }},
		{"L-PPTP", "PPTP", func(b *bench) {
			gre := append([]byte{0x20, 0x01, 0x88, 0x0b, 0, 4, 0, 7}, []byte("data")...)
			b.none(vpc, ipPacket(v1, o1, 47, gre))
			b.note("dropped and counted")
		}},
		{"L-ESP", "ESP and AH", func(b *bench) { otherProtocol(b, 50, 51) }},
		{"L-IPIP", "IP in IP", func(b *bench) { otherProtocol(b, 4, 41) }},
		{"L-PROTO", "other protocols", func(b *bench) { otherProtocol(b, 0, 2, 89, 112, 115, 253, 255) }},
	}
}

// userPrograms: what well-known programs do.
func userPrograms() []row {
	return []row{
		{"L-IKE", "IKE", func(b *bench) {
			var got []uint16
			for _, v := range []netip.Addr{v1, v2} {
				for _, p := range []int{500, 4500} {
					f := b.udpFlow(at(v, p), at(o1, p))
					want(b, "answer", f.answer().to(), f.in)
					got = append(got, f.ext.Port())
				}
			}
			want(b, "V1", fmt.Sprint(got[:2]), "[500 4500]")
			b.note("%v", got)
		}},
		{"L-LOWPORT", "ports below 1024", func(b *bench) {
			f, g := b.udpFlow(at(v1, 123), at(o1, 123)), b.udpFlow(at(v2, 123), at(o1, 123))
			want(b, "V1", f.ext.Port(), 123)
			want(b, "class of V2", class(g.ext.Port()), "0-1023")
			f.answer()
			g.answer()
			b.note("123 and %d", g.ext.Port())
		}},
		{"L-MCAST", "mDNS and broadcast", same("1812-4.2.3.2", "1812-5.3.5", "V6-MCAST")},
		{"L-FTP", "FTP", same("5382-REQ-6")},
		{"L-TFTP", "TFTP", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 69))
			b.unwanted(udp(at(o1, 32001), f.ext, "\x00\x03\x00\x01data"))
			b.note("data from another port is refused by the default filter, as documented")
		}},
		{"L-SIP", "SIP", realHosts},
		{"L-HTTP", "HTTP", realHosts},
		{"L-DNS", "DNS load", func(b *bench) { dnsLoad(b) }},
		{"L-QUIC", "QUIC", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 443))
			for range 2000 {
				want(b, "datagram", len(b.in(udp(f.out, f.ext, pad(1252), df)).payload), 1252)
			}
			f.send()
			b.note("2000 datagrams of 1252 bytes with DF on one flow")
		}},
		{"L-WG", "WireGuard", func(b *bench) {
			f := b.udpFlow(at(v1, 51820), at(o1, 51820)).answered()
			b.restart()
			b.unwanted(f.reply())
			want(b, "outside end", f.send().from(), f.ext)
			f.answer()
			b.note("the flow is back on its port after a restart, at the first packet from inside")
		}},
		{"L-SSH", "idle ssh", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				b.advance(10 * time.Minute)
				f.talk()
			})
			b.note("session idle for 10 min, then used")
		}},
	}
}

// userNeighbours: half-closed connections, neighbours and large datagrams.
func userNeighbours() []row {
	return []row{
		{"L-HALFCLOSE", "half-closed connection", func(b *bench) {
			f := b.established()
			f.pass(vpc, f.outSeg(int(fin|ack), ""))
			for range 200 {
				f.pass(overlay, f.inSeg(psa, pad(1400)))
				f.pass(vpc, f.outSeg(int(ack), ""))
			}
			b.advance(time.Hour)
			f.pass(overlay, f.inSeg(psa, "late"))
			f = b.forwarded()
			f.pass(overlay, f.inSeg(int(fin|ack), ""))
			b.advance(time.Hour)
			f.pass(vpc, f.outSeg(psa, pad(1400)))
			b.note("200 segments and one an hour later after the half close")
		}},
		{"L-ICMP-SEQ", "quoted sequence number", na("optional: the quoted sequence number isn't checked, the flow's state isn't touched (5382-REQ-10)")},
		{"L-NEIGH", "neighbours", neighbours},
		{"L-UDPBIG", "large datagrams", func(b *bench) {
			payload := b.random(8000)
			_, o := b.push(vpc, cut(udp(at(v1, 4000), at(o1, 5000), payload), 5, 1480)...)
			b.whole(o, at(ro, 4000), payload)
			v, _ := b.push(overlay, cut(udp(at(o1, 5000), at(ro, 4000), payload), 6, 1480)...)
			b.whole(v, at(o1, 5000), payload)
			b.note("8000 bytes both ways")
		}},
	}
}

const psa8 = psh | ack

// impossibleFlags are flag sets that open nothing: none, F, SF, SR, FPU, SFRPAU, SAF.
var impossibleFlags = []int{0, 0x01, 0x03, 0x06, 0x29, 0x3f, 0x13}

// leakKinds are packets that Linux without an invalid-drop rule sends out
// untranslated.
func leakKinds(b *bench) [][]byte {
	ra := icmp(v1, o1, 10, 0, 0, nil)
	out := [][]byte{
		udp(at(v1, 4000), at(o1, 5000), "x", badSum),
		tcp(at(v1, 4000), at(o1, 80), segment{flags: syn}, badSum),
		ping(v1, o1, 7, 1, "x", badSum),
		pong(v1, o1, 7, 1, "x"),
		icmpError(v1, 3, 3, 0, udp(at(o1, 5000), at(v1, 4000), "x"), 8),
		ra,
		ipPacket(v1, o1, 132, append([]byte{0x0f, 0xa0, 0x0b, 0x59, 1, 2, 3, 4, 0, 0, 0, 0}, 0, 3, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)),
		ipPacket(v1, o1, 253, []byte("unknown!")),
	}
	for i, fl := range []int{0, int(rst), int(fin)} {
		out = append(out, tcp(at(v1, 4100+i), at(o1, 80), segment{flags: flagsOf(fl), seq: 1}))
	}
	f := b.established()
	return append(out, tcp(f.in, f.out, segment{flags: ack, seq: f.iss + 3<<28, ack: f.irs, data: "x"}),
		tcp(f.in, f.out, segment{flags: rst, seq: f.iss + 3<<28}))
}

// otherProtocol sends protocols without ports: dropped with a counter, at most
// with an error to the sender.
func otherProtocol(b *bench, protos ...uint8) {
	body := []byte{0, 0, 8, 0, 0x45, 0, 0, 24, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 1, 10, 2, 2, 2, 0, 0, 0, 0}
	for _, p := range protos {
		for _, v := range []netip.Addr{v1, v2} {
			before := b.accounted()
			back, o := b.push(vpc, ipPacket(v, o1, p, body))
			want(b, fmt.Sprintf("protocol %d: packets on the overlay", p), len(o), 0)
			for _, e := range back {
				want(b, "error", [2]uint8{e.typ, e.code}, [2]uint8{3, 2})
			}
			b.counted(before, 1, vpc, [][]byte{b.frame(ipPacket(v, o1, p, body))})
		}
		b.unwanted(ipPacket(o1, ro, p, body))
	}
	b.note("protocols %v dropped and counted (D5)", protos)
}

func (b *bench) accounted() map[string]float64 {
	b.ready()
	return b.r.accounted()
}

func reversed(in [][]byte) (out [][]byte) {
	for i := len(in) - 1; i >= 0; i-- {
		out = append(out, in[i])
	}
	return out
}

// restart loses the router's state.
func (b *bench) restart(changes ...func(*setup)) {
	if f, ok := b.r.(interface{ flush() }); ok {
		f.flush()
		return
	}
	if r, ok := b.r.(*engineRouter); ok {
		kept := r.engine.Mappings()
		changes = append(changes, func(s *setup) { s.mappings = kept })
	}
	b.start(changes...)
	b.push(vpc) // nothing may come out at start
}

// probe sends a traceroute probe; hop 1 is the router, 2 is M, 3 is H.
func (b *bench) probe(hop int, p []byte) {
	b.t.Helper()
	router, m, h := rv, mm, hh
	if isV6(p) {
		router, m, h = rv6, mm6, hh6
	}
	exceeded := [2]uint8{11, 0}
	if isV6(p) {
		exceeded = [2]uint8{3, 0}
	}
	if hop == 1 {
		want(b, "hop 1", b.outErr(p, exceeded[0], exceeded[1]).src, router)
		return
	}
	seen, sent := b.out(p), parse(p)
	f := &flow{in: sent.from(), out: sent.to()}
	quoted := append([]byte(nil), seen.b...)
	if hop == 2 {
		want(b, "TTL at M", seen.ttl, 1)
		translated(b, b.in(icmpError(m, exceeded[0], exceeded[1], 0, quoted, 28)), f, m, exceeded[0], exceeded[1])
		return
	}
	var reply []byte
	switch seen.proto {
	case protoUDP:
		typ, code := uint8(3), uint8(3)
		if isV6(p) {
			typ, code = 1, 4
		}
		translated(b, b.in(icmpError(h, typ, code, 0, quoted, 28)), f, h, typ, code)
		return
	case protoTCP:
		reply = tcp(seen.to(), seen.from(), segment{flags: rst | ack, ack: 2})
	default:
		reply = pong(h, seen.src, seen.sport, seen.seq, "probe")
	}
	want(b, "answer at", b.in(reply).to(), sent.from())
}

// hairpinForward reaches a forward from the network of its target, and from the
// target itself.
func hairpinForward(b *bench, data bool) {
	b.start(func(s *setup) { s.forwards = []forward{{protoTCP, at(rv, 8088), at(v1, 80)}} })
	for _, c := range []netip.AddrPort{at(v2, 40001), at(v1, 40002)} {
		step := func(p []byte, wantTo netip.AddrPort) *packet {
			v, o := b.push(vpc, p)
			if len(o) != 0 || len(v) != 1 {
				b.failf("%s: at the VPC %s, on the overlay %s", parse(p), list(v), list(o))
			}
			want(b, "destination", v[0].to(), wantTo)
			return v[0]
		}
		got := step(tcp(c, at(rv, 8088), segment{flags: syn, seq: 1}), at(v1, 80))
		peer := got.from()
		if vpcPrefixes[0].Contains(peer.Addr()) && peer.Addr() != rv || vpcPrefixes[1].Contains(peer.Addr()) {
			b.failf("the target sees the inside address %s", peer)
		}
		r := step(tcp(at(v1, 80), peer, segment{flags: syn | ack, seq: 7, ack: 2}), c)
		want(b, "the answer comes from", r.from(), at(rv, 8088))
		step(tcp(c, at(rv, 8088), segment{flags: ack, seq: 2, ack: 8}), at(v1, 80))
		if data {
			step(tcp(c, at(rv, 8088), segment{flags: psa8, seq: 2, ack: 8, data: "GET /"}), at(v1, 80))
			step(tcp(at(v1, 80), peer, segment{flags: psa8, seq: 8, ack: 7, data: "200"}), c)
		}
		b.note("%s reaches its target as %s", c.Addr(), peer)
	}
}

// floodWith fills the table with never-answered flows of V1.
func floodWith(b *bench, proto uint8) {
	limit := b.scale(64_000)
	b.start(func(s *setup) { s.maxFlows = limit })
	b.engineOnly()
	u, c := b.udpFlow(at(v2, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v2, 4000), at(o1, 80))
	n := b.scale(320_000)
	b.flood(n, func(i int) []byte {
		from, to := at(v1, 1024+b.rng.IntN(64000)), at(o2, b.rng.IntN(65535)+1)
		if proto == protoTCP {
			return tcp(from, to, segment{flags: syn, seq: 1})
		}
		return udp(from, to, "x")
	})
	u.answer()
	u.send()
	c.talk()
	for i := range 20 {
		f := b.tcpSyn(at(v2, 5000+i), at(o1, 80))
		f.pass(overlay, tcp(f.out, f.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
	}
	live := len(b.r.(*engineRouter).engine.Flows(netstack.FlowFilter{}))
	if live > limit {
		b.failf("%d flows in a table of %d", live, limit)
	}
	b.note("%d packets, %d flows held, V2's flows and 20 of 20 new ones pass", n, live)
}

// tableAssured fills the table with answered flows.
func tableAssured(b *bench) {
	limit := 4000
	b.start(func(s *setup) { s.maxFlows = limit })
	b.engineOnly()
	u, c := b.udpFlow(at(v2, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v2, 4000), at(o1, 80))
	for i := 0; i < limit; i += 500 {
		var out, in [][]byte
		for j := i; j < i+500; j++ {
			out = append(out, udp(at(addr(fmt.Sprintf("10.77.1.%d", 60+j%150)), 2000+j), at(o2, 9), "x"))
		}
		_, got := b.push(vpc, out...)
		for _, p := range got {
			in = append(in, udp(at(o2, 9), p.from(), "y"))
		}
		b.push(overlay, in...)
	}
	b.advance(2 * time.Second)
	refused := 0
	for i := range 10 {
		b.advance(time.Second)
		v, o := b.push(vpc, udp(at(v2, 6000+i), at(o3, 9), "new"))
		if len(o) == 0 {
			refused++
			if len(v) != 1 || v[0].typ != 3 || v[0].code != 1 {
				b.failf("a refused new flow: want 3/1, got %s", list(v))
			}
		}
	}
	if refused == 0 {
		b.failf("new flows pass at a full table of answered ones")
	}
	u.answer()
	c.talk()
	b.note("%d of 10 new ones refused with 3/1, answered flows untouched", refused)
}

// dnsLoad sends many short UDP flows.
func dnsLoad(b *bench) {
	n := b.scale(40_000)
	lost := 0
	for i := 0; i < n; i += 1000 {
		var out, in [][]byte
		for j := i; j < i+1000; j++ {
			out = append(out, udp(at(v1, 10000+j%40000), at(o1, 53), "query"))
		}
		_, got := b.push(vpc, out...)
		for _, p := range got {
			in = append(in, udp(at(o1, 53), p.from(), "answer"))
		}
		v, _ := b.push(overlay, in...)
		lost += 1000 - len(v)
	}
	want(b, "queries lost", lost, 0)
	b.note("%d queries, 0 lost", n)
}

// concurrent answers packets that were seen outside from four goroutines while
// others come from the VPC.
func (b *bench) concurrent(seen []*packet, out [][]byte) {
	var replies, frames [][]byte
	for _, p := range seen {
		replies = append(replies, b.frame(udp(p.to(), p.from(), "y")))
	}
	for _, p := range out {
		frames = append(frames, b.frame(p))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { b.r.inject(overlay, replies) })
	}
	b.r.inject(vpc, frames)
	wg.Wait()
	v, o := b.push(vpc)
	want(b, "packets at the VPC", len(v), 4*len(seen))
	want(b, "packets on the overlay", len(o), len(out))
}

// forwardMasked is L-LOSS-FWD for a forward whose target sees the router's address.
func (b *bench) forwardMasked() {
	if _, ok := b.r.(*engineRouter); !ok {
		return
	}
	fw := func(s *setup) {
		s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}}
		s.engine = func(c *netstack.Config) { c.Forwards[0].Masquerade = true }
	}
	b.start(fw)
	peer := b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: syn, seq: 1})).from()
	b.out(tcp(at(v1, 90), peer, segment{flags: syn | ack, seq: 5, ack: 2}))
	b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: ack, seq: 2, ack: 6}))
	b.restart(fw)
	b.none(vpc, tcp(at(v2, 90), peer, segment{flags: psa8, seq: 6, ack: 2, data: "a stranger"}))
	p := b.out(tcp(at(v1, 90), peer, segment{flags: psa8, seq: 6, ack: 2, data: "inside first"}))
	want(b, "source, masqueraded", p.from(), at(ro, 9050))
	want(b, "destination, masqueraded", p.to(), at(o1, 7000))
	p = b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: psa8, seq: 2, ack: 6 + 12, data: "then the peer"}))
	want(b, "peer as the target sees it", p.from(), peer)
	b.note("also with masquerading, where the target knows the peer as %s", peer.Addr())
}

// neighbours checks ARP on the overlay.
func neighbours(b *bench) {
	e := b.engineOnly()
	b.out(ping(v1, addr("10.77.100.60"), 7, 1, "first")) // a fresh neighbour: waits, isn't lost
	frames := [][]byte{}
	for i := range 10_000 {
		a := addr(fmt.Sprintf("10.77.100.%d", 70+i%150))
		b.silent[a] = true
		frames = append(frames, b.frame(udp(at(v1, 10000+i%1000), at(a, 9), "x")))
	}
	before := b.r.accounted()
	ended := func() float64 {
		_, n := diff(before, b.r.accounted())
		return n
	}
	b.pushFrames(vpc, frames...)
	for range 300 { // the engine's questions are repeated in real time
		if b.advance(time.Second); ended() >= 10_000 {
			break
		}
		time.Sleep(100 * time.Millisecond)
		b.push(vpc)
	}
	b.counted(before, 10_000, vpc, frames)
	// ARP for others isn't answered, for R it is.
	b.sides[overlay].others = nil
	b.pushFrames(overlay, arp(1, playerMAC(o1), o1, mac{}, o2, broadcast))
	for _, f := range b.sides[overlay].others {
		if binary.BigEndian.Uint16(f[12:]) == 0x0806 && binary.BigEndian.Uint16(f[20:]) == 2 {
			b.failf("R answered ARP for %s", o2)
		}
	}
	b.sides[overlay].others = nil
	b.pushFrames(overlay, arp(1, playerMAC(o1), o1, mac{}, ro, broadcast))
	want(b, "ARP answers for R's own address", len(b.sides[overlay].others), 1)
	b.sides[overlay].others = nil
	n := b.setup.network
	n.Addresses = []netip.Prefix{prefix("10.77.100.3/24"), prefix("fd77:100::1/64")}
	if err := e.engine.SetNetworks([]netstack.Network{n}); err != nil {
		b.failf("new address: %v", err)
	}
	b.push(vpc)
	announced := false
	for _, f := range b.sides[overlay].others {
		announced = announced || len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == 0x0806 && string(f[28:32]) == string(addr("10.77.100.3").AsSlice()) && string(f[38:42]) == string(f[28:32])
	}
	if !announced {
		b.failf("the new address isn't announced (gratuitous ARP)")
	}
	b.note("first packet waits; 10 000 packets to silent neighbours bounded and counted; own addresses only; change announced")
}

// sumECN: RFC 3168 and 6040: ECN and DSCP.
func sumECN() []row {
	return []row{
		{"3168-a", "ECN forwarded", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for n := range 4 {
				want(b, "ECN out", b.out(udp(f.in, f.out, "x", tos(uint8(n)))).tos, uint8(n))
				want(b, "ECN in", b.in(udp(f.out, f.ext, "x", tos(uint8(n)))).tos, uint8(n))
			}
			b.note("unchanged")
		}},
		{"3168-5.3", "ECN of fragments", func(b *bench) {
			const notECT, ect1, ect0, ce = 0, 1, 2, 3
			var got []string
			for i, c := range [][2]uint8{{ect0, ce}, {ect0, ect1}, {notECT, ce}, {ect0, notECT}} {
				parts := split(udp(at(v1, 4000+i), at(o1, 5000), pad(1000)), uint32(0x50+i), 800)
				parts[0], parts[1] = with(parts[0], tos(c[0])), with(parts[1], tos(c[1]))
				_, o := b.push(vpc, parts...)
				var out []uint8
				for _, p := range o {
					out = append(out, p.tos&3)
				}
				got = append(got, fmt.Sprint(out))
				switch own := len(out) == 2 && out[0] == c[0] && out[1] == c[1]; {
				case own || len(out) == 0 && i >= 2: // fragments with their own bits, or dropped
				case i == 0 && len(out) > 0 && out[0] == ce && out[len(out)-1] == ce:
				case i == 1 && len(out) > 0 && out[0] != ce && out[0] != notECT:
				default:
					b.failf("%v came out as %v", c, out)
				}
			}
			b.note("%s", strings.Join(got, " "))
		}},
		{"3168-TCP", "ECN negotiation", func(b *bench) {
			p := tcp(at(v1, 4000), at(o1, 80), segment{flags: syn | 0xc0, seq: 1})
			sameSegment(b, p, b.out(p))
			r := tcp(at(o1, 80), at(ro, 4000), segment{flags: syn | ack | 0x40, seq: 9, ack: 2})
			sameSegment(b, r, b.in(r))
			b.note("passes both ways")
		}},
		{"6040-a", "ECN of the tunnel", realHosts},
		{"6040-b", "DSCP of the tunnel", realHosts},
	}
}

// sumChecksums: checksums.
func sumChecksums() []row {
	return []row{
		{"CK-UDP0", "UDP checksum zero", func(b *bench) {
			zero := func(p []byte) []byte { p[26], p[27] = 0, 0; return p }
			p := b.out(udp(at(v1, 4000), at(o1, 5000), "x", zero))
			want(b, "out", binary.BigEndian.Uint16(p.b[26:]), 0)
			q := b.in(udp(at(o1, 5000), p.from(), "x", zero))
			want(b, "in", binary.BigEndian.Uint16(q.b[26:]), 0)
			b.note("0 and 0")
		}},
		{"CK-FFFF", "sum of zero", func(b *bench) {
			// The payload makes the sum of what leaves zero: it must be sent as 0xffff.
			out := udp(at(ro, 4000), at(o1, 5000), "\x00\x00")
			fill := binary.BigEndian.Uint16(out[26:])
			p := udp(at(v1, 4000), at(o1, 5000), string([]byte{byte(fill >> 8), byte(fill)}))
			want(b, "translated sum", binary.BigEndian.Uint16(b.out(p).b[26:]), 0xffff)
			in := udp(at(v1, 4000), at(o1, 5000), "\x00\x00")
			fill = binary.BigEndian.Uint16(in[26:])
			p = udp(at(v1, 4000), at(o1, 5000), string([]byte{byte(fill >> 8), byte(fill)}))
			want(b, "original sum", binary.BigEndian.Uint16(p[26:]), 0xffff)
			b.out(p) // its checksum is checked on the way
			b.note("0xffff; 0xffff in comes out right")
		}},
		{"CK-BAD", "wrong sums never repaired", func(b *bench) {
			b.allow = true
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			wrong := map[string][2][]byte{
				"UDP":   {udp(f.in, f.out, "x", badSum), udp(f.out, f.ext, "x", badSum)},
				"TCP":   {tcp(at(v1, 4000), at(o1, 80), segment{flags: syn, seq: 1}, badSum), nil},
				"echo":  {ping(v1, o1, 7, 1, "x", badSum), nil},
				"error": {nil, icmpError(o1, 3, 3, 0, f.seen(), 8, badSum)},
			}
			for name, c := range wrong {
				for s, p := range c {
					if p == nil {
						continue
					}
					before := b.accounted()
					v, o := b.push(side(s), p)
					for _, x := range append(v, o...) {
						if x.sumsRight() == nil {
							b.failf("%s from the %s with a wrong checksum came out repaired: %s", name, side(s), x)
						}
					}
					if len(v)+len(o) == 0 {
						b.counted(before, 1, side(s), [][]byte{b.frame(p)})
					}
				}
			}
			b.note("dropped and counted, or still wrong")
		}},
		{"CK-OFFLOAD", "offloads", realHosts},
		{"CK-SWEEP", "every size", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			sizes := append(seq(0, 63), 511, 512, 513, 1023, 1279, 1280, 1399, 1400, 1471, 1472)
			for _, n := range sizes {
				data := b.random(n)
				want(b, "out", string(b.out(udp(f.in, f.out, data)).payload), data)
				want(b, "in", string(b.in(udp(f.out, f.ext, data)).payload), data)
			}
			b.note("%d sizes, 0 wrong", len(sizes))
		}},
		{"CK-LEN", "UDP lengths", func(b *bench) {
			length := func(n uint16) edit {
				return func(p []byte) []byte { binary.BigEndian.PutUint16(p[24:], n); return p }
			}
			b.allow = true
			b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "some payload", length(200)))
			b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "some payload", length(4)))
			short := udp(at(v1, 4000), at(o1, 5000), "some payload", length(9))
			binary.BigEndian.PutUint16(short[26:], 0)
			b.out(short)
			b.allow = false
			b.push(vpc, udp(at(v1, 0), at(o1, 5000), "x"))
			b.push(vpc, udp(at(v1, 4000), at(o1, 0), "x"))
			want(b, "empty payload", len(b.out(udp(at(v1, 4001), at(o1, 5000), "")).payload), 0)
			b.note("200 and 4 dropped, 9 passed, ports 0 don't crash, empty payload passes")
		}},
	}
}
