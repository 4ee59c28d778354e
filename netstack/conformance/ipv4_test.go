package conformance

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
	"ztgate/netstack/policy"
)

// broken are packets that fail the header checks.
func broken(edits ...edit) map[string][]byte {
	fresh := func() []byte { return udp(at(v1, 4000), at(o1, 5000), "some payload here", edits...) }
	out := map[string][]byte{}
	b := fresh()
	b[10] ^= 0xff
	out["checksum"] = b
	b = fresh()
	b[0] = 0x55
	fixHeader(b)
	out["version 5"] = b
	b = fresh()
	b[0] = 0x44
	out["IHL 4"] = b
	b = fresh()[:40]
	b[0] = 0x4f
	binary.BigEndian.PutUint16(b[2:], 40)
	out["IHL 15, too short"] = b
	b = fresh()
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+20))
	fixHeader(b)
	out["length beyond the frame"] = b
	b = fresh()
	binary.BigEndian.PutUint16(b[2:], 16)
	fixHeader(b)
	out["length below the header"] = b
	return out
}

// martians are packets whose source or destination never appears on a wire.
func martians(src, dst netip.Addr) (out [][]byte) {
	for _, a := range []string{"0.1.2.3", "127.0.0.1", "224.0.0.5", "255.255.255.255"} {
		out = append(out, udp(at(addr(a), 4000), at(dst, 5000), "x"))
	}
	for _, a := range []string{"0.0.0.0", "127.0.0.1", "240.0.0.1", "169.254.169.254"} {
		out = append(out, udp(at(src, 4000), at(addr(a), 5000), "x"))
	}
	return out
}

// await advances the clock second by second until something arrives at a side.
func (b *bench) await(s side, most int) (got []*packet) {
	for range most {
		b.advance(time.Second)
		if testwait.Poll(time.Second, func() bool { // the router's own timers run on real time
			v, o := b.push(vpc)
			if s == overlay {
				v = o
			}
			got = v
			return len(got) > 0
		}) {
			return got
		}
	}
	return nil
}

// ipv4Headers: RFC 1812: header checks and TTL.
func ipv4Headers() []row {
	return []row{
		{"1812-5.2.2", "header checks", func(b *bench) {
			for name, p := range broken() {
				b.note("%s", name)
				b.none(vpc, p)
				b.none(overlay, p)
			}
			b.allow = true
			base := udp(at(v1, 4000), at(o1, 5000), "some payload here")
			for range 10 {
				var ps [][]byte
				for range 1000 {
					p := bytes.Clone(base)
					for range 1 + b.rng.IntN(4) {
						p[b.rng.IntN(20)] = byte(b.rng.Uint32())
					}
					if b.rng.IntN(2) == 0 && p[0]&15 >= 5 && int(p[0]&15)*4 <= len(p) {
						fixHeader(p)
					}
					ps = append(ps, p)
				}
				b.push(vpc, ps...)
				b.push(overlay, ps...)
			}
			b.start()
			b.udpFlow(at(v1, 4000), at(o1, 5000)).answer()
			b.notes = []string{"six bad headers silent and counted from both sides, 20 000 mutated ones survived"}
		}},
		{"1812-4.2.2.trim", "link padding", func(b *bench) {
			p := udp(at(v1, 4000), at(o1, 5000), "abc")
			got := b.out(append(bytes.Clone(p), "stray123"...))
			want(b, "length out", len(got.b), 31)
			got = b.in(append(udp(at(o1, 5000), got.from(), "abc"), "stray123"...))
			want(b, "length in", len(got.b), 31)
			b.note("leaves with 31 bytes, both ways")
		}},
		{"1812-5.3.1", "TTL", func(b *bench) {
			from, to := at(v1, b.port()), at(o1, 5000)
			for _, n := range []uint8{0, 1} {
				want(b, "source", b.outErr(udp(from, to, "x", ttl(n)), 11, 0).src, rv)
			}
			for _, n := range []uint8{2, 255} {
				want(b, "TTL out", b.out(udp(from, to, "x", ttl(n))).ttl, n-1)
			}
			f := b.udpFlow(from, to)
			want(b, "TTL in", b.in(udp(to, f.ext, "x", ttl(9))).ttl, 8)
			e := b.inErr(udp(to, f.ext, "x", ttl(1)), 11, 0)
			want(b, "source of the error outside", e.src, ro)
			want(b, "quoted destination", e.quoted().to(), f.ext)
			b.note("255 to 254, 2 to 1, 0 and 1 get 11/0; inbound from %s quoting %s", e.src, f.ext)
		}},
		{"1812-4.2.2.9", "TTL of packets for the gateway", func(b *bench) {
			b.answers(vpc, ping(v1, rv, 7, 1, "x", ttl(1)))
			b.answers(vpc, ping(v1, ro, 7, 1, "x", ttl(1)))
			b.answers(overlay, ping(o1, ro, 7, 1, "x", ttl(1)))
			b.note("answered")
		}},
	}
}

