package conformance

import (
	"bytes"
	"encoding/binary"
	"strings"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztgate/netstack"
)

func flagsOf(n int) header.TCPFlags { return header.TCPFlags(n) }

func finLen(flags int) uint32 {
	n := uint32(0)
	if flagsOf(flags)&fin != 0 {
		n++
	}
	if flagsOf(flags)&syn != 0 {
		n++
	}
	return n
}

// sameSegment checks that only addresses, ports, TTL and checksums changed.
func sameSegment(b *bench, sent []byte, got *packet) {
	b.t.Helper()
	mask := func(p []byte) []byte {
		p = bytes.Clone(p)
		_, at := l4(p)
		if isV6(p) {
			p[7] = 0
			clear(p[8:40])
		} else {
			p[8], p[10], p[11] = 0, 0, 0
			clear(p[12:20])
		}
		clear(p[at : at+4])
		clear(p[sumOffset(p) : sumOffset(p)+2])
		return p
	}
	if x, y := mask(sent), mask(got.b); !bytes.Equal(x, y) {
		i := 0
		for i < min(len(x), len(y)) && x[i] == y[i] {
			i++
		}
		b.failf("%s came out changed at byte %d (%d and %d bytes): %s", parse(sent), i, len(x), len(y), got)
	}
}

// pass sends a segment and checks that it comes out the same.
func (f *flow) pass(from side, p []byte) {
	f.b.t.Helper()
	if from == vpc {
		got := f.b.out(p)
		want(f.b, "outside end", got.from(), f.ext)
		sameSegment(f.b, p, got)
		return
	}
	got := f.b.in(p)
	want(f.b, "inside end", got.to(), f.in)
	sameSegment(f.b, p, got)
}

const psa = int(psh | ack)

// forwarded starts the router with forwards to V1 and connects from outside: the
// orientation TB. The flow's inside end is the target.
func (b *bench) forwarded() *flow {
	b.t.Helper()
	b.start(func(s *setup) {
		s.forwards = []forward{{protoTCP, at(ro, 9050), at(v1, 90)}, {protoUDP, at(ro, 9051), at(v1, 91)}}
	})
	f := &flow{b: b, in: at(v1, 90), out: at(o1, 7000), ext: at(ro, 9050), iss: 1000, irs: 9000}
	f.pass(overlay, tcp(f.out, f.ext, segment{flags: syn, seq: 9000}))
	f.irs++
	f.pass(vpc, f.outSeg(int(syn|ack), ""))
	f.pass(overlay, f.inSeg(int(ack), ""))
	return f
}

// closeBoth ends a connection with both FINs.
func (f *flow) closeBoth() {
	f.pass(vpc, f.outSeg(int(fin|ack), ""))
	f.pass(overlay, f.inSeg(int(fin|ack), ""))
	f.pass(vpc, f.outSeg(int(ack), ""))
}

// tcpConnections: RFC 5382 sections 4.1 and 4.2: mapping, and connections from inside.
func tcpConnections() []row {
	return []row{
		{"5382-REQ-1", "one port whatever the destination", func(b *bench) { endpoints(b, b.openTCP) }},
		{"5382-REQ-2", "every valid segment", func(b *bench) {
			f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			f.pass(vpc, tcp(f.in, f.out, segment{flags: syn, seq: 1000})) // again
			synAck := tcp(f.out, f.ext, segment{flags: syn | ack, seq: 9000, ack: 1001})
			f.pass(overlay, synAck)
			f.pass(overlay, synAck)
			f.irs++
			f.pass(vpc, f.outSeg(int(ack), ""))
			f.pass(vpc, f.outSeg(psa, "request"))
			f.pass(overlay, f.inSeg(psa, "response"))
			f.pass(vpc, tcp(f.in, f.out, segment{flags: ack, seq: f.iss - 1, ack: f.irs})) // keepalive
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: ack, seq: f.irs, ack: f.iss}))
			f.pass(vpc, tcp(f.in, f.out, segment{flags: ack | urg, seq: f.iss, ack: f.irs, urgent: 1, data: "!"}))
			f.iss++
			f.pass(vpc, f.outSeg(int(fin|ack), "")) // half closed: the other way goes on
			f.pass(overlay, f.inSeg(psa, "more"))
			f.pass(vpc, f.outSeg(int(ack), ""))
			f.pass(overlay, f.inSeg(int(fin|ack), ""))
			f.pass(vpc, f.outSeg(int(ack), ""))
			// A new SYN on the tuple in TIME_WAIT.
			g := &flow{b: b, in: f.in, out: f.out, ext: f.ext, iss: 500_000, irs: 700_000}
			g.pass(vpc, g.outSeg(int(syn), ""))
			g.pass(overlay, g.inSeg(int(syn|ack), ""))
			g.pass(vpc, g.outSeg(int(ack), ""))
			g.pass(vpc, g.outSeg(psa, "again"))
			// Data in SYN, simultaneous close, RST.
			h := &flow{b: b, in: at(v1, b.port()), out: at(o1, 80), iss: 1, irs: 2}
			s := tcp(h.in, h.out, segment{flags: syn, seq: 1, data: "fast"})
			p := b.out(s)
			sameSegment(b, s, p)
			h.ext, h.iss = p.from(), 6
			h.pass(overlay, h.inSeg(int(syn|ack), ""))
			h.pass(vpc, h.outSeg(int(ack), ""))
			x := h.outSeg(int(fin|ack), "")
			y := tcp(h.out, h.ext, segment{flags: fin | ack, seq: h.irs, ack: h.iss - 1})
			h.irs++
			h.pass(vpc, x)
			h.pass(overlay, y)
			h.pass(vpc, h.outSeg(int(ack), ""))
			h.pass(overlay, h.inSeg(int(ack), ""))
			r := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			r.pass(vpc, r.outSeg(int(rst|ack), ""))
			t := b.forwarded()
			t.pass(overlay, t.inSeg(psa, "request"))
			t.pass(vpc, t.outSeg(psa, "response"))
			t.pass(overlay, t.inSeg(int(fin|ack), ""))
			t.pass(vpc, t.outSeg(psa, "rest"))
			t.pass(vpc, t.outSeg(int(fin|ack), ""))
			t.pass(overlay, t.inSeg(int(ack), ""))
			t = b.forwarded()
			t.pass(overlay, t.inSeg(int(rst), ""))
			b.note("every segment of opening, data, closing passed with only the tuple changed, TA and TB")
		}},
		{"5382-REQ-2a", "simultaneous open", func(b *bench) {
			f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: syn, seq: 9000}))
			f.irs++
			f.pass(vpc, tcp(f.in, f.out, segment{flags: syn | ack, seq: 1000, ack: 9001}))
			f.pass(overlay, tcp(f.out, f.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
			f.pass(vpc, f.outSeg(int(ack), ""))
			f.pass(overlay, f.inSeg(int(ack), ""))
			f.pass(vpc, f.outSeg(psa, "out"))
			f.pass(overlay, f.inSeg(psa, "in"))
			b.note("simultaneous open, data both ways")
		}},
	}
}

