package conformance

import (
	"time"
)

// established opens a TCP flow with a window of 64240 both ways.
func (b *bench) established() *flow { return b.tcpFlow(at(v1, b.port()), at(o1, 80)) }

// both runs what a row does with a TCP connection in both orientations: opened
// from inside (TA), and from outside through a forward (TB).
func (b *bench) both(row func(f *flow)) {
	b.t.Helper()
	row(b.established())
	row(b.forwarded())
	b.note("TA and TB")
}

// userResets: resets.
func userResets() []row {
	return []row{
		{"L-RST-EXACT", "exact RST", func(b *bench) {
			b.both(func(f *flow) {
				f.pass(overlay, f.inSeg(int(rst), ""))
			})
			b.note("passed")
		}},
		{"L-RST-WIN", "RST in the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				f.pass(overlay, tcp(f.out, f.ext, segment{flags: rst, seq: f.irs + 20000}))
				b.advance(13 * time.Second)
				f.talk()
			})
			b.note("passed, data 13 s later delivered")
		}},
		{"L-RST-OUT", "RST outside the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				b.none(overlay, tcp(f.out, f.ext, segment{flags: rst, seq: f.irs + 1<<30}))
				f.talk()
			})
			b.note("dropped, flow lives")
		}},
		{"L-RST-SYN", "RST for a SYN", func(b *bench) {
			f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			b.none(overlay, tcp(f.out, f.ext, segment{flags: rst | ack, ack: 77777}))
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: rst | ack, ack: 1001}))
			b.note("wrong one dropped, right one passed")
		}},
	}
}

// userSegments: TCP segments.
func userSegments() []row {
	return []row{
		{"L-TCP-OOW", "segments outside the window", func(b *bench) {
			b.both(func(f *flow) {
				f.talk()
				b.none(overlay, tcp(f.out, f.ext, segment{flags: ack, seq: f.irs + 3<<28, ack: f.iss, data: "x"}))
				b.none(vpc, tcp(f.in, f.out, segment{flags: ack, seq: f.iss + 3<<28, ack: f.irs, data: "x"}))
				b.none(overlay, tcp(f.out, f.ext, segment{flags: ack, seq: f.irs, ack: f.iss + 1<<28, data: "x"}))
				f.talk()
			})
			b.note("dropped all three, flow lives")
		}},
		{"L-TCP-PICKUP", "picked up from inside", func(b *bench) {
			f := &flow{b: b, in: at(v1, 4000), out: at(o1, 80), ext: at(ro, 4000), iss: 5000, irs: 7000}
			f.talk()
			b.start(func(s *setup) { s.strictTCP = true })
			b.engineOnly()
			b.over(vpc, tcp(at(v1, 4000), at(o1, 80), segment{flags: ack | psh, seq: 1, ack: 1, data: "x"}))
			b.note("on by default, port preserved; off: RST")
		}},
		{"L-TCP-INMID", "not picked up from outside", func(b *bench) {
			b.none(overlay, tcp(at(o1, 80), at(ro, b.port()), segment{flags: ack, seq: 1, ack: 1}))
			b.over(overlay, tcp(at(o1, 80), at(ro, b.port()), segment{flags: ack | psh, seq: 1, ack: 1, data: "x"}))
			b.note("data: RST; bare acknowledgement: silent")
		}},
		{"L-TCP-FLAGS", "impossible flags", func(b *bench) {
			for i, fl := range impossibleFlags {
				b.none(vpc, tcp(at(v1, 4000+i), at(o1, 80), segment{flags: flagsOf(fl), seq: 1}))
			}
			b.out(tcp(at(v1, 4100), at(o1, 80), segment{flags: psh | ack, seq: 1, ack: 1}))
			b.note("seven dropped and counted, PA accepted as pickup")
		}},
		{"L-TCP-BAD", "broken segments", func(b *bench) {
			b.allow = true
			b.none(vpc, tcp(at(v1, 4000), at(o1, 80), segment{flags: syn, seq: 1}, badSum))
			b.allow = false
			for _, off := range []byte{4, 15} {
				p := tcp(at(v1, 4001), at(o1, 80), segment{flags: syn, seq: 1})
				p[20+12] = off << 4
				b.none(vpc, fixTransport(p))
			}
			b.push(vpc, tcp(at(v1, 4002), at(o1, 80), segment{flags: syn, seq: 1, opts: []byte{2, 0, 5, 180}}))
			b.note("checksum, data offset 4 and 15: dropped, counted; option of length 0 survived")
		}},
		{"L-TCP-OPTS", "segments untouched", func(b *bench) {
			opts := append(mssOption(1360), 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7)
			for i, o := range [][]byte{opts, append(mssOption(536), 34, 10, 1, 2, 3, 4, 5, 6, 7, 8), {30, 12, 0, 0x81, 1, 2, 3, 4, 5, 6, 7, 8},
				append([]byte{19, 18}, []byte("0123456789abcdef")...)} {
				p := tcp(at(v1, 4000+i), at(o1, 80), segment{flags: syn | 0xc0, seq: 0xfffffff0, opts: o, data: pad(i)})
				sameSegment(b, p, b.out(p))
			}
			p := tcp(at(v1, 4100), at(o1, 80), segment{flags: syn, seq: 1})
			p[20+12] |= 0x0e
			sameSegment(b, fixTransport(p), b.out(p))
			b.both(func(f *flow) {
				f.pass(vpc, tcp(f.in, f.out, segment{flags: ack | urg | 0x40, seq: f.iss, ack: f.irs, urgent: 0x1234, window: 77, data: "x"}))
				f.pass(overlay, tcp(f.out, f.ext, segment{flags: ack | urg | 0x40, seq: f.irs, ack: f.iss, urgent: 0x1234, window: 77, data: "x"}))
			})
			b.note("options, sequence numbers, ECE and CWR, reserved bits, urgent pointer identical")
		}},
	}
}

const psa8 = psh | ack

// impossibleFlags are flag sets that open nothing: none, F, SF, SR, FPU, SFRPAU, SAF.
var impossibleFlags = []int{0, 0x01, 0x03, 0x06, 0x29, 0x3f, 0x13}
