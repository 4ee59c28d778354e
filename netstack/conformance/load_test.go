package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

// loads are the loads and faults of docs/nat.md that need no overlay node and no
// real host.
var loads = []struct {
	id  string
	run func(*bench)
}{
	{"LF-1", newFlows}, {"LF-2", concurrentFlows}, {"LF-3", packetSizes}, {"LF-4", manyHosts}, {"LF-5", reordering},
	{"LF-7", duplicates}, {"LF-11", peerGone}, {"LF-16", clockJump}, {"LF-17", stopped}, {"LF-23", fragmentFlood}, {"LF-24", icmpFlood},
	{"LF-25", malformedStorm}, {"LF-26", portScan}, {"LF-27", day},
}

// TestLoad runs the loads one after the other, since they measure.
func TestLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("loads take long")
	}
	mk := func(t *testing.T, s setup) router { return newEngineRouter(t, s) }
	for i, l := range loads {
		t.Run(l.id, func(t *testing.T) {
			q := requirement{n: 1000 + i, id: l.id, level: "load", here: "yes"}
			v, evidence := runFunc(t, q, mk, l.run)
			loadReport.add(q, v, evidence)
			switch {
			case v == fails && knownFailures[l.id] != "" && !*strict:
				t.Skipf("known: %s: %s", knownFailures[l.id], evidence)
			case v == fails:
				t.Error(evidence)
			case v == skipped:
				t.Skip(evidence)
			}
			t.Log(evidence)
		})
	}
}

// probe is V2's flow that must not lose anything.
func (b *bench) probeFlow() func() {
	f, c := b.udpFlow(at(v2, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v2, 4000), at(o1, 80))
	return func() {
		b.t.Helper()
		f.send()
		f.answer()
		c.talk()
	}
}

