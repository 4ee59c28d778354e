package conformance

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"ztgate/netstack"
)

// fillPorts takes a range of outside ports by flows from one address.
func (b *bench) fillPorts(proto uint8, from netip.Addr, to netip.AddrPort, first, last int) {
	b.flood(last-first+1, func(i int) []byte {
		if proto == protoTCP {
			return tcp(at(from, first+i), to, segment{flags: syn, seq: 1})
		}
		return udp(at(from, first+i), to, "x")
	})
}

// fillLowPorts takes all low outside ports by flows of many hosts, each of which has few,
// that go on after their answer.
func (b *bench) fillLowPorts(to netip.AddrPort) {
	var out, in [][]byte
	for port := 1; port < 1024; port++ {
		p := b.out(udp(at(lowPortHost(port), port), to, "x"))
		in = append(in, udp(to, p.from(), "y"))
		out = append(out, udp(at(lowPortHost(port), port), to, "x"))
	}
	b.push(overlay, in...)
	b.push(vpc, out...)
}

// lowPortHost is who has a port after fillLowPorts.
func lowPortHost(port int) netip.Addr { return addr(fmt.Sprintf("10.77.1.%d", 60+(port-1)%175)) }

// limitPorts opens 1500 flows under a limit of 1000 per host.
func limitPorts(b *bench) {
	b.start(func(s *setup) { s.portsPerClient = 1000 })
	b.engineOnly()
	passed := b.count(1500, func(i int) []byte { return udp(at(v1, 10000+i), at(o1, 5000), "x") })
	want(b, "flows of V1", passed, 1000)
	want(b, "flows of V2", b.count(10, func(i int) []byte { return udp(at(v2, 10000+i), at(o1, 5000), "x") }), 10)
	b.openTCP(at(v1, 10000), at(o1, 80))
	b.note("1000 and 10 passed, 500 refused, TCP unaffected")
}

// count sends n packets from the VPC, checks that those which don't come out are
// counted, and returns how many did.
func (b *bench) count(n int, make func(i int) []byte) int {
	b.ready()
	b.push(vpc)
	before := b.r.accounted()
	packets := [][]byte{}
	for i := range n {
		packets = append(packets, make(i))
	}
	_, o := b.push(vpc, packets...)
	if before != nil {
		d, total := diff(before, b.r.accounted())
		if int(total) != n-len(o) {
			b.failf("%d of %d came out, the counters moved by %v %s", len(o), n, total, d)
		}
	}
	return len(o)
}

// carrierClients: RFC 6888, REQ-1 to REQ-7: what a client gets.
func carrierClients() []row {
	return []row{
		{"6888-REQ-1", "each protocol its own rules", same("4787-REQ-1", "5382-REQ-1", "5508-REQ-1")},
		{"6888-REQ-2", "paired addresses", same("4787-REQ-2")},
		{"6888-REQ-3", "pools of any shape", func(b *bench) {
			list := pool(b, "10.77.100.9", "10.50.7.1", "192.168.9.200")
			of := map[netip.Addr]int{}
			for i := range 30 {
				of[b.openUDP(at(netip.AddrFrom4([4]byte{10, 77, 1, byte(100 + i)}), 4000), at(o1, 5000)).Addr()]++
			}
			for _, a := range list {
				want(b, fmt.Sprintf("clients behind %s", a), of[a], 10)
			}
			b.note("30 clients, 10 behind each of 3 addresses of different subnets")
		}},
		{"6888-REQ-4", "limit of ports per client", limitPorts},
		{"6888-REQ-5", "limit of state per client", func(b *bench) {
			b.start(func(s *setup) { s.flowsPerClient = 1000 })
			b.engineOnly()
			b.count(1500, func(i int) []byte { return tcp(at(v1, 10000+i), at(o1, 80), segment{flags: syn, seq: 1}) })
			for i := range 20 {
				b.tcpFlow(at(v2, 11000+i), at(o1, 80))
			}
			if n := len(b.r.(*engineRouter).engine.Flows(netstack.FlowFilter{})); n > 1000+20 {
				b.failf("%d flows in the table, want at most 1020", n)
			}
			b.note("V1 holds at most 1000 flows, V2 unaffected")
		}},
		{"6888-REQ-6", "destinations without translation", func(b *bench) {
			b.start(func(s *setup) { s.network.Exempt = []netip.Prefix{prefix(o2.String() + "/32")} })
			b.engineOnly()
			b.noLeak = true
			want(b, "another destination", b.openUDP(at(v1, 4000), at(o1, 5000)).Addr(), ro)
			p := b.out(udp(at(v1, 4000), at(o2, 5000), "x"))
			want(b, "source", p.from(), at(v1, 4000))
			want(b, "back", b.in(udp(at(o2, 5000), p.from(), "y")).to(), at(v1, 4000))
			b.note("exempt destination: source unchanged; others translated")
		}},
		{"6888-REQ-7", "endpoint-independent filtering", func(b *bench) { filterClasses(b) }},
	}
}