// ipv4Errors: RFC 1812 section 4.3.2: the form of ICMP errors.
func ipv4Errors() []row {
	return []row{
		{"1812-4.3.2.2", "TTL of errors", func(b *bench) {
			e := b.outErr(udp(at(v1, 4000), at(o1, 33434), "x", ttl(1)), 11, 0)
			if e.ttl < 64 {
				b.failf("TTL %d", e.ttl)
			}
			b.note("%d", e.ttl)
		}},
		{"1812-4.3.2.3", "length of errors", func(b *bench) {
			e := b.outErr(udp(at(v1, 4000), at(o1, 33434), pad(1400), ttl(1)), 11, 0)
			if len(e.b) != 576 {
				b.failf("error of %d bytes, want 576", len(e.b))
			}
			b.note("576 bytes")
		}},
		{"1812-4.3.2.4", "source of errors", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU = 1400 })
			want(b, "TTL", b.outErr(udp(at(v1, 4000), at(o1, 5000), "x", ttl(1)), 11, 0).src, rv)
			want(b, "no route", b.outErr(udp(at(v1, 4000), at(addr("198.51.100.1"), 5000), "x"), 3, 0).src, rv)
			want(b, "too big", b.outErr(udp(at(v1, 4000), at(o1, 5000), pad(1472), df), 3, 4).src, rv)
			b.push(vpc, udp(at(v1, 4000), at(ox, 5000), "x"))
			got := b.await(vpc, 8)
			if len(got) != 1 || got[0].typ != 3 || got[0].code != 1 {
				b.failf("silent neighbour: want 3/1, got %s", list(got))
			}
			want(b, "host unreachable", got[0].src, rv)
			f := b.udpFlow(at(v1, 4001), at(o1, 5000))
			want(b, "TTL inbound", b.inErr(udp(f.out, f.ext, "x", ttl(1)), 11, 0).src, ro)
			b.note("%s towards the VPC, %s towards the overlay", rv, ro)
		}},
		{"1812-4.3.2.5", "TOS of errors", func(b *bench) {
			e := b.outErr(udp(at(v1, 4000), at(o1, 33434), "x", ttl(1)), 11, 0)
			if e.tos>>5 < 6 {
				b.failf("TOS %#x", e.tos)
			}
			b.note("%#x", e.tos)
		}},
	}
}

