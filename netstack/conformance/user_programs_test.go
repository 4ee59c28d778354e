package conformance

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"ztgate/internal/testwait"
	"ztgate/netstack"
)

// realHosts marks rows that only programs on real hosts can show; the mode e2e
// runs them.
func realHosts(b *bench) { panic(notHere("needs real hosts: make conformance runs it in namespaces")) }

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
			f.answer()
			want(b, "outside end", f.send().from(), f.ext)
			f.answer()
			b.note("the flow is back on its port after a restart, at the first packet from either side")
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
		{"L-ICMP-SEQ", "quoted sequence number", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			quote := func(seq uint32) []byte { return tcp(f.ext, f.out, segment{flags: psa8, seq: seq, ack: f.irs}) }
			for _, off := range []uint32{1, 1 << 20, 1 << 31, ^uint32(0) - 1<<20} {
				b.none(overlay, icmpError(o1, 3, 3, 0, quote(f.iss+off), 8))
			}
			translated(b, b.in(icmpError(o1, 3, 3, 0, quote(f.iss), 8)), f, o1, 3, 3)
			b.note("dropped, counted")
		}},
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
		b.advance(time.Second)
		if testwait.Poll(100*time.Millisecond, func() bool { b.push(vpc); return ended() >= 10_000 }) {
			break
		}
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
