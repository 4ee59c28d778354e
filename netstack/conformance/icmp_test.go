package conformance

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"ztgate/netstack"
)

// mplsError builds an error with RFC 4884 extensions: the quoted packet padded to
// 128 bytes, an MPLS label object behind it. words is the length attribute.
func mplsError(src netip.Addr, typ, code uint8, about []byte, words int) []byte {
	quote := append(bytes.Clone(about), make([]byte, 128)...)[:128]
	ext := []byte{0x20, 0, 0, 0, 0, 8, 1, 1, 0x12, 0x34, 0x51, 0xff}
	binary.BigEndian.PutUint16(ext[2:], ^checksum.Checksum(ext, 0))
	return icmp(src, parse(about).src, typ, code, uint32(words)<<16, append(quote, ext...))
}

// echoFlow opens an echo session.
func (b *bench) echoFlow(from, to netip.Addr, id uint16) *flow {
	p := b.out(ping(from, to, id, 1, "abc"))
	return &flow{b: b, in: at(from, int(id)), out: at(to, int(p.sport)), ext: at(p.src, int(p.sport))}
}

func (f *flow) pong() []byte { return pong(f.out.Addr(), f.ext.Addr(), f.ext.Port(), 1, "abc") }

// icmpQueries: RFC 5508 section 3: queries.
func icmpQueries() []row {
	return []row{
		{"5508-REQ-1", "queries and answers", func(b *bench) {
			p := b.out(ping(v1, o1, 7, 1, "abc"))
			want(b, "source", p.src, ro)
			r := b.in(pong(o1, ro, p.sport, 1, "abc"))
			want(b, "identifier back", r.sport, 7)
			want(b, "destination back", r.dst, v1)
			stamp := make([]byte, 12)
			p = b.out(icmp(v1, o1, 13, 0, 8<<16|1, stamp))
			want(b, "timestamp source", p.src, ro)
			r = b.in(icmp(o1, ro, 14, 0, uint32(p.sport)<<16|1, stamp))
			want(b, "timestamp identifier back", r.sport, 8)
			b.note("echo and timestamp, identifiers restored")
		}},
		{"5508-REQ-1a", "one identifier whatever the destination", func(b *bench) {
			x := b.echoFlow(v1, o1, 7).ext
			want(b, "V1 id 7 to O2", b.echoFlow(v1, o2, 7).ext, x)
			y := b.echoFlow(v2, o1, 7).ext
			want(b, "V2 id 7 to O2", b.echoFlow(v2, o2, 7).ext, y)
			if x == y {
				b.failf("V1 and V2 share identifier %d", x.Port())
			}
			b.note("V1 %d/%d, V2 %d/%d", x.Port(), x.Port(), y.Port(), y.Port())
		}},
		{"5508-REQ-2", "one minute without traffic", func(b *bench) {
			var fs []*flow
			for i := range 3 {
				fs = append(fs, b.echoFlow(v1, o1, uint16(100+i)))
			}
			at := time.Duration(0)
			for i, wait := range []time.Duration{26 * time.Second, 36 * time.Second, 58 * time.Second} {
				b.advance(wait - at)
				at = wait
				b.in(fs[i].pong())
			}
			b.note("replies after 26, 36, 58 s delivered")
		}},
		{"5508-REQ-2a", "timer is a setting", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{ICMP: 10 * time.Second} })
			b.engineOnly()
			x, y := b.echoFlow(v1, o1, 7), b.echoFlow(v1, o1, 8)
			b.advance(8 * time.Second)
			b.in(x.pong())
			b.advance(5 * time.Second)
			y.refusedNow(y.pong())
			b.note("set to 10 s: alive at 8, gone at 13")
		}},
	}
}

// icmpValidation: RFC 5508 section 4: which errors are valid.
func icmpValidation() []row {
	return []row{
		{"5508-REQ-3", "wrong ICMP checksum", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.none(overlay, icmpError(o1, 3, 3, 0, f.seen(), 8, badSum))
			f.answer()
			b.note("dropped, counted")
		}},
		{"5508-REQ-3a", "wrong checksum of the quoted header", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			bad := f.seen()
			bad[8]-- // TTL changed without the checksum, as seen in the wild
			v, _ := b.push(overlay, icmpError(o1, 3, 3, 0, bad, 8))
			if len(v) == 1 {
				translated(b, v[0], f, o1, 3, 3)
				b.note("forwarded with the inner tuple restored (allowed)")
				return
			}
			want(b, "packets at the VPC", len(v), 0)
			b.note("dropped")
		}},
		{"5508-REQ-3b", "options in the quoted header", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			rr := with(f.seen(), options(7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0))
			translated(b, b.in(icmpError(o1, 3, 3, 0, rr, 8)), f, o1, 3, 3)
			b.note("record route in the quoted header: port found")
		}},
		{"5508-REQ-3c", "quoted transport checksum ignored", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			translated(b, b.in(icmpError(o1, 3, 3, 0, badSum(f.seen()), 16)), f, o1, 3, 3)
			b.note("forwarded")
		}},
		{"5508-REQ-3d", "extensions out of the sums", func(b *bench) { extensions(b, 32) }},
	}
}

