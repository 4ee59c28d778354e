package conformance

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"time"

	"ztgate/netstack"
	"ztgate/netstack/policy"
)

// ula9 has no route.
var ula9 = addr("fd77:9::1")

// none6 wants silence about one datagram.
func (b *bench) none6(from side, src, dst string) {
	b.t.Helper()
	b.none(from, udp(at(addr(src), 4000), at(addr(dst), 5000), "x"))
}

// ipv6Headers: RFC 8200: hop limit, MTU and extension headers.
func ipv6Headers() []row {
	return []row{
		{"8200-3", "hop limit", func(b *bench) {
			for _, n := range []uint8{0, 1} {
				want(b, "source", b.outErr(udp(at(v16, 4000), at(o16, 5000), "x", ttl(n)), 3, 0).src, rv6)
			}
			for _, n := range []uint8{2, 64} {
				want(b, "hop limit", b.out(udp(at(v16, 4000), at(o16, 5000), "x", ttl(n))).ttl, n-1)
			}
			want(b, "hop limit in", b.in(udp(at(o16, 5000), at(v16, 4000), "x", ttl(5))).ttl, 4)
			b.note("64 to 63, 2 to 1; 0 and 1 get 3/0 from %s", rv6)
		}},
		{"8200-4.5a", "packet too big", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			e := b.outErr(udp(at(v16, 4000), at(o16, 5000), pad(1440)), 2, 0)
			want(b, "MTU", e.mtu, 1400)
			b.note("2/0, MTU 1400, %d bytes", len(e.b))
		}},
		{"8200-5", "minimum MTU", func(b *bench) {
			e := b.engineOnly()
			n := b.setup.network
			n.MTU = 1200
			err := e.engine.SetNetworks([]netstack.Network{n})
			if err == nil {
				p := udp(at(v16, 4000), at(o16, 5000), pad(1232))
				v, o := b.push(vpc, p)
				for _, x := range v {
					if x.typ == 2 && x.mtu < 1280 {
						b.failf("MTU 1200 accepted, and a 1280-byte packet gets packet too big with MTU %d", x.mtu)
					}
				}
				want(b, "1280-byte packet", len(o), 1)
				b.note("1280 bytes pass")
				return
			}
			b.note("refused: %v", err)
		}},
		{"8200-4", "unknown headers in transit", func(b *bench) {
			p := b.out(udp(at(v16, 4000), at(o16, 5000), "x", extension(60, 0, 0xbe, 4, 1, 2, 3, 4)))
			want(b, "next header", p.b[6], 60)
			q := b.out(ipPacket(v16, o16, 253, []byte("anything")))
			want(b, "next header", q.b[6], 253)
			b.note("destination options with an unknown one, and next header 253: forwarded")
		}},
		{"8200-4.3", "hop-by-hop options", func(b *bench) {
			n := 0
			for _, o := range []byte{0x3e, 0x7e, 0xbe, 0xfe} {
				_, out := b.push(vpc, udp(at(v16, 4000), at(o16, 5000), "x", extension(0, 0, o, 4, 1, 2, 3, 4)))
				n += len(out)
			}
			_, alert := b.push(vpc, udp(at(v16, 4000), at(o16, 5000), "x", extension(0, 0, 5, 2, 0, 0, 1, 0)))
			_, jumbo := b.push(vpc, udp(at(v16, 4000), at(o16, 5000), "x", extension(0, 0, 0xc2, 4, 0, 1, 0, 0)))
			b.push(vpc, udp(at(v16, 4000), at(o16, 5000), "x", extension(0, 0, 1, 4, 0, 0, 0, 0), extension(60, 0, 1, 4, 0, 0, 0, 0)))
			b.out(udp(at(v16, 4000), at(o16, 5000), "x"))
			b.note("%d of 4 option kinds, router alert %d, jumbo %d forwarded; no crash", n, len(alert), len(jumbo))
		}},
		{"8200-4.4", "routing header 0", func(b *bench) {
			rh := append([]byte{2, 0, 1, 0, 0, 0, 0}, o26.AsSlice()...)
			_, o := b.push(vpc, udp(at(v16, 4000), at(rv6, 5000), "x", extension(43, rh...)))
			want(b, "RH0 to the router: packets on the overlay", len(o), 0)
			_, o = b.push(vpc, udp(at(v16, 4000), at(o16, 5000), "x", extension(43, rh...)))
			for _, p := range o {
				want(b, "destination in transit", p.dst, o16)
				want(b, "segments left", p.b[43], 1)
			}
			b.note("never processed; in transit %d forwarded", len(o))
		}},
	}
}

