package conformance

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// sumECN: RFC 3168 and 6040: ECN and DSCP.
func sumECN() []row {
	return []row{
		{"3168-a", "ECN forwarded", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			for n := range 4 {
				want(b, "ECN out", b.out(udp(f.in, f.out, "x", tos(uint8(n)))).tos, uint8(n))
				want(b, "ECN in", b.in(udp(f.out, f.ext, "x", tos(uint8(n)))).tos, uint8(n))
			}
			b.note("unchanged")
		}},
		{"3168-5.3", "ECN of fragments", func(b *bench) {
			const notECT, ect1, ect0, ce = 0, 1, 2, 3
			var got []string
			for i, c := range [][2]uint8{{ect0, ce}, {ect0, ect1}, {notECT, ce}, {ect0, notECT}} {
				parts := split(udp(at(v1, 4000+i), at(o1, 5000), pad(1000)), uint32(0x50+i), 800)
				parts[0], parts[1] = with(parts[0], tos(c[0])), with(parts[1], tos(c[1]))
				_, o := b.push(vpc, parts...)
				var out []uint8
				for _, p := range o {
					out = append(out, p.tos&3)
				}
				got = append(got, fmt.Sprint(out))
				switch own := len(out) == 2 && out[0] == c[0] && out[1] == c[1]; {
				case own || len(out) == 0 && i >= 2: // fragments with their own bits, or dropped
				case i == 0 && len(out) > 0 && out[0] == ce && out[len(out)-1] == ce:
				case i == 1 && len(out) > 0 && out[0] != ce && out[0] != notECT:
				default:
					b.failf("%v came out as %v", c, out)
				}
			}
			b.note("%s", strings.Join(got, " "))
		}},
		{"3168-TCP", "ECN negotiation", func(b *bench) {
			p := tcp(at(v1, 4000), at(o1, 80), segment{flags: syn | 0xc0, seq: 1})
			sameSegment(b, p, b.out(p))
			r := tcp(at(o1, 80), at(ro, 4000), segment{flags: syn | ack | 0x40, seq: 9, ack: 2})
			sameSegment(b, r, b.in(r))
			b.note("passes both ways")
		}},
		{"6040-a", "ECN of the tunnel", realHosts},
		{"6040-b", "DSCP of the tunnel", realHosts},
	}
}

// sumChecksums: checksums.
func sumChecksums() []row {
	return []row{
		{"CK-UDP0", "UDP checksum zero", func(b *bench) {
			zero := func(p []byte) []byte { p[26], p[27] = 0, 0; return p }
			p := b.out(udp(at(v1, 4000), at(o1, 5000), "x", zero))
			want(b, "out", binary.BigEndian.Uint16(p.b[26:]), 0)
			q := b.in(udp(at(o1, 5000), p.from(), "x", zero))
			want(b, "in", binary.BigEndian.Uint16(q.b[26:]), 0)
			b.note("0 and 0")
		}},
		{"CK-FFFF", "sum of zero", func(b *bench) {
			// The payload makes the sum of what leaves zero: it must be sent as 0xffff.
			out := udp(at(ro, 4000), at(o1, 5000), "\x00\x00")
			fill := binary.BigEndian.Uint16(out[26:])
			p := udp(at(v1, 4000), at(o1, 5000), string([]byte{byte(fill >> 8), byte(fill)}))
			want(b, "translated sum", binary.BigEndian.Uint16(b.out(p).b[26:]), 0xffff)
			in := udp(at(v1, 4000), at(o1, 5000), "\x00\x00")
			fill = binary.BigEndian.Uint16(in[26:])
			p = udp(at(v1, 4000), at(o1, 5000), string([]byte{byte(fill >> 8), byte(fill)}))
			want(b, "original sum", binary.BigEndian.Uint16(p[26:]), 0xffff)
			b.out(p) // its checksum is checked on the way
			b.note("0xffff; 0xffff in comes out right")
		}},
		{"CK-BAD", "wrong sums never repaired", func(b *bench) {
			b.allow = true
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			wrong := map[string][2][]byte{
				"UDP":   {udp(f.in, f.out, "x", badSum), udp(f.out, f.ext, "x", badSum)},
				"TCP":   {tcp(at(v1, 4000), at(o1, 80), segment{flags: syn, seq: 1}, badSum), nil},
				"echo":  {ping(v1, o1, 7, 1, "x", badSum), nil},
				"error": {nil, icmpError(o1, 3, 3, 0, f.seen(), 8, badSum)},
			}
			for name, c := range wrong {
				for s, p := range c {
					if p == nil {
						continue
					}
					before := b.accounted()
					v, o := b.push(side(s), p)
					for _, x := range append(v, o...) {
						if x.sumsRight() == nil {
							b.failf("%s from the %s with a wrong checksum came out repaired: %s", name, side(s), x)
						}
					}
					if len(v)+len(o) == 0 {
						b.counted(before, 1, side(s), [][]byte{b.frame(p)})
					}
				}
			}
			b.note("dropped and counted, or still wrong")
		}},
		{"CK-OFFLOAD", "offloads", realHosts},
		{"CK-SWEEP", "every size", func(b *bench) {
			f := b.udpFlow(at(v1, b.port()), at(o1, 5000))
			sizes := append(seq(0, 63), 511, 512, 513, 1023, 1279, 1280, 1399, 1400, 1471, 1472)
			for _, n := range sizes {
				data := b.random(n)
				want(b, "out", string(b.out(udp(f.in, f.out, data)).payload), data)
				want(b, "in", string(b.in(udp(f.out, f.ext, data)).payload), data)
			}
			b.note("%d sizes, 0 wrong", len(sizes))
		}},
		{"CK-LEN", "UDP lengths", func(b *bench) {
			length := func(n uint16) edit {
				return func(p []byte) []byte { binary.BigEndian.PutUint16(p[24:], n); return p }
			}
			b.allow = true
			b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "some payload", length(200)))
			b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "some payload", length(4)))
			short := udp(at(v1, 4000), at(o1, 5000), "some payload", length(9))
			binary.BigEndian.PutUint16(short[26:], 0)
			b.out(short)
			b.allow = false
			b.push(vpc, udp(at(v1, 0), at(o1, 5000), "x"))
			b.push(vpc, udp(at(v1, 4000), at(o1, 0), "x"))
			want(b, "empty payload", len(b.out(udp(at(v1, 4001), at(o1, 5000), "")).payload), 0)
			b.note("200 and 4 dropped, 9 passed, ports 0 don't crash, empty payload passes")
		}},
	}
}
