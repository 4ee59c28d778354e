package conformance

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

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
			if !testwait.Poll(20*time.Second, func() bool { return b.liveFlows() == 0 }) {
				b.failf("%d of %d entries left after 2 x timer", b.liveFlows(), n)
			}
			b.note("%d entries gone by themselves after 2 x timer", n)
		}},
		{"L-PORT-EXHAUST", "ports used up", func(b *bench) {
			b.engineOnly()
			b.fillLowPorts(at(o1, 5000))
			e := b.outErr(udp(at(v2, 500), at(o1, 5000), "x"), 3, 1)
			want(b, "told", e.dst, v2)
			for i := range 5 {
				b.advance(time.Second)
				b.outErr(udp(at(v2, 501+i), at(o1, 5000), "x"), 3, 1)
			}
			want(b, "existing flow", b.out(udp(at(lowPortHost(700), 700), at(o1, 5000), "x")).sport, 700)
			b.in(udp(at(o1, 5000), at(ro, 700), "x"))
			b.openUDP(at(v2, 4000), at(o1, 5000)) // the other class
			b.openTCP(at(v2, 500), at(o1, 80))
			b.note("low ports used up by answered flows: 3/1 to the sender and counted; existing flows, high ports and TCP fine")
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
			want(b, "RSTs at the VPC", len(v), 1)
			want(b, "segment for the old address", v[0].tcp().Flags()&rst, rst)
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
			f.pass(overlay, f.inSeg(psa, "first"))
			f.talk()
			if b.onlyOutward() {
				b.note("survives at once")
				return
			}
			fw := func(s *setup) { s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}} }
			f = b.forwarded()
			f.talk()
			b.restart(fw)
			f.pass(overlay, f.inSeg(psa, "outside first"))
			f.talk()
			b.note("survives at once, TA and TB")
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

// restart loses the router's state.
func (b *bench) restart(changes ...func(*setup)) {
	if f, ok := b.r.(interface{ flush() }); ok {
		f.flush()
		return
	}
	if r, ok := b.r.(interface{ mappings() []netstack.Mapping }); ok {
		kept := r.mappings()
		changes = append(changes, func(s *setup) { s.mappings = kept })
	}
	b.start(changes...)
	b.push(vpc) // nothing may come out at start
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

// tableAssured fills the table with flows that go on after their answer.
func tableAssured(b *bench) {
	limit := 4000
	b.start(func(s *setup) { s.maxFlows = limit })
	b.engineOnly()
	u, c := b.udpFlow(at(v2, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v2, 4000), at(o1, 80))
	u.send()
	// One after the other when the table is nearly full, so that each is answered before
	// the next one comes.
	for i, n := 0, 0; i < limit; i += n {
		if n = 500; i+n >= limit {
			n = 1
		}
		var out, in, more [][]byte
		for j := i; j < i+n; j++ {
			from := at(addr(fmt.Sprintf("10.77.%d.%d", 1+j%400/200, 52+j%200)), 2000+j)
			out = append(out, udp(from, at(o2, 9), "x"))
			more = append(more, udp(from, at(o2, 9), "more"))
		}
		_, got := b.push(vpc, out...)
		for _, p := range got {
			in = append(in, udp(at(o2, 9), p.from(), "y"))
		}
		b.push(overlay, in...)
		b.push(vpc, more[:len(got)]...)
	}
	b.advance(2 * time.Second)
	refused := 0
	for i := range 20 { // the last entries are for hosts with few
		b.advance(time.Second)
		v, o := b.push(vpc, udp(at(v2, 6000+i), at(o3, 9), "new"))
		if len(o) == 1 {
			b.push(overlay, udp(at(o3, 9), o[0].from(), "y"))
			b.push(vpc, udp(at(v2, 6000+i), at(o3, 9), "more"))
		} else {
			refused++
			if len(v) != 1 || v[0].typ != 3 || v[0].code != 1 {
				b.failf("a refused new flow: want 3/1, got %s", list(v))
			}
		}
	}
	if refused < 10 {
		b.failf("new flows pass at a full table of answered ones")
	}
	u.answer()
	c.talk()
	b.note("%d of 20 new ones refused with 3/1, answered flows untouched", refused)
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