// ipv6Fragments: RFC 8200, 5722, 6946 and 7112: fragments.
func ipv6Fragments() []row {
	return []row{
		{"8200-4.5b", "fragments in any order", func(b *bench) {
			payload := strings.Repeat("0123456789abcdef", 128)
			parts := split(udp(at(v16, 4000), at(o16, 5000), payload), 0x60606, 800, 800)
			b.fragments(vpc, parts, []int{2, 1, 0}, at(v16, 4000), payload)
			b.note("three fragments reversed, reassembled right")
		}},
		{"5722", "overlapping fragments", func(b *bench) {
			p := udp(at(v16, 4000), at(o16, 5000), pad(72))
			b.overlap(p, 40)
			b.note("nothing out")
		}},
		{"6946", "atomic fragments", func(b *bench) {
			p := udp(at(v16, 4000), at(o16, 5000), "atomic")
			got := b.out(fragment(p, 5, 0, false, p[40:]))
			want(b, "payload", strings.HasSuffix(string(got.b), "atomic"), true)
			b.note("forwarded")
		}},
		{"7112", "first fragment without its header", func(b *bench) {
			p := udp(at(v16, 4000), at(o16, 5000), pad(64), extension(60, 0, 1, 4, 0, 0, 0, 0))
			b.none(vpc, fragment(p, 5, 0, true, p[40:48]))
			b.note("dropped, counted")
		}},
		{"8200-4.5c", "lengths of fragments", func(b *bench) {
			p := udp(at(v16, 4000), at(o16, 5000), pad(1000))
			b.none(vpc, fragment(p, 5, 0, true, p[40:841]))
			b.none(vpc, fragment(p, 6, 65520, false, p[40:140]))
			b.note("dropped, counted")
		}},
		{"8200-4.5d", "fragments time out", func(b *bench) {
			parts := split(udp(at(v16, 4000), at(o16, 5000), pad(1000)), 7, 800)
			b.push(vpc, parts[0])
			b.advance(65 * time.Second)
			_, o := b.push(vpc, parts[1])
			want(b, "late second fragment: packets out", len(o), 0)
			b.note("the second fragment 65 s later goes nowhere")
		}},
	}
}

// ipv6Fields: RFC 8200: fields that stay.
func ipv6Fields() []row {
	return []row{
		{"8200-4.7", "no next header", func(b *bench) {
			got := b.out(ipPacket(v16, o16, 59, nil))
			want(b, "next header", got.b[6], 59)
			b.note("forwarded")
		}},
		{"8200-6/7", "flow label and traffic class", func(b *bench) {
			for n := 0; n < 256; n += 5 {
				p := udp(at(v16, 4000), at(o16, 5000), "x", tos(uint8(n)))
				binary.BigEndian.PutUint32(p, binary.BigEndian.Uint32(p)&0xfff00000|0xabcde)
				got := b.out(p)
				want(b, "first word", binary.BigEndian.Uint32(got.b), binary.BigEndian.Uint32(p))
			}
			b.note("52 traffic classes, label 0xabcde")
		}},
		{"8200-8.1", "UDP checksum zero", func(b *bench) {
			p := udp(at(v16, 4000), at(o16, 5000), "x")
			p[46], p[47] = 0, 0
			got := b.out(p)
			want(b, "checksum", binary.BigEndian.Uint16(got.b[46:]), 0)
			b.note("forwarded")
		}},
	}
}

