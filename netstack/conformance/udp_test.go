package conformance

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztgate/netstack"
)

// endpoints checks endpoint-independent mapping: every inside endpoint has one
// outside port, whatever the destination, also after a collision.
func endpoints(b *bench, open func(from, to netip.AddrPort) netip.AddrPort) {
	ext := open(at(v1, 4000), at(o1, 5000))
	for _, to := range []netip.AddrPort{at(o1, 5001), at(o2, 5000), at(o3, 7000)} {
		want(b, fmt.Sprintf("V1:4000 to %s", to), open(at(v1, 4000), to), ext)
	}
	b.note("V1:4000 is %s for four destinations", ext)
	b.start()
	ext = open(at(v1, 4000), at(o1, 5000))
	second := open(at(v2, 4000), at(o2, 5000))
	want(b, "V2:4000 to another host", open(at(v2, 4000), at(o1, 5000)), second)
	if second == ext {
		b.failf("V1:4000 and V2:4000 both are %s", ext)
	}
	b.note("V2:4000 is %s for both", second)
}

func (b *bench) openUDP(from, to netip.AddrPort) netip.AddrPort { return b.udpFlow(from, to).ext }
func (b *bench) openTCP(from, to netip.AddrPort) netip.AddrPort { return b.tcpSyn(from, to).ext }

// class reports the range that a replaced port must stay in.
func class(p uint16) string {
	if p < 1024 {
		return "0-1023"
	}
	return "1024-65535"
}

// classPorts are the ports of 4787-REQ-3a.
var classPorts = []int{7, 53, 500, 511, 512, 600, 1000, 1023, 1024, 4000, 65535}

// errorsAbout are the ICMP errors of 4787-REQ-12.
var errorsAbout = [][2]uint8{{3, 0}, {3, 1}, {3, 2}, {3, 3}, {3, 4}, {3, 13}, {11, 0}, {12, 0}, {4, 0}, {5, 1}}

// translated checks an error that arrived at the VPC about a flow.
func translated(b *bench, e *packet, f *flow, from netip.Addr, typ, code uint8) {
	b.t.Helper()
	q := e.quoted()
	want(b, "source of the error", e.src, from)
	want(b, "destination of the error", e.dst, f.in.Addr())
	want(b, "type and code", [2]uint8{e.typ, e.code}, [2]uint8{typ, code})
	want(b, "quoted source", q.from(), f.in)
	want(b, "quoted destination", q.to(), f.out)
}

// udpMapping: RFC 4787 section 4: mapping and choice of ports.
func udpMapping() []row {
	return []row{
		{"4787-REQ-1", "one port whatever the destination", func(b *bench) { endpoints(b, b.openUDP) }},
		{"4787-REQ-2", "one address per client", func(b *bench) {
			b.start(func(s *setup) { s.network.Addresses = append(s.network.Addresses, prefix("10.77.100.9/24")) })
			b.engineOnly()
			for i := range 34 {
				want(b, "UDP source", b.openUDP(at(v1, 3000+i), at(o1, 5000)).Addr(), ro)
				want(b, "TCP source", b.openTCP(at(v1, 3000+i), at(o1, 5000)).Addr(), ro)
				want(b, "echo source", b.out(ping(v1, o1, uint16(i), 1, "")).src, ro)
			}
			list := pool(b, "10.77.100.9", "10.50.7.1")
			for _, v := range []netip.Addr{v1, v2} {
				a := b.openUDP(at(v, 3000), at(o1, 5000)).Addr()
				for i := range 34 {
					want(b, "UDP source", b.openUDP(at(v, 3000+i), at(o1, 5000)).Addr(), a)
					want(b, "TCP source", b.openTCP(at(v, 3000+i), at(o1, 5000)).Addr(), a)
					want(b, "echo source", b.out(ping(v, o1, uint16(i), 1, "")).src, a)
				}
				list = slices.DeleteFunc(list, func(x netip.Addr) bool { return x == a })
			}
			want(b, "addresses without a client", len(list), 0)
			b.note("102 flows of a client from one address: with two on the network, and with a pool of two")
		}},
		{"4787-REQ-3", "no shared ports", func(b *bench) {
			a, c := b.openUDP(at(v1, 4000), at(o1, 5000)), b.openUDP(at(v2, 4000), at(o2, 5000))
			if a == c {
				b.failf("both leave as %s", a)
			}
			b.note("%d and %d", a.Port(), c.Port())
		}},
		{"4787-REQ-3a", "class of a replaced port", func(b *bench) {
			// All of V1's first: a replaced port of V2 may be any free one.
			for _, p := range classPorts {
				want(b, fmt.Sprintf("V1:%d", p), b.openUDP(at(v1, p), at(o1, 5000)).Port(), uint16(p))
			}
			var got []uint16
			for _, p := range classPorts {
				second := b.openUDP(at(v2, p), at(o1, 5000)).Port()
				want(b, fmt.Sprintf("class of V2:%d, now %d", p, second), class(second), class(uint16(p)))
				got = append(got, second)
			}
			b.note("V2 got %v", got)
		}},
		{"4787-REQ-4", "parity", na("no need: relaxed by RFC 7857 section 9")},
	}
}