// icmpTranslation: RFC 5508 sections 4 and 5: errors translated and hairpinned.
func icmpTranslation() []row {
	return []row{
		{"5508-REQ-4", "error without a mapping", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			other := f.ext.Port() ^ 1
			b.none(overlay, icmpError(o1, 3, 3, 0, udp(at(ro, int(other)), f.out, "x"), 8))
			short := icmp(o1, ro, 3, 3, 0, f.seen()[:24])
			b.none(overlay, short)
			b.none(overlay, icmp(o1, ro, 3, 3, 0, f.seen()[:12]))
			away := icmpError(o1, 3, 3, 0, udp(at(addr("10.77.100.77"), int(f.ext.Port())), f.out, "x"), 8)
			copy(away[16:20], ro.AsSlice())
			b.none(overlay, with(away))
			b.note("unknown port, other inner source, cut transport, cut header: silence, counted")
		}},
		{"5508-REQ-4a", "quote restored", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			e := b.in(icmpError(o1, 3, 3, 0, f.seen(), 11))
			translated(b, e, f, o1, 3, 3)
			q := e.quoted()
			if err := q.sumsRight(); err != nil {
				b.failf("quoted packet: %v", err)
			}
			b.note("quoted source %s, its checksums right", q.from())
		}},
		{"5508-REQ-4b", "type and code kept", same("4787-REQ-12b")},
		{"5508-REQ-4c", "destination restored", same("4787-REQ-12b")},
		{"5508-REQ-5", "inside error without a mapping", func(b *bench) {
			b.none(vpc, icmpError(v1, 3, 3, 0, udp(at(o1, 5000), at(v1, 4000), "x"), 8))
			b.none(vpc, icmpError(v1, 3, 3, 0, udp(at(o1, 5000), at(ro, 4000), "x"), 8))
			b.note("nothing outside, counted")
		}},
		{"5508-REQ-5a", "inside error quotes the outside form", insideError},
		{"5508-REQ-5b", "inside error keeps type and code", insideError},
		{"5508-REQ-5c", "inside error has the outside source", insideError},
		{"5508-REQ-6", "errors neither refresh nor remove", func(b *bench) {
			b.start(func(s *setup) {
				s.timeouts = netstack.Timeouts{UDP: 100 * time.Second, ICMP: 100 * time.Second}
			})
			b.engineOnly()
			f, g := b.udpFlow(at(v1, b.port()), at(o1, 5000)), b.echoFlow(v1, o1, 9)
			b.advance(60 * time.Second)
			b.in(icmpError(o1, 3, 3, 0, f.seen(), 8))
			b.in(icmpError(o1, 3, 1, 0, ping(g.ext.Addr(), o1, g.ext.Port(), 1, "abc"), 8))
			b.advance(30 * time.Second)
			h := b.udpFlow(at(v1, b.port()), at(o1, 5001))
			b.advance(15 * time.Second)
			f.refusedNow(f.reply())
			g.refusedNow(g.pong())
			h.answer()
			b.note("gone 105 s after their last packet in spite of errors at 60 s")
		}},
		{"5508-REQ-7", "hairpinned error", hairpinError},
		{"5508-REQ-7a", "hairpinned error's destination", hairpinError},
	}
}