// ipv4Silence: RFC 1812 section 4.3.2.7 and 8: when errors aren't sent.
func ipv4Silence() []row {
	return []row{
		{"1812-4.3.2.7a", "none about errors", func(b *bench) {
			about := udp(at(o1, 5000), at(v1, 4000), "x")
			b.none(vpc, icmpError(v1, 3, 3, 0, about, 8, ttl(1)))
			away := udp(at(addr("198.51.100.1"), 5000), at(v1, 4000), "x")
			b.none(vpc, icmpError(v1, 3, 3, 0, away, 8))
			b.note("nothing in both cases")
		}},
		{"1812-4.3.2.7b", "none about later fragments", func(b *bench) {
			p := fragment(udp(at(v1, 4000), at(o1, 5000), "x", ttl(1)), 9, 80, false, []byte(pad(40)))
			b.push(vpc, p)
			b.advance(time.Second)
			b.quiet()
			b.note("nothing")
		}},
		{"1812-4.3.2.7c", "none about broadcast and multicast", func(b *bench) {
			for _, a := range []string{"10.77.1.255", "239.1.1.1"} {
				b.none(vpc, udp(at(v1, 4000), at(addr(a), 5000), "x", ttl(1)))
			}
			b.noneFrames(overlay, append(ethernet(broadcast, playerMAC(o1), 0x0800), udp(at(o1, 5000), at(ro, 4000), "x", ttl(1))...))
			b.note("subnet broadcast, multicast, broadcast frame: nothing")
		}},
		{"1812-4.3.2.7d", "none to what is not one host", func(b *bench) {
			for _, a := range []string{"0.0.0.0", "127.0.0.1", "224.0.0.5", "255.255.255.255", "10.77.1.255"} {
				b.none(vpc, udp(at(addr(a), 4000), at(o1, 5000), "x", ttl(1)))
			}
			b.note("nothing for all five")
		}},
		{"1812-4.3.2.7e", "none about broken headers", func(b *bench) {
			for _, p := range broken(ttl(1)) {
				b.none(vpc, p)
			}
			b.note("nothing")
		}},
		{"1812-4.3.2.8", "rate limit of errors", func(b *bench) {
			packets := make([][]byte, 5000)
			for i := range packets {
				packets[i] = udp(at(v1, 10000+i), at(o1, 33434), "x", ttl(1))
			}
			v, _ := b.push(vpc, packets...)
			if len(v) == 0 || len(v) > 500 {
				b.failf("%d errors for 5000 packets", len(v))
			}
			for i := range 10 {
				b.advance(200 * time.Millisecond)
				b.outErr(ping(v2, o1, 7, uint16(i), "mtr", ttl(1)), 11, 0)
			}
			b.note("%d errors for 5000; another host's 10 probes all answered", len(v))
		}},
		{"1812-4.3.3.3", "no source quench", func(b *bench) {
			packets := make([][]byte, 5000)
			for i := range packets {
				packets[i] = udp(at(v1, 1024+i), at(o1, 5000), pad(1400))
			}
			v, o := b.push(vpc, packets...)
			for _, p := range append(v, o...) {
				if p.proto == protoICMP && p.typ == 4 {
					b.failf("source quench: %s", p)
				}
			}
			b.note("none in %d packets", len(v)+len(o))
		}},
	}
}

// ipv4Local: RFC 1812 sections 4.3.3 and 5.2.7: echo, unreachable and redirect.
func ipv4Local() []row {
	return []row{
		{"1812-4.3.3.6", "echo to the gateway", func(b *bench) {
			for _, a := range []netip.Addr{rv, ro} {
				b.answers(vpc, ping(v1, a, 7, 1, pad(56)))
				b.answers(vpc, cut(ping(v1, a, 7, 2, pad(4000)), 77, 1480)...)
			}
			b.answers(overlay, ping(o1, ro, 7, 1, pad(56)))
			b.answers(overlay, cut(ping(o1, ro, 7, 2, pad(4000)), 78, 1480)...)
			b.note("Rv and Ro from the VPC, Ro from the overlay, 56 and 4000 bytes")
		}},
		{"1812-4.3.3.6b", "broadcast echo", func(b *bench) {
			b.none(vpc, ping(v1, addr("10.77.1.255"), 7, 1, "x"))
			b.noneFrames(overlay, append(ethernet(broadcast, playerMAC(o1), 0x0800), ping(o1, addr("10.77.100.255"), 7, 1, "x")...))
			b.note("silent on both sides")
		}},
		{"1812-5.2.7.1", "codes of unreachable", func(b *bench) {
			b.start(func(s *setup) {
				s.engine = func(c *netstack.Config) {
					c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, To: []netip.Prefix{prefix("10.77.201.0/24")}}})
				}
			})
			b.engineOnly()
			b.outErr(udp(at(v1, 4000), at(addr("198.51.100.1"), 5000), "x"), 3, 0)
			b.outErr(udp(at(v1, 4000), at(addr("10.77.201.5"), 5000), "x"), 3, 13)
			b.outErr(udp(at(v1, 4000), at(rv, 5999), "x"), 3, 3)
			b.outErr(ipPacket(v1, rv, 253, []byte("unknown!")), 3, 2)
			v, _ := b.push(vpc, tcp(at(v1, 4000), at(rv, 5999), segment{flags: syn, seq: 7}))
			if len(v) != 1 || v[0].proto != protoTCP || v[0].tcp().Flags()&rst == 0 {
				b.failf("SYN to a closed port: %s", list(v))
			}
			b.push(vpc, udp(at(v1, 4001), at(ox, 5000), "x"))
			got := b.await(vpc, 8)
			if len(got) != 1 || got[0].typ != 3 || got[0].code != 1 || got[0].quoted().from() != at(v1, 4001) {
				b.failf("silent neighbour: want 3/1 about %s:4001, got %s", v1, list(got))
			}
			b.note("no route 3/0, policy 3/13, port 3/3, protocol 3/2, silent neighbour 3/1, closed TCP port RST")
		}},
		{"1812-5.2.7.1n", "errors show no inside address", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			seen := f.answer()
			e := b.out(icmpError(addr("10.77.1.9"), 3, 1, 0, seen.b, 8)) // the VPC's router: host unreachable
			want(b, "source", e.src, ro)
			want(b, "quoted destination", e.quoted().to(), f.ext)
			b.start(func(s *setup) { s.forwards = []forward{{protoTCP, at(ro, 9060), at(addr("10.77.1.66"), 60)}} })
			got := b.in(tcp(at(o1, 7000), at(ro, 9060), segment{flags: syn, seq: 1}))
			e = b.out(icmpError(addr("10.77.1.9"), 3, 1, 0, got.b, 8))
			want(b, "source", e.src, ro)
			want(b, "quoted destination", e.quoted().to(), at(ro, 9060))
			b.note("3/1 from %s, quoted %s", e.src, e.quoted().to())
		}},
		{"1812-5.2.7.2", "no redirects", func(b *bench) {
			v, o := b.push(vpc, udp(at(v1, 4000), at(v2, 5000), "x"))
			for _, p := range v {
				if p.proto == protoICMP && p.typ == 5 {
					b.failf("redirect: %s", p)
				}
			}
			want(b, "packets on the overlay", len(o), 0)
			b.note("no redirect; the VPC saw %s", list(v))
		}},
	}
}

