package conformance

import (
	"net/netip"
	"strings"
	"time"

	"ztgate/netstack"
)

// updateTCP: RFC 7857 section 2: TCP states.
func updateTCP() []row {
	return []row{
		{"7857-S2", "TCP states", same("5382-REQ-2", "5382-REQ-2a")},
		{"7857-S2.1a", "opening and closing timers", func(b *bench) {
			b.start(func(s *setup) { s.opening, s.closing = 300*time.Second, 100*time.Second })
			b.engineOnly()
			f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			g := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			g.closeBoth()
			b.advance(110 * time.Second)
			g.refusedNow(g.inSeg(int(fin|ack), ""))
			b.advance(180 * time.Second)
			b.in(tcp(f.out, f.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
			b.note("opening 300 s, closing 100 s, each as set")
		}},
		{"7857-S2.1b", "four minutes by default", same("5382-REQ-5t")},
		{"7857-S2.2", "RST keeps the flow a while", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: rst, seq: f.irs}))
			at := 0
			for _, wait := range []int{6, 13, 200} {
				b.advance(time.Duration(wait-at) * time.Second)
				at = wait
				f.pass(overlay, f.inSeg(psa, "after the RST"))
			}
			b.note("RST passes; data after 6, 13 and 200 s delivered")
		}},
	}
}

// updateMapping: RFC 7857 sections 3 to 6: mapping and filtering per protocol.
func updateMapping() []row {
	return []row{
		{"7857-S3", "ports shared by destination", func(b *bench) { sharing(b) }},
		{"7857-S4", "address pairing over protocols", same("4787-REQ-2")},
		{"7857-S5", "mappings per protocol", func(b *bench) {
			want(b, "UDP port of V1", b.openUDP(at(v1, 4000), at(o1, 80)).Port(), 4000)
			want(b, "TCP port of V2", b.openTCP(at(v2, 4000), at(o1, 80)).Port(), 4000)
			b.note("both keep 4000")
		}},
		{"7857-S6", "filtering per protocol", func(b *bench) {
			f := b.udpFlow(at(v1, 4000), at(o1, 5000))
			b.none(overlay, tcp(f.out, f.ext, segment{flags: syn, seq: 1}))
			f.answer()
			b.note("SYN refused")
		}},
	}
}

// updateRefresh: RFC 7857 sections 7 and 8: what doesn't refresh.
func updateRefresh() []row {
	return []row{
		{"7857-S7", "refused packets don't refresh", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{UDP: 100 * time.Second} })
			b.engineOnly()
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000)).answered()
			b.advance(60 * time.Second)
			b.unwanted(udp(at(o2, 5000), f.ext, "refused"))
			b.advance(45 * time.Second)
			f.refusedNow(f.reply())
			b.note("gone 105 s after the last admitted packet")
		}},
		{"7857-S8", "errors and RSTs don't refresh", func(b *bench) {
			b.start(func(s *setup) {
				s.timeouts = netstack.Timeouts{UDP: 100 * time.Second, TCPEstablished: 100 * time.Second, TCPReset: 30 * time.Second}
			})
			b.engineOnly()
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			got := f.answer()
			g := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			b.advance(60 * time.Second)
			b.out(icmpError(v1, 3, 3, 0, got.b, 8))
			g.pass(vpc, tcp(g.in, g.out, segment{flags: rst, seq: g.iss}))
			b.advance(45 * time.Second)
			f.refusedNow(f.reply())
			g.refusedNow(g.inSeg(psa, "x"))
			b.note("UDP flow gone 105 s after its last datagram in spite of the error, TCP flow in spite of the RST")
		}},
	}
}

// updateIdentifiers: RFC 7857 sections 9 to 13: ports, identifications and queries.
func updateIdentifiers() []row {
	return []row{
		{"7857-S9", "parity off", na("parity isn't preserved, as allowed")},
		{"7857-S10", "replaced ports hard to guess", func(b *bench) {
			var got []uint16
			for i := range 100 {
				p := 20000 + i
				b.openUDP(at(v1, p), at(o1, 5000))
				got = append(got, b.openUDP(at(v2, p), at(o1, 5000)).Port())
			}
			spread(b, got, 1024, 65535)
		}},
		{"7857-S11", "unique identifications", func(b *bench) {
			var parts [2][][]byte
			for i, v := range []netip.Addr{v1, v2} {
				parts[i] = split(udp(at(v, 4000+i), at(o1, 5000), strings.Repeat(string(rune('a'+i)), 2048)), 0x7777, 800, 800)
			}
			var send [][]byte
			for i := range 3 {
				send = append(send, parts[0][i], parts[1][i])
			}
			_, o := b.push(vpc, send...)
			byID := map[uint16][]*packet{}
			for _, p := range o {
				byID[p.id] = append(byID[p.id], p)
			}
			if len(byID) != 2 {
				b.failf("%d fragments with %d different IDs: %s", len(o), len(byID), list(o))
			}
			for id, ps := range byID {
				w := reassemble(ps)
				if w == nil || w.sumsRight() != nil {
					b.failf("ID %#x makes no datagram", id)
				}
			}
			b.note("two datagrams with different IDs")
		}},
		{"7857-S12", "query mapping goes with its session", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{ICMP: 10 * time.Second} })
			b.engineOnly()
			f := b.echoFlow(v1, o1, 7)
			b.advance(11 * time.Second)
			f.refusedNow(f.pong())
			b.note("goes with its last session")
		}},
		{"7857-S13", "query hairpin", func(b *bench) {
			f := b.echoFlow(v1, o1, 7)
			v, o := b.push(vpc, ping(v2, f.ext.Addr(), f.ext.Port(), 1, "hairpin"))
			if len(o) != 0 || len(v) != 1 || v[0].dst != v2 || v[0].typ != 0 {
				b.failf("at the VPC %s, on the overlay %s", list(v), list(o))
			}
			b.note("the router itself answers")
		}},
	}
}

// sharing is mode by_destination: with all ports in use, new flows share them
// towards other destinations.
func sharing(b *bench) {
	b.start(func(s *setup) { s.sharing = true })
	b.engineOnly()
	b.fillLowPorts(at(o1, 5000))
	p := b.out(udp(at(v2, 500), at(o2, 5000), "x"))
	want(b, "class", class(p.sport), "0-1023")
	want(b, "back", b.in(udp(at(o2, 5000), p.from(), "y")).to(), at(v2, 500))
	want(b, "existing mapping", b.out(udp(at(lowPortHost(500), 500), at(o1, 5000), "x")).sport, 500)
	b.note("V2 shares port %d towards another destination", p.sport)
}