// ipv6Errors: RFC 4443: errors and echo.
func ipv6Errors() []row {
	return []row{
		{"4443-2.2", "source of errors", func(b *bench) {
			want(b, "source", b.outErr(udp(at(v16, 4000), at(o16, 5000), "x", ttl(1)), 3, 0).src, rv6)
			b.out(udp(at(v16, 4000), at(o16, 5000), "x"))
			want(b, "source outside", b.inErr(udp(at(o16, 5000), at(v16, 4000), "x", ttl(1)), 3, 0).src, ro6)
			b.note("%s and %s", rv6, ro6)
		}},
		{"4443-2.4c", "length of errors", func(b *bench) {
			want(b, "length", len(b.outErr(udp(at(v16, 4000), at(o16, 5000), pad(1400), ttl(1)), 3, 0).b), 1280)
			b.note("1280")
		}},
		{"4443-2.4e", "when not to send errors", func(b *bench) {
			b.none(vpc, icmpError(v16, 1, 4, 0, udp(at(o16, 5000), at(v16, 4000), "x"), 8, ttl(1)))
			b.none6(vpc, "fd77:1::50", "ff05::1")
			b.none(vpc, udp(at(netip.IPv6Unspecified(), 4000), at(o16, 5000), "x", ttl(1)))
			b.none(vpc, udp(at(addr("ff02::5"), 4000), at(o16, 5000), "x", ttl(1)))
			b.note("none")
		}},
		{"4443-2.4f", "rate limit of errors", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			packets := make([][]byte, 5000)
			for i := range packets {
				packets[i] = udp(at(v16, 10000+i), at(o16, 33434), "x", ttl(1))
			}
			v, _ := b.push(vpc, packets...)
			if len(v) == 0 || len(v) > 500 {
				b.failf("%d errors for 5000 packets", len(v))
			}
			big := 0
			for i := range 200 {
				b.advance(10 * time.Millisecond)
				v, _ := b.push(vpc, udp(at(v26, 4000+i), at(o16, 5000), pad(1440)))
				big += len(v)
			}
			if big < 20 {
				b.failf("%d packet too big for 200 oversize packets over 2 s", big)
			}
			b.note("%d of 5000; packet too big %d of 200", len(v), big)
		}},
		{"4443-3.1", "codes of unreachable", func(b *bench) {
			b.start(func(s *setup) {
				s.engine = func(c *netstack.Config) {
					c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, To: []netip.Prefix{prefix("fd77:200::/64")}}})
				}
			})
			b.engineOnly()
			silent := addr("fd77:100::66")
			b.silent[silent] = true
			b.outErr(udp(at(v16, 4000), at(ula9, 5000), "x"), 1, 0)
			b.outErr(udp(at(v16, 4000), at(hh6, 5000), "x"), 1, 1)
			b.outErr(udp(at(v16, 4000), at(rv6, 5999), "x"), 1, 4)
			b.push(vpc, udp(at(v16, 4001), at(silent, 5000), "x"))
			got := b.await(vpc, 8)
			if len(got) != 1 || got[0].typ != 1 || got[0].code != 3 {
				b.failf("silent neighbour: want 1/3, got %s", list(got))
			}
			b.note("no route 1/0, policy 1/1, address 1/3, port 1/4")
		}},
		{"4443-3.4", "parameter problem", func(b *bench) {
			b.outErr(ipPacket(v16, rv6, 253, []byte("anything")), 4, 1)
			rh := append([]byte{2, 0, 1, 0, 0, 0, 0}, o26.AsSlice()...)
			v, o := b.push(vpc, udp(at(v16, 4000), at(rv6, 5000), "x", extension(43, rh...)))
			if len(o) != 0 || len(v) != 1 || v[0].typ != 4 || v[0].code != 0 {
				b.failf("RH0 to the router: want 4/0, got %s", list(v))
			}
			b.note("next header 253: 4/1; RH0: 4/0")
		}},
		{"4443-4.2", "echo to the gateway", func(b *bench) {
			for _, a := range []netip.Addr{rv6, ro6} {
				b.answers(vpc, ping(v16, a, 7, 1, pad(56)))
				b.answers(vpc, cut(ping(v16, a, 7, 2, pad(4000)), 77, 1200)...)
			}
			b.answers(overlay, ping(o16, ro6, 7, 1, pad(56)))
			b.note("Rv and Ro, 56 and 4000 bytes")
		}},
	}
}