// tcpFiltering: RFC 5382 section 4.3: filtering, and SYNs nobody asked for.
func tcpFiltering() []row {
	return []row{
		{"5382-REQ-3", "filtering class", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			b.none(overlay, tcp(at(o2, 80), f.ext, segment{flags: syn, seq: 1}))
			b.none(overlay, tcp(at(o1, 81), f.ext, segment{flags: syn, seq: 1}))
			f.talk()
			b.note("address and port dependent")
		}},
		{"5382-REQ-3a", "filtering is a setting", func(b *bench) { filterClasses(b) }},
		{"5382-REQ-3b", "filtering apart from UDP", func(b *bench) {
			b.start(func(s *setup) { s.openUDP = true })
			b.engineOnly()
			b.filtered(true, false)
			b.start(func(s *setup) { s.openTCP = true })
			b.filtered(false, true)
			b.note("one open, the other not, both ways")
		}},
		{"5382-REQ-4", "silence for an unsolicited SYN", func(b *bench) {
			b.none(overlay, tcp(at(o1, 80), at(ro, b.port()), segment{flags: syn, seq: 9000}))
			b.advance(6 * time.Second)
			b.quiet()
			b.note("silence for 6 s")
		}},
		{"5382-REQ-4s", "own SYN after an unsolicited one", func(b *bench) {
			p := b.port()
			b.none(overlay, tcp(at(o1, 80), at(ro, p), segment{flags: syn, seq: 9000}))
			f := b.tcpFlow(at(v1, p), at(o1, 80))
			f.talk()
			b.note("handshake completes")
		}},
		{"5382-REQ-4a", "silence after six seconds", func(b *bench) {
			b.none(overlay, tcp(at(o1, 80), at(ro, b.port()), segment{flags: syn, seq: 9000}))
			b.advance(10 * time.Second)
			b.quiet()
			b.note("silence by policy, 10 s")
		}},
	}
}

