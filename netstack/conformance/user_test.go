package conformance

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

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

func reversed(in [][]byte) (out [][]byte) {
	for i := len(in) - 1; i >= 0; i-- {
		out = append(out, in[i])
	}
	return out
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