// ipv4Addresses: RFC 1812 section 5.3: addresses that aren't forwarded.
func ipv4Addresses() []row {
	return []row{
		{"1812-5.3.7s", "martian sources", func(b *bench) {
			for _, a := range []string{"0.1.2.3", "127.0.0.1", "224.0.0.5", "255.255.255.255", "240.0.0.1", "169.254.1.1", "10.77.1.255"} {
				b.none(vpc, udp(at(addr(a), 4000), at(o1, 5000), "x"))
				b.none(overlay, udp(at(addr(a), 4000), at(ro, 5000), "x"))
			}
			b.note("seven sources from both sides dropped, counted")
		}},
		{"1812-5.3.7d", "martian destinations", func(b *bench) {
			for _, a := range []string{"0.0.0.1", "127.0.0.1", "240.0.0.1", "169.254.169.254"} {
				b.none(vpc, udp(at(v1, 4000), at(addr(a), 5000), "x"))
				b.none(overlay, udp(at(o1, 4000), at(addr(a), 5000), "x"))
			}
			b.note("none forwarded from either side, metadata address among them")
		}},
		{"1812-5.3.7o", "own addresses and land packets", func(b *bench) {
			b.ready()
			for _, a := range []netip.Addr{rv, ro} {
				b.none(vpc, udp(at(a, 4000), at(o1, 5000), "x"))
				b.none(overlay, udp(at(a, 4000), at(ro, 5000), "x"))
			}
			b.none(vpc, udp(at(v1, 4000), at(v1, 4000), "land"))
			b.none(vpc, tcp(at(o1, 80), at(o1, 80), segment{flags: syn}))
			b.none(vpc, udp(at(rv, 4000), at(rv, 4000), "land"))
			b.none(overlay, udp(at(ro, 4000), at(ro, 4000), "land"))
			b.note("own addresses and land packets dropped, counted")
		}},
		{"1812-5.3.8", "source validation", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o2, 5000))
			b.none(vpc, udp(at(addr("203.0.113.9"), 4000), at(o1, 5000), "x"))
			b.none(vpc, udp(at(o2, 4000), at(o1, 5000), "x"))
			b.none(overlay, udp(at(v1, 4000), at(ro, 5000), "x"))
			b.noneFrames(overlay, append(ethernet(routerMAC, playerMAC(o1), 0x0800), udp(at(o2, 5000), f.ext, "x")...))
			f.answer()
			b.note("foreign source and overlay source from the VPC, VPC source and another member's from the overlay")
		}},
		{"1812-5.3.4", "unicast in a broadcast frame", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.noneFrames(overlay, append(ethernet(broadcast, playerMAC(o1), 0x0800), f.reply()...))
			f.answer()
			b.note("not forwarded")
		}},
		{"1812-5.3.5", "broadcasts", func(b *bench) {
			for _, a := range []string{"255.255.255.255", "10.77.100.255", "10.77.1.255"} {
				b.none(vpc, udp(at(v1, 4000), at(addr(a), 5000), "x"))
				b.none(overlay, udp(at(o1, 4000), at(addr(a), 5000), "x"))
				b.noneFrames(overlay, append(ethernet(broadcast, playerMAC(o1), 0x0800), udp(at(o1, 4000), at(addr(a), 5000), "x")...))
			}
			b.note("none forwarded, counted")
		}},
		{"1812-4.2.3.2", "multicast", func(b *bench) {
			for _, a := range []string{"224.0.0.1", "224.0.0.251", "239.1.1.1"} {
				b.none(vpc, udp(at(v1, 5353), at(addr(a), 5353), "x"))
				m := mac{0x01, 0x00, 0x5e, addr(a).As4()[1] & 127, addr(a).As4()[2], addr(a).As4()[3]}
				b.noneFrames(overlay, append(ethernet(m, playerMAC(o1), 0x0800), udp(at(o1, 5353), at(addr(a), 5353), "x")...))
			}
			b.note("none, counted")
		}},
	}
}