// udpTimers: RFC 4787 section 4.3: how long mappings live.
func udpTimers() []row {
	return []row{
		{"4787-REQ-5", "two minutes without traffic", func(b *bench) {
			once := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			twice := b.udpFlow(at(v1, b.port()), at(o1, 5000)).answered()
			b.advance(3 * time.Second)
			twice.send()
			twice.answer()
			b.advance(115 * time.Second)
			twice.answer()
			once.answer()
			b.note("never answered: delivered at 118 s; two-way: at 115 s")
		}},
		{"4787-REQ-5a", "shorter for well-known ports", na("optional, not offered")},
		{"4787-REQ-5b", "timer is a setting", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{UDP: 10 * time.Second} })
			b.engineOnly()
			in, out := b.udpFlow(at(v1, b.port()), at(o1, 5000)), b.udpFlow(at(v1, b.port()), at(o1, 5001))
			b.advance(8 * time.Second)
			in.answer()
			b.advance(5 * time.Second)
			out.refusedNow(out.reply())
			b.note("set to 10 s: alive at 8, gone at 13")
		}},
		{"4787-REQ-5c", "five minutes by default", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000)).answered()
			f.send()
			b.advance(290 * time.Second)
			f.answer()
			b.note("two-way flow: delivered at 290 s")
		}},
		{"4787-REQ-6", "outbound packets refresh", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for range 6 {
				b.advance(time.Minute)
				want(b, "outside end", f.send().from(), f.ext)
			}
			f.answer()
			b.note("delivered after 6 min with outbound packets each minute")
		}},
		{"4787-REQ-6a", "inbound packets refresh", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000)).answered()
			f.send()
			for range 5 {
				b.advance(80 * time.Second)
				f.answer()
			}
			b.note("delivered for 400 s with inbound packets only")
		}},
	}
}

// udpBehaviour: RFC 4787 sections 4.4 to 8: overlapping prefixes, filtering, hairpin, payload and load.
func udpBehaviour() []row {
	return []row{
		{"4787-REQ-7", "overlapping prefixes", func(b *bench) {
			e := b.engineOnly()
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for _, target := range []string{"10.77.1.0/24", "10.77.1.0/25", "10.77.0.0/16"} {
				n := defaultSetup().network
				n.Routes = append(n.Routes, netstack.Route{Target: prefix(target), Via: o3})
				if err := e.engine.SetNetworks([]netstack.Network{n}); err != nil {
					b.failf("route %s: %v", target, err)
				}
				f.answer()
				want(b, "the flow goes on", f.send().from(), f.ext)
				for _, to := range []string{"10.77.1.77", "10.77.1.200"} {
					if _, o := b.push(vpc, udp(at(v2, b.port()), at(addr(to), 9), "x")); len(o) != 0 {
						b.failf("route %s: a packet for VPC host %s went to the overlay as %s", target, to, list(o))
					}
				}
			}
			b.note("equal, inside and around: traffic stays")
		}},
		{"4787-REQ-8", "filtering class", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.unwanted(udp(at(o1, 5999), f.ext, "other port"))
			b.unwanted(udp(at(o2, 5000), f.ext, "other host"))
			f.answer()
			b.note("address and port dependent")
		}},
		{"4787-REQ-9", "hairpin", func(b *bench) { hairpinUDP(b) }},
		{"4787-REQ-9a", "hairpin shows the outside source", func(b *bench) { hairpinUDP(b) }},
		{"4787-REQ-10", "payload untouched", func(b *bench) {
			for _, c := range []struct {
				port int
				data string
			}{
				{5060, "INVITE sip:b@10.77.100.50 SIP/2.0\r\nVia: SIP/2.0/UDP 10.77.1.50:5060\r\nContact: <sip:a@10.77.1.50:5060>\r\n\r\n"},
				{69, "\x00\x01file\x00octet\x00"},
				{53, "\x12\x34\x01\x00\x00\x01\x00\x01\x00\x00\x00\x00\x0a\x4d\x01\x32\x0a\x4d\x64\x01"},
			} {
				p := b.out(udp(at(v1, c.port), at(o1, c.port), c.data))
				want(b, "payload out", string(p.payload), c.data)
				want(b, "payload in", string(b.in(udp(at(o1, c.port), p.from(), c.data)).payload), c.data)
			}
			b.note("SIP, TFTP and DNS payloads identical")
		}},
		{"4787-REQ-10a", "gateways switched one by one", na("there is no application gateway")},
		{"4787-REQ-11", "same under load", func(b *bench) {
			const limit = 4000
			for _, fill := range []int{0, limit / 2, limit * 95 / 100, limit, b.scale(100_000)} {
				b.start(func(s *setup) { s.maxFlows = limit })
				b.engineOnly()
				b.flood(fill, func(i int) []byte {
					return udp(at(addr(fmt.Sprintf("10.77.1.%d", 60+i%100)), 10000+i/100), at(o3, 9), "fill")
				})
				f := b.udpFlow(at(v1, 4000), at(o1, 5000)).answered()
				want(b, fmt.Sprintf("fill %d: another destination", fill), b.openUDP(at(v1, 4000), at(o2, 7000)), f.ext)
				if second := b.openUDP(at(v2, 4000), at(o2, 5000)); second == f.ext {
					b.failf("fill %d: shared port %s", fill, second)
				}
				b.unwanted(udp(at(o2, 5000), f.ext, "x"))
				f.answer()
			}
			b.note("same at 0, 50, 95, 100 %% and after %d flows", b.scale(100_000))
		}},
	}
}