// carrierPorts: RFC 6888, REQ-8 to REQ-10: freed ports and counters.
func carrierPorts() []row {
	return []row{
		{"6888-REQ-8", "freed ports in quarantine", func(b *bench) {
			b.start(func(s *setup) { s.timeouts = netstack.Timeouts{UDP: 30 * time.Second} })
			e := b.engineOnly()
			p := b.port()
			f := b.udpFlow(at(v1, p), at(o1, 5000))
			b.advance(31 * time.Second)
			if err := e.waitGone(f.ext.Port()); err != nil {
				b.failf("%v", err)
			}
			g := b.udpFlow(at(v2, p), at(o1, 5001))
			b.unwanted(f.reply())
			h := b.udpFlow(at(v1, p), at(o1, 5000))
			want(b, "port of the owner that comes back", h.ext, f.ext)
			b.note("V2 got %d, V1's late packet is refused, V1 gets %d back", g.ext.Port(), h.ext.Port())
		}},
		{"6888-REQ-9", "port control protocol", na("forwards are configured; there is no port control protocol")},
		{"6888-REQ-10", "counters for every drop", func(b *bench) {
			b.engineOnly()
			for _, p := range martians(v1, o1) {
				b.none(vpc, p)
			}
			b.unwanted(udp(at(o1, 5000), at(ro, 4000), "x"))
			b.none(vpc, udp(at(v1, 4000), at(o1, 5000), "x", badSum))
			b.note("sum of counters = sent - seen")
		}},
	}
}