// tcpTimers: RFC 5382 section 5: timers.
func tcpTimers() []row {
	return []row{
		{"5382-REQ-5e", "established and idle", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			b.advance(2*time.Hour + 3*time.Minute)
			f.pass(overlay, f.inSeg(psa, "late"))
			if b.onlyOutward() {
				b.note("data after 2 h 03 min idle")
				return
			}
			f = b.forwarded()
			b.advance(2*time.Hour + 3*time.Minute)
			f.pass(overlay, f.inSeg(psa, "late"))
			b.note("data after 2 h 03 min idle, TA and TB")
		}},
		{"5382-REQ-5t", "opening and closing", func(b *bench) {
			for _, wait := range []time.Duration{110, 132, 235} {
				b.start()
				f := b.tcpSyn(at(v1, b.port()), at(o1, 80))
				g := b.tcpSyn(at(v1, b.port()), at(o1, 80))
				g.pass(overlay, tcp(g.out, g.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
				h := b.tcpFlow(at(v1, b.port()), at(o1, 80))
				h.closeBoth()
				b.advance(wait * time.Second)
				f.pass(overlay, tcp(f.out, f.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
				g.pass(overlay, tcp(g.out, g.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
				h.pass(overlay, tcp(h.out, h.ext, segment{flags: fin | ack, seq: h.irs - 1, ack: h.iss}))
			}
			b.note("SYN, SYN/ACK and closed at 110, 132, 235 s")
		}},
		{"5382-REQ-5a", "timers are settings", func(b *bench) {
			b.start(func(s *setup) {
				s.timeouts = netstack.Timeouts{TCPEstablished: 3 * time.Hour, TCPTransitory: 300 * time.Second}
			})
			b.engineOnly()
			f := b.tcpFlow(at(v1, b.port()), at(o1, 80))
			g := b.tcpSyn(at(v1, b.port()), at(o1, 80))
			b.advance(290 * time.Second)
			g.pass(overlay, tcp(g.out, g.ext, segment{flags: syn | ack, seq: 9000, ack: 1001}))
			b.advance(2*time.Hour + 50*time.Minute)
			f.pass(overlay, f.inSeg(psa, "late"))
			b.note("3 h and 300 s as set")
		}},
	}
}

// tcpOther: RFC 5382 sections 6 and 7: gateways, ports, hairpin and ICMP.
func tcpOther() []row {
	return []row{
		{"5382-REQ-6", "FTP without a gateway", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(o1, 21))
			f.pass(vpc, f.outSeg(psa, "PORT 10,77,1,50,200,10\r\n"))
			f.pass(vpc, f.outSeg(psa, "PASV\r\n"))
			f.pass(overlay, f.inSeg(psa, "227 Entering Passive Mode (10,77,100,50,200,10)\r\n"))
			g := b.tcpFlow(at(v1, b.port()), at(o1, 200*256+10))
			g.pass(overlay, g.inSeg(psa, "file"))
			b.note("FTP control payload untouched, passive data connection works")
		}},
		{"5382-REQ-7", "no shared ports", func(b *bench) {
			a, c := b.openTCP(at(v1, 4000), at(o1, 80)), b.openTCP(at(v2, 4000), at(o2, 80))
			if a == c {
				b.failf("both leave as %s", a)
			}
			b.note("%d and %d", a.Port(), c.Port())
		}},
		{"5382-REQ-8", "hairpin", func(b *bench) { hairpinForward(b, false) }},
		{"5382-REQ-8a", "hairpin shows the outside source", func(b *bench) { hairpinForward(b, false) }},
		{"5382-REQ-9", "unreachables pass", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(hh, 80))
			seen := tcp(f.ext, f.out, segment{flags: ack, seq: f.iss, ack: f.irs})
			for _, e := range [][3]int{{3, 1, 0}, {3, 3, 0}, {3, 4, 1300}, {3, 10, 0}, {11, 0, 0}} {
				got := b.in(icmpError(mm, uint8(e[0]), uint8(e[1]), uint32(e[2]), seen, 8))
				translated(b, got, f, mm, uint8(e[0]), uint8(e[1]))
				want(b, "MTU field", got.mtu, e[2])
			}
			b.note("3/1, 3/3, 3/4, 3/10, 11/0 with 8 bytes quoted")
		}},
		{"5382-REQ-10", "errors end no connection", func(b *bench) {
			f := b.tcpFlow(at(v1, b.port()), at(hh, 80))
			seen := tcp(f.ext, f.out, segment{flags: ack, seq: f.iss, ack: f.irs})
			for _, e := range errorsAbout {
				b.push(overlay, icmpError(mm, e[0], e[1], 1300, seen, 8))
				f.talk()
			}
			f = b.forwarded()
			seen = tcp(f.ext, f.out, segment{flags: ack, seq: f.iss, ack: f.irs})
			for _, e := range errorsAbout {
				b.push(overlay, icmpError(mm, e[0], e[1], 1300, seen, 8))
				f.talk()
			}
			b.note("data both ways after each, TA and TB")
		}},
	}
}

// quiet wants nothing to have come out meanwhile.
func (b *bench) quiet() {
	b.t.Helper()
	v, o := b.push(vpc)
	if len(v)+len(o) > 0 {
		b.failf("want silence, got at the VPC %s, on the overlay %s", list(v), list(o))
	}
}

// mssOption builds the option.
func mssOption(n uint16) []byte { return binary.BigEndian.AppendUint16([]byte{2, 4}, n) }

// mssOf reads the MSS option of a SYN; 0 if there is none.
func mssOf(p *packet) uint16 {
	return header.ParseSynOptions(p.tcp().Options(), false).MSS * hasMSS(p)
}

func hasMSS(p *packet) uint16 {
	o := p.tcp().Options()
	for i := 0; i < len(o); {
		switch o[i] {
		case 0:
			return 0
		case 1:
			i++
			continue
		case 2:
			return 1
		}
		if i+1 >= len(o) || o[i+1] < 2 {
			return 0
		}
		i += int(o[i+1])
	}
	return 0
}

func pad(n int) string { return strings.Repeat("x", n) }