// udpErrors: RFC 4787 section 9: ICMP errors about flows.
func udpErrors() []row {
	return []row{
		{"4787-REQ-12", "errors end no mapping", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for _, e := range errorsAbout {
				b.push(overlay, icmpError(o1, e[0], e[1], 0, f.seen(), 8))
				f.answer()
			}
			b.note("data delivered after each of the ten")
		}},
		{"4787-REQ-12a", "errors from routers on the way", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(hh, 33434))
			translated(b, b.in(icmpError(mm, 11, 0, 0, f.seen(), 8)), f, mm, 11, 0)
			b.note("11/0 arrives with source %s", mm)
		}},
		{"4787-REQ-12b", "unreachables pass", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for _, e := range errorsAbout[:6] {
				translated(b, b.in(icmpError(o1, e[0], e[1], 1400, f.seen(), 8)), f, o1, e[0], e[1])
			}
			b.note("3/0, 3/1, 3/2, 3/3, 3/4, 3/13 with the inner %s", f.in)
		}},
	}
}

// udpFragments: RFC 4787 sections 10 and 11: fragments out and in.
func udpFragments() []row {
	return []row{
		{"4787-REQ-13", "too big with DF", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			p := at(v1, b.port())
			for range 2 {
				sent := udp(p, at(o1, 5000), strings.Repeat("x", 1472), df)
				e := b.outErr(sent, 3, 4)
				want(b, "MTU", e.mtu, 1400)
				want(b, "source", e.src, rv)
				want(b, "quote is what was sent", string(e.payload), string(sent[:len(e.payload)]))
			}
			b.note("3/4, MTU 1400, from %s, twice", rv)
		}},
		{"4787-REQ-13a", "too big without DF", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			sent := udp(at(v1, b.port()), at(o1, 5000), strings.Repeat("abcdefgh", 184), ipid(0x4242))
			_, o := b.push(vpc, sent)
			if len(o) < 2 {
				b.failf("want fragments, got %s", list(o))
			}
			off := 0
			for i, p := range o {
				want(b, "offset", p.off, off)
				want(b, "ID", p.id, o[0].id)
				n := len(p.b) - 20
				if i < len(o)-1 && n%8 != 0 || len(p.b) > 1400 {
					b.failf("fragment of %d bytes", len(p.b))
				}
				off += n
			}
			whole := reassemble(o)
			if err := whole.sumsRight(); err != nil {
				b.failf("reassembled: %v", err)
			}
			want(b, "payload", string(whole.payload), string(sent[28:]))
			b.note("%d fragments in order", len(o))
		}},
		{"4787-REQ-14", "fragments in any order", func(b *bench) {
			payload := strings.Repeat("0123456789abcdef", 128)
			orders := [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}}
			for i, order := range orders {
				parts := split(udp(at(v1, 4500+i), at(o1, 5000), payload), uint32(0x500+i), 800, 800)
				b.fragments(vpc, parts, order, at(ro, 4500+i), payload)
			}
			f := b.udpFlow(at(v1, 4600), at(o1, 5000))
			for i, order := range orders {
				parts := split(udp(f.out, f.ext, payload), uint32(0x600+i), 800, 800)
				b.fragments(overlay, parts, order, f.out, payload)
			}
			parts := split(udp(at(v1, 4700), at(o1, 5000), payload), 0x700, 800, 800)
			_, early := b.push(vpc, parts[1], parts[2])
			b.advance(500 * time.Millisecond)
			_, late := b.push(vpc, parts[0])
			b.whole(append(early, late...), at(ro, 4700), payload)
			if b.onlyOutward() {
				b.note("orders 123, 321, 231 both ways, first one 0.5 s late")
				return
			}
			b.forwarded()
			for i, order := range orders {
				parts := split(udp(at(o1, 7100), at(ro, 9051), payload), uint32(0x800+i), 800, 800)
				b.fragments(overlay, parts, order, at(o1, 7100), payload)
				parts = split(udp(at(v1, 91), at(o1, 7100), payload), uint32(0x900+i), 800, 800)
				b.fragments(vpc, parts, order, at(ro, 9051), payload)
			}
			b.note("orders 123, 321, 231 both ways, TA and TB, first one 0.5 s late")
		}},
		{"4787-REQ-14a", "flood of fragments", func(b *bench) {
			b.start()
			for _, wait := range []time.Duration{0, 31 * time.Second} {
				b.advance(wait)
				b.flood(b.scale(20_000), func(i int) []byte {
					big := udp(at(addr(fmt.Sprintf("10.77.1.%d", 100+i%100)), 1024+i/100), at(o1, 5000), strings.Repeat("f", 64))
					return split(big, uint32(i), 40)[0]
				})
				b.out(udp(at(v1, 4000), at(o1, 5000), "plain"))
				for i, v := range []netip.Addr{v1, v2} {
					payload := strings.Repeat("legitimate", 120)
					parts := split(udp(at(v, 4100+i), at(o1, 5000), payload), uint32(0x7000+i), 800)
					b.fragments(vpc, parts, []int{0, 1}, at(ro, 4100+i), payload)
				}
			}
			b.note("%d first fragments of 100 sources: plain datagram and both pairs pass", b.scale(20_000))
		}},
	}
}