// carrierResources: RFC 6888, REQ-11 to REQ-15: what happens when something is used up.
func carrierResources() []row {
	return []row{
		{"6888-REQ-11A", "no port left", same("L-PORT-EXHAUST")},
		{"6888-REQ-11B", "no port left: sender told", same("L-PORT-EXHAUST")},
		{"6888-REQ-11C", "no port left: operator told", func(b *bench) {
			e := b.engineOnly()
			b.exhaust()
			if !strings.Contains(e.log.String(), "level=WARN") && !strings.Contains(e.log.String(), "level=ERROR") {
				b.failf("no log line says that ports are used up")
			}
			if n := strings.Count(e.log.String(), "\n"); n > 20 {
				b.failf("%d log lines", n)
			}
			b.note("log: %q", strings.TrimSpace(firstLine(e.log.String(), "level=WARN")))
		}},
		{"6888-REQ-11D", "no mapping deleted for room", func(b *bench) {
			const limit = 4000
			b.start(func(s *setup) { s.maxFlows = limit })
			b.engineOnly()
			u, c := b.udpFlow(at(v2, 4000), at(o1, 5000)).answered(), b.tcpFlow(at(v2, 4000), at(o1, 80))
			b.flood(3*limit, func(i int) []byte { return udp(at(v1, 1024+i), at(o2, 9), "x") })
			u.answer()
			c.talk()
			for i := range 20 {
				b.udpFlow(at(v2, 5000+i), at(o1, 5000)).answer()
			}
			b.note("V2's flows and 20 new ones pass at 100 %%")
		}},
		{"6888-REQ-12", "no destinations in the log", func(b *bench) {
			e := b.engineOnly()
			for i := range 1000 {
				b.openUDP(at(v1, 10000+i), at([]netip.Addr{o1, o2, o3}[i%3], 5000))
			}
			for _, o := range []netip.Addr{o1, o2, o3} {
				if strings.Contains(e.log.String(), o.String()) {
					b.failf("the log names %s: %q", o, firstLine(e.log.String(), o.String()))
				}
			}
			b.note("1000 flows, no destination in the log")
		}},
		{"6888-REQ-13", "the whole pool", func(b *bench) {
			b.engineOnly()
			b.fillLowPorts(at(o1, 5000))
			mappings := func() (n int) {
				for _, m := range b.r.(*engineRouter).engine.Mappings() {
					if !m.IsFlow() {
						n++
					}
				}
				return n
			}
			want(b, "low ports used", mappings(), 1023)
			if b.short {
				b.note("1023 of 1023")
				return
			}
			b.start()
			b.count(64_512+3000, func(i int) []byte {
				return udp(at(addr(fmt.Sprintf("10.77.1.%d", 60+i%2)), 1024+i/2), at(o1, 5000), "x")
			})
			b.count(2000, func(i int) []byte {
				return udp(at(addr(fmt.Sprintf("10.77.2.%d", 60+i%100)), 2000+i), at(o1, 5000), "x")
			})
			used := mappings()
			if used < 64_512-3000 {
				b.failf("%d of 64512 ports used", used)
			}
			b.note("1023 of 1023; %d of 64512, the rest is the gateway's own", used)
		}},
		{"6888-REQ-14", "log volume", na("no log per mapping")},
		{"6888-REQ-15", "ports hard to guess", same("7857-S10")},
	}
}

func firstLine(s, with string) string {
	for line := range strings.Lines(s) {
		if strings.Contains(line, with) {
			return line
		}
	}
	return ""
}

// exhaust uses all low ports up and returns the refused packet of a new flow.
func (b *bench) exhaust() []byte {
	b.fillLowPorts(at(o1, 5000))
	p := udp(at(v2, 500), at(o1, 5000), "x")
	b.push(vpc, p)
	return p
}

// filterClasses switches the filters to endpoint independent.
func filterClasses(b *bench) {
	b.start(func(s *setup) { s.openUDP, s.openTCP = true, true })
	b.engineOnly()
	f, g := b.filtered(true, true)
	want(b, "UDP mapping", b.openUDP(f.in, at(o3, 1)), f.ext)
	want(b, "TCP mapping", b.openTCP(g.in, at(o3, 1)), g.ext)
	b.note("endpoint independent for both: other hosts and ports reach the mappings")
}

// filtered opens a flow of each kind and has others knock.
func (b *bench) filtered(openUDP, openTCP bool) (f, g *flow) {
	f, g = b.udpFlow(at(v1, b.port()), at(o1, 5000)), b.tcpFlow(at(v1, b.port()), at(o1, 80))
	for _, from := range []netip.AddrPort{at(o1, 5999), at(o2, 5000)} {
		b.admitted(openUDP, udp(from, f.ext, "x"))
		b.admitted(openTCP, tcp(from, g.ext, segment{flags: syn, seq: 1}))
	}
	return f, g
}

func (b *bench) admitted(yes bool, p []byte) {
	if yes {
		b.in(p)
	} else {
		b.unwantedOrSilent(p)
	}
}

// unwantedOrSilent is unwanted for UDP; TCP gets no answer at all.
func (b *bench) unwantedOrSilent(p []byte) {
	if parse(p).proto == protoTCP {
		b.none(overlay, p)
		return
	}
	b.unwanted(p)
}