// icmpRouter: RFC 5508 sections 6 to 8: errors that a translator sends, and what else it passes.
func icmpRouter() []row {
	return []row{
		{"5508-REQ-8", "refused for lack of room", same("L-PORT-EXHAUST", "L-TABLE-ASSURED")},
		{"5508-REQ-9", "errors suppressed by policy", na("optional, not offered")},
		{"5508-REQ-10a1", "unreachable", same("1812-5.2.7.1", "4787-REQ-12b")},
		{"5508-REQ-10a2", "time exceeded", same("1812-5.3.1", "4787-REQ-12a")},
		{"5508-REQ-10a3", "echo", same("L-PING-ID", "L-PING-UNSOL")},
		{"5508-REQ-10b", "parameter problem and redirect", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			translated(b, b.in(icmpError(o1, 12, 0, 0, f.seen(), 8)), f, o1, 12, 0)
			for _, typ := range []uint8{5, 9, 10} {
				b.none(overlay, icmpError(o1, typ, 1, 0x0a4d6433, f.seen(), 8))
			}
			b.note("12/0 passes, 5, 9 and 10 don't")
		}},
		{"5508-REQ-10c", "source quench and information", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.none(overlay, icmpError(o1, 4, 0, 0, f.seen(), 8))
			b.none(vpc, icmp(v1, o1, 15, 0, 7<<16|1, nil))
			b.none(overlay, icmp(o1, ro, 16, 0, 7<<16|1, nil))
			b.note("source quench and information dropped, counted")
		}},
		{"5508-REQ-10d", "TOS of errors", same("1812-4.3.2.5")},
		{"5508-REQ-10e", "when not to send errors", same("1812-4.3.2.7a", "1812-4.3.2.7b", "1812-4.3.2.7c", "1812-4.3.2.7d", "1812-4.3.2.7e")},
		{"5508-REQ-10f", "rate limit of errors", same("1812-4.3.2.8")},
		{"5508-REQ-11", "other types", func(b *bench) {
			for _, typ := range []uint8{4, 5, 9, 10, 40, 41, 255} {
				b.none(vpc, icmp(v1, o1, typ, 0, 0, udp(at(o1, 1), at(v1, 2), "x")))
			}
			b.note("none forwarded, each counted")
		}},
	}
}

// icmpForm: RFC 792 and 4884: the form of messages.
func icmpForm() []row {
	return []row{
		{"792-a", "form of errors", func(b *bench) {
			for _, n := range []int{28, 40, 1428} {
				sent := udp(at(v1, b.port()), at(o1, 33434), pad(n-28), ttl(1))
				e := b.outErr(sent, 11, 0)
				quoted := len(e.payload)
				if quoted < 28 || !bytes.Equal(e.payload, sent[:quoted]) {
					b.failf("%d bytes quoted of %d", quoted, n)
				}
				want(b, "unused field", binary.BigEndian.Uint32(e.b[e.l4+4:]), 0)
				b.note("%d bytes for %d", len(e.b), n)
			}
		}},
		{"792-b", "echo data of any length", func(b *bench) {
			for _, n := range append([]int{1399, 1471, 1472}, seq(0, 64)...) {
				data := b.random(n)
				p := b.out(ping(v1, o1, 7, uint16(n), data))
				want(b, "data out", string(p.payload), data)
				want(b, "data back", string(b.in(pong(o1, ro, p.sport, uint16(n), data)).payload), data)
			}
			for _, n := range []int{4000, 65507} {
				data := b.random(n)
				v, _ := b.push(vpc, cut(ping(v1, ro, 7, 1, data), uint32(n), 1480)...)
				w := reassemble(v)
				if w == nil {
					b.failf("the gateway's answer to %d bytes: %s", n, list(v))
				}
				want(b, "the gateway's answer", string(w.payload), data)
				data = b.random(n)
				_, o := b.push(vpc, cut(ping(v1, o1, 9, 1, data), uint32(n+1), 1480)...)
				if w = reassemble(o); w == nil || string(w.payload) != data {
					b.failf("request of %d bytes: %s", n, list(o))
				}
				v, _ = b.push(overlay, cut(pong(o1, ro, w.sport, 1, data), uint32(n+2), 1480)...)
				if w = reassemble(v); w == nil || string(w.payload) != data {
					b.failf("reply of %d bytes: %s", n, list(v))
				}
			}
			b.note("0 to 64, 1399, 1471, 1472, 4000, 65507")
		}},
		{"4884-4", "extensions survive", func(b *bench) { extensions(b, 32) }},
		{"4884-5", "extensions of old senders", func(b *bench) { extensions(b, 0) }},
		{"4884-R", "own errors without extensions", func(b *bench) {
			e := b.outErr(udp(at(v1, b.port()), at(o1, 33434), pad(1000), ttl(1)), 11, 0)
			want(b, "length attribute", e.b[e.l4+5], 0)
			b.note("none, as allowed")
		}},
	}
}

// seq returns the integers from a to b.
func seq(a, b int) (out []int) {
	for i := a; i <= b; i++ {
		out = append(out, i)
	}
	return out
}

// random returns n random bytes.
func (b *bench) random(n int) string {
	s := make([]byte, n)
	for i := range s {
		s[i] = byte(b.rng.Uint32())
	}
	return string(s)
}