// ipv6Addresses: RFC 4007, 4291, 6890 and 3704: addresses that aren't forwarded.
func ipv6Addresses() []row {
	return []row{
		{"4007", "link-local addresses", func(b *bench) {
			b.ready()
			for _, c := range []struct{ from, src, dst string }{
				{"VPC", "fe80::77", "fd77:100::50"}, {"VPC", "fd77:1::50", "fe80::77"}, {"overlay", "fe80::77", "fd77:1::50"},
			} {
				from := vpc
				if c.from == "overlay" {
					from = overlay
				}
				p := udp(at(addr(c.src), 4000), at(addr(c.dst), 5000), "x")
				before := b.accounted()
				v, o := b.push(from, p)
				for _, e := range append(v, o...) {
					if e.proto != protoICMPv6 || e.typ != 1 || e.dst != addr(c.src) {
						b.failf("%s from the %s: %s came out", parse(p), from, e)
					}
				}
				b.counted(before, 1, from, [][]byte{b.frame(p)})
			}
			b.note("not forwarded, no redirect, counted")
		}},
		{"4291", "martians", func(b *bench) {
			for _, s := range []string{"::", "::1", "ff02::5", "::ffff:10.77.1.50"} {
				b.none(vpc, udp6(addr(s), o16))
			}
			for _, d := range []string{"::", "::1", "::ffff:10.77.100.50"} {
				b.none(vpc, udp6(v16, addr(d)))
			}
			b.note("four sources and three destinations dropped, counted")
		}},
		{"6890-v6", "special prefixes", func(b *bench) {
			for _, d := range []string{"100::1", "2001:db8::1", "fec0::1"} {
				_, o := b.push(vpc, udp(at(v16, 4000), at(addr(d), 5000), "x"))
				want(b, d+": packets on the overlay", len(o), 0)
			}
			b.note("no route, not forwarded")
		}},
		{"3704-v6", "source validation", func(b *bench) {
			b.ready()
			b.none6(vpc, "fd77:100::51", "fd77:100::50")
			b.none6(vpc, "fd77:100::1", "fd77:100::50")
			b.none6(vpc, "fd77:1::1", "fd77:100::50")
			b.none6(overlay, "fd77:1::50", "fd77:1::51")
			b.note("dropped, counted")
		}},
	}
}