// ipv4Options: RFC 1812: options.
func ipv4Options() []row {
	return []row{
		{"1812-4.2.2.6", "unknown options", func(b *bench) {
			for name, o := range map[string][]byte{"0x9e": {0x9e, 4, 1, 2}, "NOP EOL": {1, 1, 1, 0}, "router alert": {148, 4, 0, 0}} {
				sent := udp(at(v1, 4000), at(o1, 5000), "x", options(o...))
				got := b.out(sent)
				want(b, name, string(got.b[20:24]), string(o))
				want(b, name+": outside end", got.from(), at(ro, 4000))
			}
			b.note("0x9e, NOP and EOL, router alert unchanged, port found")
		}},
		{"1812-5.3.13.4", "source routes", func(b *bench) {
			for _, kind := range []byte{131, 137} {
				o := options(kind, 7, 4, 10, 77, 100, 51)
				b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "x", o))
				b.none(vpc, ping(v1, rv, 7, 1, "x", o))
				b.none(overlay, ping(o1, ro, 7, 1, "x", o))
			}
			b.note("LSRR and SSRR dropped in transit and to Rv")
		}},
		{"1812-5.3.13.5", "record route and timestamp", func(b *bench) {
			rr := []byte{7, 15, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
			got := b.out(udp(at(v1, 4000), at(o1, 5000), "x", options(rr...)))
			if strings.Contains(string(got.b[20:36]), string(rv.AsSlice())) {
				b.failf("record route shows the inside address")
			}
			ts := []byte{68, 12, 5, 1, 0, 0, 0, 0, 0, 0, 0, 0}
			got = b.out(udp(at(v1, 4000), at(o1, 5000), "x", options(ts...)))
			if strings.Contains(string(got.b[20:32]), string(rv.AsSlice())) {
				b.failf("timestamp shows the inside address")
			}
			v, o := b.push(vpc, udp(at(v1, 4000), at(o1, 5000), "x", options(7, 0, 4, 0)))
			if len(o) != 0 || len(v) > 1 || len(v) == 1 && (v[0].typ != 12 || v[0].code != 0) {
				b.failf("option of length 0: on the overlay %s, at the VPC %s", list(o), list(v))
			}
			b.note("pass without an inside address; malformed: %s", list(v))
		}},
	}
}

