package conformance

import (
	"fmt"
	"net/netip"
)

// userLeaks: nothing leaks, nothing enters.
func userLeaks() []row {
	return []row{
		{"L-LEAK", "no inside source leaves", func(b *bench) {
			b.allow = true // forwarded with a wrong checksum is no leak
			kinds := leakKinds(b)
			for _, p := range kinds {
				before := b.accounted()
				if v, o := b.push(vpc, p); len(v)+len(o) == 0 {
					b.counted(before, 1, vpc, [][]byte{b.frame(p)})
				}
			}
			b.note("%d kinds, none left; the watcher runs in every row", len(kinds))
		}},
		{"L-DIRECT", "inside addresses from outside", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			b.none(overlay, udp(at(o1, 6000), at(v1, 4000), "unsolicited"))
			b.none(overlay, udp(f.out, f.in, "the flow's inside tuple"))
			b.none(overlay, udp(at(v2, 4000), at(v1, 4000), "spoofed"))
			f.answer()
			b.note("all refused, counted")
		}},
	}
}

// userProtocols: protocols without ports (decision D5).
func userProtocols() []row {
	return []row{
		{"L-SCTP", "SCTP", func(b *bench) {
			init := []byte{0x0f, 0xa0, 0x0b, 0x59, 0, 0, 0, 0, 1, 2, 3, 4, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1}
			b.none(vpc, ipPacket(v1, o1, 132, init))
			b.unwanted(ipPacket(o1, ro, 132, init))
			b.note("dropped and counted (D5)")
		}},
		{"L-DCCP", "DCCP", func(b *bench) { otherProtocol(b, 33) }},
		{"L-UDPLITE", "UDP-Lite", func(b *bench) { otherProtocol(b, 136) }},
		{"L-GRE", "GRE", func(b *bench) { otherProtocol(b, 47) }},
		{"L-PPTP", "PPTP", func(b *bench) {
			gre := append([]byte{0x20, 0x01, 0x88, 0x0b, 0, 4, 0, 7}, []byte("data")...)
			b.none(vpc, ipPacket(v1, o1, 47, gre))
			b.note("dropped and counted")
		}},
		{"L-ESP", "ESP and AH", func(b *bench) { otherProtocol(b, 50, 51) }},
		{"L-IPIP", "IP in IP", func(b *bench) { otherProtocol(b, 4, 41) }},
		{"L-PROTO", "other protocols", func(b *bench) { otherProtocol(b, 0, 2, 89, 112, 115, 253, 255) }},
	}
}

// leakKinds are packets that Linux without an invalid-drop rule sends out
// untranslated.
func leakKinds(b *bench) [][]byte {
	ra := icmp(v1, o1, 10, 0, 0, nil)
	out := [][]byte{
		udp(at(v1, 4000), at(o1, 5000), "x", badSum),
		tcp(at(v1, 4000), at(o1, 80), segment{flags: syn}, badSum),
		ping(v1, o1, 7, 1, "x", badSum),
		pong(v1, o1, 7, 1, "x"),
		icmpError(v1, 3, 3, 0, udp(at(o1, 5000), at(v1, 4000), "x"), 8),
		ra,
		ipPacket(v1, o1, 132, append([]byte{0x0f, 0xa0, 0x0b, 0x59, 1, 2, 3, 4, 0, 0, 0, 0}, 0, 3, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)),
		ipPacket(v1, o1, 253, []byte("unknown!")),
	}
	for i, fl := range []int{0, int(rst), int(fin)} {
		out = append(out, tcp(at(v1, 4100+i), at(o1, 80), segment{flags: flagsOf(fl), seq: 1}))
	}
	f := b.established()
	return append(out, tcp(f.in, f.out, segment{flags: ack, seq: f.iss + 3<<28, ack: f.irs, data: "x"}),
		tcp(f.in, f.out, segment{flags: rst, seq: f.iss + 3<<28}))
}

// otherProtocol sends protocols without ports: dropped with a counter, at most
// with an error to the sender.
func otherProtocol(b *bench, protos ...uint8) {
	body := []byte{0, 0, 8, 0, 0x45, 0, 0, 24, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 1, 10, 2, 2, 2, 0, 0, 0, 0}
	for _, p := range protos {
		for _, v := range []netip.Addr{v1, v2} {
			before := b.accounted()
			back, o := b.push(vpc, ipPacket(v, o1, p, body))
			want(b, fmt.Sprintf("protocol %d: packets on the overlay", p), len(o), 0)
			for _, e := range back {
				want(b, "error", [2]uint8{e.typ, e.code}, [2]uint8{3, 2})
			}
			b.counted(before, 1, vpc, [][]byte{b.frame(ipPacket(v, o1, p, body))})
		}
		b.unwanted(ipPacket(o1, ro, p, body))
	}
	b.note("protocols %v dropped and counted (D5)", protos)
}

func (b *bench) accounted() map[string]float64 {
	b.ready()
	return b.r.accounted()
}