// ipv6Translation: RFC 6092, 6296 and 4890: filter and translation.
func ipv6Translation() []row {
	return []row{
		{"V6-NONAT", "no translation by default", func(b *bench) {
			want(b, "source", b.out(udp(at(v16, 4000), at(o16, 5000), "x")).from(), at(v16, 4000))
			b.in(udp(at(o16, 5000), at(v16, 4000), "x"))
			b.note("unchanged %s", v16)
		}},
		{"6092-a", "stateful filter", func(b *bench) {
			b.none(overlay, tcp(at(o16, 80), at(v16, 4000), segment{flags: syn, seq: 1}))
			b.none(overlay, udp(at(o16, 80), at(v16, 4000), "x"))
			b.out(udp(at(v16, 4000), at(o16, 5000), "x"))
			b.in(udp(at(o16, 5000), at(v16, 4000), "x"))
			b.in(icmpError(o16, 1, 4, 0, udp(at(v16, 4000), at(o16, 5000), "x"), 48))
			b.note("unsolicited refused, replies and related errors pass")
		}},
		{"V6-NAT66", "masquerade", func(b *bench) {
			b.start(func(s *setup) { s.network.Masquerade6 = true })
			b.engineOnly()
			f := b.udpFlow(at(v16, 4000), at(hh6, 5000))
			want(b, "outside end", f.ext, at(ro6, 4000))
			want(b, "inside end", f.answer().to(), f.in)
			p := b.out(ping(v16, o16, 7, 1, "x"))
			want(b, "echo source", p.src, ro6)
			want(b, "echo back", b.in(pong(o16, ro6, p.sport, 1, "x")).dst, v16)
			translated(b, b.in(icmpError(mm6, 2, 0, 1400, udp(f.ext, f.out, pad(1400)), 1200)), f, mm6, 2, 0)
			b.note("UDP, echo, packet too big from M")
		}},
		{"6296", "prefix translation", func(b *bench) {
			b.start(func(s *setup) { s.prefix6 = prefix("2001:db8:aa::/64") })
			b.engineOnly()
			sent := udp(at(v16, 4000), at(o16, 5000), "x")
			p := b.out(sent)
			if !prefix("2001:db8:aa::/64").Contains(p.src) {
				b.failf("source %s", p.src)
			}
			want(b, "UDP checksum", binary.BigEndian.Uint16(p.b[46:]), binary.BigEndian.Uint16(sent[46:]))
			want(b, "port", p.sport, 4000)
			want(b, "back", b.in(udp(at(o16, 5000), p.from(), "x")).dst, v16)
			e := b.in(icmpError(o16, 1, 4, 0, p.b, 8))
			want(b, "quoted source", e.quoted().from(), at(v16, 4000))
			b.note("%s, checksum unchanged", p.src)
		}},
		{"4890", "which ICMPv6 passes", func(b *bench) {
			b.out(udp(at(v16, 4000), at(hh6, 5000), pad(1300)))
			for _, e := range [][3]int{{1, 0, 0}, {2, 0, 1300}, {3, 0, 0}, {4, 1, 6}} {
				got := b.in(icmpError(mm6, uint8(e[0]), uint8(e[1]), uint32(e[2]), udp(at(v16, 4000), at(hh6, 5000), pad(1300)), 1200))
				want(b, "type", int(got.typ), e[0])
				want(b, "second word", got.mtu, e[2])
			}
			t := o16.As16()
			ns := append(append(make([]byte, 0, 24), t[:]...), 1, 1, 2, 0, 0, 0, 0, 1)
			for _, typ := range []uint8{133, 134, 135, 136, 137, 131, 132} {
				v, o := b.push(vpc, icmp(v16, o16, typ, 0, 0, ns, ttl(255)))
				if len(v)+len(o) > 0 {
					b.failf("type %d: at the VPC %s, on the overlay %s", typ, list(v), list(o))
				}
				if v, _ = b.push(overlay, icmp(o16, v16, typ, 0, 0, ns, ttl(255))); len(v) > 0 {
					b.failf("type %d inbound: %s", typ, list(v))
				}
			}
			b.note("types 1 to 4 pass, neighbour, router and listener messages never cross")
		}},
		{"V6-MCAST", "multicast", func(b *bench) {
			for _, d := range []string{"ff02::1", "ff05::2", "ff0e::fb"} {
				b.none6(vpc, "fd77:1::50", d)
				a := addr(d).As16()
				m := mac{0x33, 0x33, a[12], a[13], a[14], a[15]}
				b.noneFrames(overlay, append(ethernet(m, playerMAC(o16), 0x86dd), udp(at(o16, 5353), at(addr(d), 5353), "x")...))
			}
			b.note("none, both sides, counted")
		}},
	}
}

// udp6 builds an IPv6 datagram also for addresses in the mapped form.
func udp6(src, dst netip.Addr) []byte {
	p := udp(at(v16, 4000), at(o16, 5000), "x")
	a, c := src.As16(), dst.As16()
	copy(p[8:], a[:])
	copy(p[24:], c[:])
	return fixTransport(p)
}

// overlap sends fragments of which the second overlaps the first by 8 bytes, then
// the good rest; the datagram must not come out whole.
func (b *bench) overlap(p []byte, n int) {
	at := 20
	if isV6(p) {
		at = 40
	}
	body := p[at:]
	first := fragment(p, 0x99, 0, true, body[:n])
	bad := fragment(p, 0x99, n-8, true, body[n-8:n+16])
	good := fragment(p, 0x99, n, false, body[n:])
	_, o := b.push(vpc, first, bad, good)
	if w := reassemble(o); len(o) > 0 && w != nil {
		b.failf("a datagram with an overlap came out: %s", list(o))
	}
}