// ipv4Fields: RFC 1812, 6864, 791 and 1191: fields, fragments and MTU.
func ipv4Fields() []row {
	return []row{
		{"1812-5.3.2", "DSCP and ECN", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for n := range 256 {
				want(b, "TOS out", b.out(udp(f.in, f.out, "x", tos(uint8(n)))).tos, uint8(n))
				want(b, "TOS in", b.in(udp(f.out, f.ext, "x", tos(uint8(n)))).tos, uint8(n))
			}
			b.note("256 of 256 unchanged, both ways")
		}},
		{"1812-4.2.2.3", "reserved flag", func(b *bench) {
			reserved := func(p []byte) []byte { p[6] |= 0x80; return p }
			want(b, "flags", b.out(udp(at(v1, 4000), at(o1, 5000), "x", reserved)).flags, 4)
			b.note("kept")
		}},
		{"6864-a", "identification", func(b *bench) {
			want(b, "ID", b.out(udp(at(v1, 4000), at(o1, 5000), "x", ipid(0xbeef), df)).id, 0xbeef)
			p := b.out(udp(at(v1, 4000), at(o1, 5000), "x", ipid(0), df))
			want(b, "ID", p.id, 0)
			want(b, "flags", p.flags, 2)
			b.note("both kept")
		}},
		{"1812-5.2.3", "packets for the gateway itself", func(b *bench) {
			b.start()
			b.engineOnly()
			n := b.scale(60_000)
			b.fillPorts(protoUDP, v1, at(o1, 5000), 1024, 1024+n-1)
			b.outErr(udp(at(v2, 4000), at(rv, 5999), "x"), 3, 3)
			b.outErr(udp(at(v2, 4000), at(ro, 800), "x"), 3, 3)
			b.answers(vpc, ping(v2, rv, 7, 1, "x"))
			b.note("3/3 and echo with %d mappings", n)
		}},
		{"791-tiny", "tiny and overlapping fragments", func(b *bench) {
			s := tcp(at(v1, 4000), at(o1, 80), segment{flags: syn, seq: 1})
			parts := split(s, 5, 8)
			_, o := b.push(vpc, parts...)
			if len(o) > 0 {
				w := reassemble(o)
				if w == nil || w.from() != at(ro, 4000) || w.sumsRight() != nil {
					b.failf("tiny fragments: %s", list(o))
				}
			}
			ok := tcp(at(v1, 4001), at(o1, 80), segment{flags: ack, seq: 1, data: pad(40)})
			first := fragment(ok, 6, 0, true, ok[20:20+24])
			evil := fragment(ok, 6, 8, false, []byte(pad(40)))
			_, o2 := b.push(vpc, first, evil)
			for _, p := range o2 {
				if p.off == 8 {
					b.failf("the overlapping fragment passed: %s", list(o2))
				}
			}
			b.note("split after 8 bytes: %d out; overlapping flags: dropped", len(o))
		}},
		{"1191-a", "MTU changes while running", func(b *bench) {
			b.start(func(s *setup) { s.network.MTU, s.vpcMTU = 2800, 9001 })
			e := b.engineOnly()
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			big := tcp(f.in, f.out, segment{flags: ack | psh, seq: f.iss, ack: f.irs, data: pad(2760)}, df)
			b.out(big)
			want(b, "MTU", b.outErr(tcp(f.in, f.out, segment{flags: ack, seq: f.iss, ack: f.irs, data: pad(8000)}, df), 3, 4).mtu, 2800)
			n := b.setup.network
			n.MTU = 1400
			if err := e.engine.SetNetworks([]netstack.Network{n}); err != nil {
				b.failf("new MTU: %v", err)
			}
			want(b, "MTU after the change", b.outErr(big, 3, 4).mtu, 1400)
			f.iss += 2760
			f.talk()
			b.note("2800, then 1400; the flow goes on")
		}},
	}
}

// answers sends an echo request, whole or in fragments, to the router and wants
// its reply.
func (b *bench) answers(from side, parts ...[]byte) {
	b.t.Helper()
	v, o := b.push(from, parts...)
	if from == overlay {
		v, o = o, v
	}
	if len(o) != 0 || len(v) == 0 {
		b.failf("echo from the %s: %s: answer %s, other side %s", from, parse(parts[0]), list(v), list(o))
	}
	var asked []*packet
	for _, p := range parts {
		asked = append(asked, parse(p))
	}
	q, r := reassemble(asked), reassemble(v)
	if r == nil || r.typ != 0 && r.typ != 129 || r.src != q.dst || r.dst != q.src || r.sport != q.sport || r.seq != q.seq || !bytes.Equal(r.payload, q.payload) {
		b.failf("echo from the %s: %s: answer %s", from, q, list(v))
	}
}

// scale makes a load smaller where tests must be short.
func (b *bench) scale(n int) int {
	if b.short {
		return n / 20
	}
	return n
}