// cut splits a packet into fragments of n transport bytes each.
func cut(p []byte, id uint32, n int) [][]byte {
	return split(p, id, slices.Repeat([]int{n}, len(p)/n+1)...)
}

// extensions sends errors with an MPLS object.
func extensions(b *bench, words int) {
	for i, proto := range []string{"udp", "tcp"} {
		f := b.udpFlow(at(v1, 4200+i), at(hh, 33434))
		seen := udp(f.ext, f.out, pad(200))
		if proto == "tcp" {
			f = b.tcpFlow(at(v1, 4300), at(hh, 80))
			seen = tcp(f.ext, f.out, segment{flags: ack, seq: f.iss, data: pad(200)})
		}
		for _, e := range [][2]uint8{{11, 0}, {3, 1}, {12, 0}} {
			sent := mplsError(mm, e[0], e[1], seen, words)
			got := b.in(sent)
			translated(b, got, f, mm, e[0], e[1])
			want(b, "length attribute", int(got.b[got.l4+5]), words)
			want(b, "size", len(got.b), len(sent))
			want(b, "object and padding", string(got.b[28+48:]), string(sent[28+48:]))
		}
	}
	b.note("length %d, padding and MPLS object kept in 11/0, 3/1, 12/0", words)
}

// insideError has an inside host, then a router behind it, complain about a
// packet from outside.
func insideError(b *bench) {
	check := func(f *flow, seen []byte, from netip.Addr, outside netip.AddrPort) {
		e := b.out(icmpError(from, 3, 3, 0, seen, 8))
		q := e.quoted()
		want(b, "type and code", [2]uint8{e.typ, e.code}, [2]uint8{3, 3})
		want(b, "source", e.src, ro)
		want(b, "destination", e.dst, f.out.Addr())
		want(b, "quoted source", q.from(), f.out)
		want(b, "quoted destination", q.to(), outside)
	}
	f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
	check(f, f.answer().b, v1, f.ext)
	check(f, f.answer().b, addr("10.77.1.9"), f.ext)
	b.start(func(s *setup) { s.forwards = []forward{{protoUDP, at(ro, 9051), at(v1, 91)}} })
	g := &flow{b: b, in: at(v1, 91), out: at(o1, 7000), ext: at(ro, 9051)}
	seen := b.in(g.reply())
	check(g, seen.b, v1, g.ext)
	check(g, seen.b, addr("10.77.1.9"), g.ext)
	b.note("source and quoted destination are the outside ones, also from a router behind")
}

// hairpinError has V1 complain about a hairpinned packet of V2.
func hairpinError(b *bench) {
	x, y := b.udpFlow(at(v1, 4000), at(o1, 3478)).answered(), b.udpFlow(at(v2, 4001), at(o1, 3478)).answered()
	b.push(vpc, udp(x.in, y.ext, "opens the filter"))
	v, _ := b.push(vpc, udp(y.in, x.ext, "hairpin"))
	if len(v) != 1 {
		b.failf("the hairpin itself: %s", list(v))
	}
	v, o := b.push(vpc, icmpError(v1, 3, 3, 0, v[0].b, 8))
	if len(v) != 1 || len(o) != 0 {
		b.failf("the error: at the VPC %s, on the overlay %s", list(v), list(o))
	}
	e, q := v[0], v[0].quoted()
	want(b, "type and code", [2]uint8{e.typ, e.code}, [2]uint8{3, 3})
	want(b, "source", e.src, x.ext.Addr())
	want(b, "destination", e.dst, v2)
	want(b, "quoted source", q.from(), y.in)
	want(b, "quoted destination", q.to(), x.ext)
	b.note("error reaches V2 with its own packet quoted")
}

// spread tells whether numbers look guessable: runs, or all in a part of a range.
func spread(b *bench, ports []uint16, first, last int) {
	runs := 0
	for i := 1; i < len(ports); i++ {
		if d := int(ports[i]) - int(ports[i-1]); d >= -2 && d <= 2 {
			runs++
		}
	}
	if runs > len(ports)/10 {
		b.failf("%d of %d replaced ports follow the one before: %v", runs, len(ports), ports)
	}
	var bins uint
	for _, p := range ports {
		bins |= 1 << (8 * (int(p) - first) / (last - first + 1))
	}
	if bits.OnesCount(bins) < 7 {
		b.failf("%d of 8 parts of the range used: %v", bits.OnesCount(bins), ports)
	}
	b.note("%d ports, %d neighbours, %d of 8 parts", len(ports), runs, bits.OnesCount(bins))
}