// fragments sends parts in an order and wants the whole datagram on the other
// side.
func (b *bench) fragments(from side, parts [][]byte, order []int, src netip.AddrPort, payload string) {
	b.t.Helper()
	var send [][]byte
	for _, i := range order {
		send = append(send, parts[i])
	}
	v, o := b.push(from, send...)
	if from == overlay {
		v, o = o, v
	}
	if len(v) > 0 {
		b.failf("fragments %v from the %s: answered with %s", order, from, list(v))
	}
	b.whole(o, src, payload)
}

// whole checks that parts are one datagram.
func (b *bench) whole(parts []*packet, src netip.AddrPort, payload string) {
	b.t.Helper()
	for _, p := range parts {
		want(b, "source of a fragment", p.src, src.Addr())
	}
	if len(parts) == 0 {
		b.failf("no fragment came out")
	}
	w := reassemble(parts)
	if w == nil {
		b.failf("the fragments make no datagram: %s", list(parts))
	}
	if err := w.sumsRight(); err != nil {
		b.failf("reassembled: %v", err)
	}
	want(b, "source of the datagram", w.from(), src)
	want(b, "payload", string(w.payload), payload)
}

// flood sends n packets from the VPC and forgets what comes out.
func (b *bench) flood(n int, make func(i int) []byte) {
	b.ready()
	const batch = 1000
	for i := 0; i < n; i += batch {
		var frames [][]byte
		for j := i; j < min(n, i+batch); j++ {
			frames = append(frames, b.frame(make(j)))
		}
		b.r.inject(vpc, frames)
		for _, f := range b.r.take(overlay) {
			if reply := b.handle(overlay, f); reply != nil {
				b.r.inject(overlay, [][]byte{reply})
			}
		}
		b.sides[overlay].seen = nil
		b.r.take(vpc)
	}
	b.collect()
	b.sides = [2]lan{}
}

// hairpinUDP sends between two inside hosts through their outside ports.
func hairpinUDP(b *bench) {
	x, y := b.udpFlow(at(v1, 4000), at(o1, 3478)).answered(), b.udpFlow(at(v2, 4001), at(o1, 3478)).answered()
	b.push(vpc, udp(x.in, y.ext, "opens the filter"))
	for _, c := range []struct{ from, to *flow }{{y, x}, {x, y}, {y, x}} {
		v, o := b.push(vpc, udp(c.from.in, c.to.ext, "hairpin"))
		if len(o) != 0 || len(v) != 1 {
			b.failf("%s to %s: on the overlay %s, at the VPC %s", c.from.in, c.to.ext, list(o), list(v))
		}
		want(b, "destination", v[0].to(), c.to.in)
		want(b, "source", v[0].from(), c.from.ext)
		want(b, "payload", string(v[0].payload), "hairpin")
	}
	b.note("source seen is %s and %s", x.ext, y.ext)
}
