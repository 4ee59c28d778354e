package conformance

import (
	"net/netip"

	"ztgate/netstack"
)

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
				s.shown = true
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
	b.over(vpc, tcp(at(v2, 90), peer, segment{flags: psa8, seq: 6, ack: 2, data: "a stranger"}))
	p := b.out(tcp(at(v1, 90), peer, segment{flags: psa8, seq: 6, ack: 2, data: "inside first"}))
	want(b, "source, masqueraded", p.from(), at(ro, 9050))
	want(b, "destination, masqueraded", p.to(), at(o1, 7000))
	p = b.in(tcp(at(o1, 7000), at(ro, 9050), segment{flags: psa8, seq: 2, ack: 6 + 12, data: "then the peer"}))
	want(b, "peer as the target sees it", p.from(), peer)
	b.note("also with masquerading, where the target knows the peer as %s", peer.Addr())
}