func (b *bench) liveFlows() int {
	return len(b.r.(*engineRouter).engine.Flows(netstack.FlowFilter{}))
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// engineTime is how long the engine takes for frames that are built beforehand.
func (b *bench) engineTime(frames [][]byte) time.Duration {
	start := time.Now()
	b.r.inject(vpc, frames)
	d := time.Since(start)
	b.r.take(overlay)
	b.r.take(vpc)
	return d
}

func newFlows(b *bench) {
	limit := b.scale(262_144)
	for _, proto := range []uint8{protoUDP, protoTCP} {
		b.start(func(s *setup) { s.maxFlows = limit })
		probe := b.probeFlow()
		base := heap()
		n, busy, free := b.scale(160_000), time.Duration(0), time.Duration(0)
		if !*strict {
			n /= 4
		}
		plenty := min(n, 40_000) // while ports are left
		for i := 0; i < n; i += 2000 {
			frames := make([][]byte, 2000)
			for j := range frames {
				from, to := at(addr(fmt.Sprintf("10.77.1.%d", 60+b.rng.IntN(180))), 1024+b.rng.IntN(64000)), at(o2, 1+b.rng.IntN(65534))
				p := udp(from, to, "x")
				if proto == protoTCP {
					p = tcp(from, to, segment{flags: syn, seq: 1})
				}
				frames[j] = b.frame(p)
			}
			d := b.engineTime(frames)
			if i < plenty {
				free += d
			} else {
				busy += d
			}
			probe()
		}
		live, grown := b.liveFlows(), int64(heap())-int64(base)
		if live > limit {
			b.failf("%d flows in a table of %d", live, limit)
		}
		b.advance(2 * 250 * time.Second)
		testwait.Poll(20*time.Second, func() bool { return b.liveFlows() <= 1 })
		if left := b.liveFlows(); left > 2 {
			b.failf("%d flows left after twice the timers", left)
		}
		b.note("protocol %d: %.0f k new flows/s", proto, float64(plenty)/free.Seconds()/1000)
		if n > plenty {
			b.note("%.0f k/s of %d more with the ports used up", float64(n-plenty)/busy.Seconds()/1000, n-plenty)
		}
		b.note("%d held, heap +%d MB, probe lost 0, back to base", live, grown>>20)
	}
}

func concurrentFlows(b *bench) {
	const perHost = 20_000
	n := b.scale(60_000)
	id := func(i int) (netip.AddrPort, netip.AddrPort) {
		return at(addr(fmt.Sprintf("10.77.1.%d", 60+i/perHost)), 1024+i%perHost), at(o1, 5000)
	}
	back := make(map[uint16]int, n)
	for i := 0; i < n; i += 1000 {
		var out [][]byte
		for j := i; j < i+1000; j++ {
			from, to := id(j)
			out = append(out, udp(from, to, fmt.Sprint(j)))
		}
		_, o := b.push(vpc, out...)
		want(b, "packets out", len(o), 1000)
		for _, p := range o {
			var j int
			if _, err := fmt.Sscan(string(p.payload), &j); err != nil {
				b.failf("payload %q", p.payload)
			}
			if old, ok := back[p.sport]; ok {
				b.failf("flows %d and %d share port %d", old, j, p.sport)
			}
			back[p.sport] = j
		}
	}
	var in [][]byte
	flush := func() {
		v, _ := b.push(overlay, in...)
		want(b, "packets in", len(v), len(in))
		for _, p := range v {
			var j int
			_, _ = fmt.Sscan(string(p.payload), &j)
			from, _ := id(j)
			want(b, fmt.Sprintf("flow %d", j), p.to(), from)
		}
		in = in[:0]
	}
	for port, j := range back {
		if in = append(in, udp(at(o1, 5000), at(ro, int(port)), fmt.Sprint(j))); len(in) == 1000 {
			flush()
		}
	}
	flush()
	b.note("%d flows at once, each checked both ways by its payload", n)
}

func packetSizes(b *bench) {
	b.start(func(s *setup) { s.vpcMTU = 3000 })
	f := b.udpFlow(at(v1, 4000), at(o1, 5000))
	for _, n := range []int{40, 64, 576, 1280, 1400, 1500} {
		want(b, "length out", len(b.out(udp(f.in, f.out, pad(n-28))).b), n)
		want(b, "length in", len(b.in(udp(f.out, f.ext, pad(n-28))).b), n)
	}
	b.outErr(udp(f.in, f.out, pad(1501-28), df), 3, 4)
	var mix [][]byte
	for range 1000 {
		for _, c := range [][2]int{{7, 40}, {4, 576}, {1, 1500}} {
			for range c[0] {
				mix = append(mix, udp(f.in, f.out, pad(c[1]-28)))
			}
		}
	}
	start := time.Now()
	_, o := b.push(vpc, mix...)
	want(b, "IMIX packets out", len(o), len(mix))
	b.answers(vpc, ping(v2, rv, 7, 1, "still there"))
	b.note("40 to 1500 pass, 1501 with DF gets 3/4; IMIX %d of %d (with the players' checks %.0f k/s)", len(o), len(mix), float64(len(mix))/time.Since(start).Seconds()/1000)
}

func manyHosts(b *bench) {
	const each = 64
	b.start(func(s *setup) { s.portsPerClient = each })
	hosts, got := 400, map[int]int{}
	for h := range hosts {
		from := addr(fmt.Sprintf("10.77.%d.%d", 1+h/200, 10+h%200))
		var ps [][]byte
		for i := range 100 {
			ps = append(ps, udp(at(from, 10_000+i), at(o1, 5000), "x"))
		}
		_, o := b.push(vpc, ps...)
		got[len(o)]++
	}
	want(b, fmt.Sprintf("hosts with %d flows", each), got[each], hosts)
	b.note("%d hosts x 100 flows: each got its %d", hosts, each)
}

func reordering(b *bench) {
	for _, percent := range []int{5, 25} {
		payload := b.random(8000)
		for i := range 200 {
			parts := cut(udp(at(v1, 4000+i), at(o1, 5000), payload), uint32(i+percent*1000), 1480)
			for j := range parts[1:] {
				if b.rng.IntN(100) < percent {
					parts[j], parts[j+1] = parts[j+1], parts[j]
				}
			}
			_, o := b.push(vpc, parts...)
			b.whole(o, at(ro, 4000+i), payload)
		}
		f := b.established()
		var segs [][]byte
		for range 200 {
			segs = append(segs, f.outSeg(psa, pad(1000)))
			if n := len(segs); n > 1 && b.rng.IntN(100) < percent {
				segs[n-1], segs[n-2] = segs[n-2], segs[n-1]
			}
		}
		for i := 0; i < len(segs); i += 20 {
			_, o := b.push(vpc, segs[i:i+20]...)
			want(b, "segments out", len(o), 20)
			b.in(tcp(f.out, f.ext, segment{flags: ack, seq: f.irs, ack: f.iss - uint32(len(segs)-i-20)*1000}))
		}
	}
	b.note("5 and 25 %%: 400 datagrams of 6 fragments whole, 400 segments passed")
}

func duplicates(b *bench) {
	var ps [][]byte
	dup := 0
	for i := range 2000 {
		p := udp(at(v1, 10_000+i), at(o1, 5000), "x")
		ps = append(ps, p)
		if b.rng.IntN(5) == 0 {
			ps = append(ps, bytes.Clone(p))
			dup++
		}
	}
	_, o := b.push(vpc, ps...)
	want(b, "packets out", len(o), 2000+dup)
	want(b, "flows", b.liveFlows(), 2000)
	b.note("2000 packets and %d duplicates: %d out, 2000 flows", dup, len(o))
}

func clockJump(b *bench) {
	probe := b.probeFlow()
	for _, d := range []time.Duration{time.Hour, -time.Hour, -90 * time.Second} {
		b.advance(d)
		if d > 0 {
			probe = b.probeFlow() // the UDP flow may have ended meanwhile
		}
		probe()
		b.udpFlow(at(v1, b.port()), at(o1, 5000)).answer()
	}
	b.advance(10 * 365 * 24 * time.Hour)
	b.probeFlow()()
	b.note("+1 h, -1 h, -90 s, +10 years: flows go on or are opened again, no panic")
}

func stopped(b *bench) {
	n := b.scale(50_000)
	b.ready()
	c := b.tcpFlow(at(v2, 4000), at(o1, 80))
	b.fillPorts(protoUDP, v1, at(o1, 5000), 1024, 1024+n-1)
	for _, d := range []time.Duration{5 * time.Second, time.Minute, 10 * time.Minute} {
		b.advance(d)
		start := time.Now()
		c.talk()
		if took := time.Since(start); took > time.Second {
			b.failf("the first packets after %v took %v", d, took)
		}
		b.quiet()
	}
	b.note("after 5, 60 and 600 s with %d flows: the live one works at once, no storm", n)
}

func fragmentFlood(b *bench) {
	n := b.scale(20_000)
	b.ready()
	for kind := range 3 {
		b.flood(n, func(i int) []byte {
			big := udp(at(addr(fmt.Sprintf("10.77.1.%d", 100+i%100)), 1024+i/100), at(o1, 5000), pad(64))
			parts := split(big, uint32(i), 40)
			switch kind {
			case 0:
				return parts[0]
			case 1:
				return parts[1]
			}
			return fragment(big, uint32(i/2), i%2*32, true, big[20+i%2*32:60])
		})
		for i, v := range []netip.Addr{v1, v2} {
			payload := strings.Repeat("legitimate", 120)
			parts := split(udp(at(v, 4100+i), at(o1, 5000), payload), uint32(0x7000+i+kind*16), 800)
			b.fragments(vpc, parts, []int{1, 0}, at(ro, 4100+i), payload)
		}
	}
	b.note("%d first, %d last, %d overlapping fragments: legitimate pairs pass during each", n, n, n)
}

func icmpFlood(b *bench) {
	b.start(func(s *setup) { s.network.MTU = 1400 })
	probe := b.probeFlow()
	var ps [][]byte
	for i := range 5000 {
		ps = append(ps, udp(at(v1, 1024+i), at(o1, 33434), "x", ttl(1)), udp(at(v1, 1024+i), at(addr("198.51.100.1"), 9), "x"))
	}
	v, _ := b.push(vpc, ps...)
	if len(v) > 1000 {
		b.failf("%d errors for 10 000 packets", len(v))
	}
	b.flood(b.scale(100_000), func(i int) []byte { return ping(v1, o1, uint16(i), 1, "x") })
	probe()
	b.outErr(udp(at(v2, 4001), at(o1, 5000), pad(1472), df), 3, 4)
	b.advance(200 * time.Millisecond)
	b.probe(1, ping(v2, hh, 300, 1, "mtr", ttl(1)))
	b.note("%d errors for 10 000; echo flood; probe, too big and mtr of another host served", len(v))
}

// corpus is one packet of every kind, from both sides.
func corpus(f, c *flow, e *flow) (fromVPC, fromOverlay [][]byte) {
	fromVPC = [][]byte{
		f.outgoing(), tcp(c.in, c.out, segment{flags: ack | psh, seq: c.iss, ack: c.irs, data: "data", opts: append(mssOption(1460), 1, 1, 4, 2)}),
		tcp(at(v1, 999), at(o2, 80), segment{flags: syn, seq: 1, opts: mssOption(1460)}), ping(v1, o1, 9, 1, "abc"),
		icmpError(v1, 3, 3, 0, f.reply(), 8), udp(at(v1, 4000), at(o1, 5000), "x", options(7, 7, 4, 0, 0, 0, 0)),
		udp(at(v16, 4000), at(o16, 5000), "x"), tcp(at(v16, 4000), at(o16, 80), segment{flags: syn}), ping(v16, o16, 7, 1, "x"),
		udp(at(v16, 4000), at(o16, 5000), "x", extension(60, 0, 1, 4, 0, 0, 0, 0)), icmpError(v16, 1, 4, 0, udp(at(o16, 5000), at(v16, 4000), "x"), 8),
		ping(v1, rv, 7, 1, "x"), ping(v16, rv6, 7, 1, "x"),
	}
	fromVPC = append(fromVPC, split(udp(at(v1, 4001), at(o1, 5000), pad(200)), 7, 80, 80)...)
	fromVPC = append(fromVPC, split(udp(at(v16, 4001), at(o16, 5000), pad(200)), 7, 80, 80)...)
	fromOverlay = [][]byte{
		f.reply(), tcp(c.out, c.ext, segment{flags: ack | psh, seq: c.irs, ack: c.iss, data: "data"}), e.pong(),
		icmpError(mm, 11, 0, 0, f.seen(), 8), mplsError(mm, 11, 0, f.seen(), 32), ping(o1, ro, 7, 1, "x"),
		tcp(at(o1, 80), at(ro, 80), segment{flags: syn}), udp(at(o16, 5000), at(v16, 4000), "x"),
		icmpError(mm6, 2, 0, 1300, udp(at(v16, 4000), at(o16, 5000), pad(1300)), 1200), icmp(o16, ro6, 135, 0, 0, append(ro6.AsSlice(), 1, 1, 2, 0, 0, 0, 0, 1), ttl(255)),
	}
	fromOverlay = append(fromOverlay, split(udp(f.out, f.ext, pad(200)), 7, 80, 80)...)
	return fromVPC, fromOverlay
}

// mutate changes a packet in a few places and, mostly, repairs its checksums, so
// that it comes further than the first check.
func (b *bench) mutate(p []byte) []byte {
	p = bytes.Clone(p)
	for range 1 + b.rng.IntN(4) {
		switch b.rng.IntN(6) {
		case 0:
			p = p[:1+b.rng.IntN(len(p))]
		case 1:
			p = append(p, make([]byte, b.rng.IntN(64))...)
		case 2:
			p[b.rng.IntN(len(p))] ^= 1 << b.rng.IntN(8)
		default:
			p[b.rng.IntN(min(len(p), 64))] = byte(b.rng.Uint32())
		}
	}
	if b.rng.IntN(4) == 0 {
		return p
	}
	switch {
	case len(p) >= 40 && isV6(p):
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		if at := sumOffset(p); at > 0 && at+2 <= len(p) {
			_, l4 := l4(p)
			if l4+8 <= len(p) {
				fixTransport(p)
			}
		}
	case len(p) >= 20 && p[0]>>4 == 4:
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		if ihl := int(p[0]&15) * 4; ihl >= 20 && ihl <= len(p) {
			if at := sumOffset(p); at > 0 && at+2 <= len(p) && ihl+8 <= len(p) {
				fixTransport(p)
			}
			fixHeader(p)
		}
	}
	return p
}

// malformedStorm sends mutated packets of all kinds from both sides. What comes
// out may be odd, but never with an inside source on the overlay.
func malformedStorm(b *bench) {
	e := b.engineOnly()
	f, c, p := b.udpFlow(at(v1, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v1, 4000), at(o1, 80)), b.echoFlow(v1, o1, 9)
	probe := b.probeFlow()
	out, in := corpus(f, c, p)
	n := 100_000
	if *strict {
		n = 1_000_000
	}
	n = b.scale(n)
	start, quoting := time.Now(), 0
	for i := 0; i < n; i += 1000 {
		var fv, fo [][]byte
		for range 500 {
			fv = append(fv, append(ethernet(routerMAC, playerMAC(v1), 0x0800), b.mutate(out[b.rng.IntN(len(out))])...))
			q := b.mutate(in[b.rng.IntN(len(in))])
			typ := uint16(0x0800)
			if len(q) > 0 && isV6(q) {
				typ = 0x86dd
			}
			fo = append(fo, append(ethernet(routerMAC, playerMAC(o1), typ), q...))
		}
		e.inject(vpc, fv)
		e.inject(overlay, fo)
		e.settle()
		for _, fr := range e.take(overlay) {
			if len(fr) < ethernetLen+20 || binary.BigEndian.Uint16(fr[12:]) != 0x0800 {
				continue
			}
			for _, pre := range vpcPrefixes[:2] {
				if q := parse(fr[ethernetLen:]); pre.Contains(q.src) {
					b.failf("LEAK: %s", q)
				} else if q.icmpError() && len(q.payload) >= 20 && pre.Contains(q.quoted().src) {
					quoting++
				}
			}
		}
		e.take(vpc)
		if i%20_000 == 0 {
			b.introduce()
			probe()
		}
	}
	panics := 0.0
	for k, v := range e.metrics() {
		if strings.Contains(k, "panics") {
			panics += v
		}
	}
	want(b, "panics of the local stack", panics, 0)
	b.introduce()
	probe()
	b.note("%d packets in %v, no panic, no leak, probe lost 0; %d errors of VPC hosts quoting an address of theirs", n, time.Since(start).Round(time.Millisecond), quoting)
}

func portScan(b *bench) {
	probe := b.probeFlow()
	before := b.liveFlows()
	for first := 1; first < 65536; first += 4096 {
		var ps [][]byte
		for p := first; p < min(first+4096, 65536); p++ {
			ps = append(ps, tcp(at(o1, 55555), at(ro, p), segment{flags: syn, seq: 1}))
		}
		b.none(overlay, ps...)
	}
	want(b, "flows", b.liveFlows(), before)
	probe()
	b.note("65535 SYNs to Ro: no answer, each counted, no entry")
}
