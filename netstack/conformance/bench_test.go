package conformance

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sort"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ztgate/netstack"
)

// Names and addresses of docs/nat.md.
var (
	rv = addr("10.77.1.1") // the router on the VPC side
	ro = addr("10.77.100.1")
	v1 = addr("10.77.1.50")
	v2 = addr("10.77.2.50")
	o1 = addr("10.77.100.50")
	o2 = addr("10.77.100.51")
	o3 = addr("10.77.100.52")
	ox = addr("10.77.100.66") // answers nothing
	mm = addr("10.77.100.2")  // the router behind the overlay
	hh = addr("10.77.200.2")  // a host behind it

	rv6 = addr("fd77:1::1")
	ro6 = addr("fd77:100::1")
	v16 = addr("fd77:1::50")
	v26 = addr("fd77:2::50")
	o16 = addr("fd77:100::50")
	o26 = addr("fd77:100::51")
	mm6 = addr("fd77:100::2")
	hh6 = addr("fd77:200::2")

	vpcPrefixes = []netip.Prefix{prefix("10.77.1.0/24"), prefix("10.77.2.0/24"), prefix("fd77:1::/64"), prefix("fd77:2::/64")}
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// at makes an endpoint.
func at(a netip.Addr, port int) netip.AddrPort { return netip.AddrPortFrom(a, uint16(port)) }

// side is a side of the router.
type side int

const (
	vpc side = iota
	overlay
)

func (s side) String() string { return [...]string{"VPC", "overlay"}[s] }

const ethernetLen = 14

type mac [6]byte

var (
	routerMAC = mac{0x02, 0x77, 0, 0, 0, 1}
	broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// playerMAC is the MAC of a raw player.
func playerMAC(a netip.Addr) mac {
	b := a.As16()
	return mac{0x02, 0x70, b[12], b[13], b[14], b[15]}
}

func ethernet(dst, src mac, typ uint16) []byte {
	return binary.BigEndian.AppendUint16(append(append(make([]byte, 0, 128), dst[:]...), src[:]...), typ)
}

// router is the system under test between the players.
type router interface {
	name() string
	inject(s side, frames [][]byte)
	take(s side) [][]byte        // frames that came out since the last call
	settle()                     // returns when everything injected has been dealt with
	advance(time.Duration) error // of the clock; an error if that takes too long here
	accounted() map[string]float64
	waitGone(port uint16) error // until the mapping with an external port has ended
	close() error
}

// setup says how a row wants the router.
type setup struct {
	vpcMTU, maxFlows int
	timeouts         netstack.Timeouts
	opening, closing time.Duration // of TCP, when they should differ
	network          netstack.Network
	forwards         []forward
	shown            bool // targets on the overlay see clients' own addresses
	openUDP, openTCP bool // endpoint-independent filters
	sharing          bool // ports by destination once they are used up
	portsPerClient   int
	flowsPerClient   int
	strictTCP        bool               // no mid-stream pickup
	mappings         []netstack.Mapping // of the router before the restart
	seeded           bool               // replaced ports are the same after a restart
	prefix6          netip.Prefix       // VPC prefix fd77:1::/64 is this one outside
	engine           func(*netstack.Config)
}

// forward is a port of the router that is forwarded to a host on the other side.
type forward struct {
	proto    uint8
	port, to netip.AddrPort
}

// pool starts the router with addresses for clients, besides the network's first.
func pool(b *bench, list ...string) (out []netip.Addr) {
	b.start(func(s *setup) {
		for _, text := range list {
			a := addr(text)
			out = append(out, a)
			s.network.Addresses = append(s.network.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		s.network.NAT = out
	})
	b.engineOnly()
	return out
}

func defaultSetup() setup {
	return setup{vpcMTU: 1500, network: netstack.Network{
		ID: networkID, MAC: routerMAC, MTU: 1500, Masquerade: true,
		Addresses: []netip.Prefix{prefix("10.77.100.1/24"), prefix("fd77:100::1/64")},
		Routes: []netstack.Route{{Target: prefix("10.77.200.0/24"), Via: mm}, {Target: prefix("fd77:200::/64"), Via: mm6},
			{Target: prefix("10.77.201.0/24"), Via: mm}},
	}}
}

func engineConfig(s setup) netstack.Config {
	cfg := netstack.Config{
		VPC:      netstack.VPC{Addresses: []netip.Prefix{prefix("10.77.1.1/24"), prefix("fd77:1::1/64")}, Sources: vpcPrefixes, MTU: s.vpcMTU},
		MaxFlows: s.maxFlows, Timeouts: s.timeouts, Mappings: s.mappings,
	}
	for _, f := range s.forwards {
		for _, side := range []netstack.Side{netstack.OverlaySide, netstack.VPCSide} {
			cfg.Forwards = append(cfg.Forwards, netstack.PortForward{From: side, Proto: f.proto, Listen: f.port, To: f.to,
				Masquerade: side == netstack.VPCSide && !s.shown})
		}
	}
	if s.prefix6.IsValid() {
		cfg.Maps = append(cfg.Maps, netstack.AddressMap{Hosts: netstack.VPCSide, Real: vpcPrefixes[2], Alias: s.prefix6})
	}
	cfg.NAT.MaxPortsPerClient, cfg.NAT.MaxFlowsPerClient = s.portsPerClient, s.flowsPerClient
	cfg.NAT.NoPickup = s.strictTCP
	if s.sharing {
		cfg.NAT.PortSharing = netstack.ByDestination
	}
	if s.openUDP {
		cfg.NAT.FilterUDP = netstack.EndpointIndependent
	}
	if s.openTCP {
		cfg.NAT.FilterTCP = netstack.EndpointIndependent
	}
	if s.seeded {
		cfg.NAT.Seed = [32]byte{7}
	}
	cfg.Timeouts.TCPOpening, cfg.Timeouts.TCPClosing = s.opening, s.closing
	if s.engine != nil {
		s.engine(&cfg)
	}
	return cfg
}

// player is what one side does by itself.
type lan struct {
	seen   []*packet
	others [][]byte // frames without IP
}

// bench is one row's router and players.
type bench struct {
	t      *testing.T
	make   func(*testing.T, setup) router
	setup  setup
	r      router
	sides  [2]lan
	silent map[netip.Addr]bool // overlay players that answer no ARP
	rng    *rand.Rand
	seed   uint64
	short  bool // loads are smaller
	allow  bool // packets with wrong checksums may come out
	noLeak bool // the leak watcher is off: the row switches translation off
	notes  []string
}

// fatal ends a row.
type fatal struct{ reason string }

// Reasons that are no failures of the router.
type (
	notApplicable string
	notHere       string // this router can't be asked
)

func (b *bench) failf(format string, a ...any) { panic(fatal{fmt.Sprintf(format, a...)}) }

// note adds evidence.
func (b *bench) note(format string, a ...any) { b.notes = append(b.notes, fmt.Sprintf(format, a...)) }

// start makes the router, changed by the given functions.
func (b *bench) start(changes ...func(*setup)) {
	b.stop()
	b.setup = defaultSetup()
	for _, c := range changes {
		c(&b.setup)
	}
	b.silent = map[netip.Addr]bool{ox: true}
	b.r = b.make(b.t, b.setup)
	b.introduce()
}

// introduce has the overlay's players ask for the router's address, so that it
// knows theirs and no packet of a row has to wait.
func (b *bench) introduce() {
	var frames [][]byte
	for _, a := range []netip.Addr{o1, o2, o3, mm} {
		frames = append(frames, arp(1, playerMAC(a), a, mac{}, ro, broadcast))
	}
	target := ro6.As16()
	for _, a := range []netip.Addr{o16, o26, mm6} {
		m := playerMAC(a)
		body := append(append(append([]byte(nil), target[:]...), 1, 1), m[:]...)
		frames = append(frames, append(ethernet(routerMAC, m, 0x86dd), icmp(a, ro6, 135, 0, 0, body, ttl(255))...))
	}
	b.pushFrames(overlay, frames...)
	b.sides = [2]lan{}
}

func (b *bench) stop() {
	if b.r != nil {
		if err := b.r.close(); err != nil {
			b.failf("router ended with: %v", err)
		}
		b.r = nil
	}
	b.sides = [2]lan{}
}

// engineOnly skips rows that the kernel has no counterpart for.
func (b *bench) engineOnly() *engineRouter {
	b.ready()
	e, ok := b.r.(*engineRouter)
	if !ok {
		panic(notHere("for the engine only"))
	}
	return e
}

// onlyOutward reports a router without forwards: rows leave their part with one out.
func (b *bench) onlyOutward() bool {
	_, mirrored := b.r.(*mirroredRouter)
	return mirrored
}

func (b *bench) ready() {
	if b.r == nil {
		b.start()
	}
}

// frame puts an IP packet into the frame a player sends it in.
func (b *bench) frame(p []byte) []byte {
	typ := uint16(0x0800)
	if len(p) > 0 && isV6(p) {
		typ = 0x86dd
	}
	src := playerMAC(mm)
	if typ == 0x86dd {
		src = playerMAC(mm6)
	}
	if len(p) >= 20 {
		if a := parse40(p); a.IsValid() && (prefix("10.77.0.0/16").Contains(a) || prefix("fd77::/16").Contains(a)) && !prefix("10.77.200.0/23").Contains(a) && !prefix("fd77:200::/64").Contains(a) {
			src = playerMAC(a)
		}
	}
	return append(ethernet(routerMAC, src, typ), p...)
}

// parse40 returns the source address.
func parse40(p []byte) netip.Addr {
	if !isV6(p) {
		return netip.AddrFrom4([4]byte(p[12:16]))
	}
	if len(p) < 40 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte(p[8:24]))
}

// push sends packets from a side and returns what comes out on both sides. Every
// packet out is checked for leaks and checksums.
func (b *bench) push(from side, packets ...[]byte) (atVPC, atOverlay []*packet) {
	frames := make([][]byte, len(packets))
	for i, p := range packets {
		frames[i] = b.frame(p)
	}
	return b.pushFrames(from, frames...)
}

func (b *bench) pushFrames(from side, frames ...[]byte) (atVPC, atOverlay []*packet) {
	b.ready()
	b.r.inject(from, frames)
	b.collect()
	atVPC, atOverlay = b.sides[vpc].seen, b.sides[overlay].seen
	b.sides[vpc].seen, b.sides[overlay].seen = nil, nil
	return atVPC, atOverlay
}

// collect lets the router finish and the players answer for their addresses.
func (b *bench) collect() {
	for range 8 {
		b.r.settle()
		busy := false
		for s := vpc; s <= overlay; s++ {
			for _, f := range b.r.take(s) {
				if reply := b.handle(s, f); reply != nil {
					b.r.inject(s, [][]byte{reply})
					if e, ok := b.r.(interface{ excuse(n int) }); ok {
						e.excuse(1)
					}
					busy = true
				}
			}
		}
		if !busy {
			return
		}
	}
}

// handle judges a frame that came out and returns a player's own answer to it.
func (b *bench) handle(s side, f []byte) []byte {
	typ := binary.BigEndian.Uint16(f[12:])
	switch typ {
	case 0x0806:
		return b.answerARP(s, f)
	case 0x0800, 0x86dd:
	default:
		b.sides[s].others = append(b.sides[s].others, f)
		return nil
	}
	p := parse(f[ethernetLen:])
	if p.proto == protoICMPv6 && p.typ >= 133 && p.typ <= 137 {
		return b.answerNDP(s, p)
	}
	if p.proto == protoICMPv6 && p.typ == 143 || p.proto == 2 { // group reports of the far end
		return nil
	}
	if s == overlay && !b.noLeak {
		if err := leak(p); err != nil {
			b.failf("LEAK on the overlay: %v", err)
		}
	}
	if err := p.sumsRight(); err != nil && !b.allow {
		b.failf("out on the %s side: %s: %v", s, p, err)
	}
	b.sides[s].seen = append(b.sides[s].seen, p)
	return nil
}

// leak reports packets on the overlay that show an inside address as their source
// or, of an error, quote one.
func leak(p *packet) error {
	for _, in := range vpcPrefixes[:2] {
		if in.Contains(p.src) {
			return fmt.Errorf("%s has an inside source", p)
		}
		if !p.icmpError() {
			continue
		}
		if q := p.quoted(); in.Contains(q.src) || in.Contains(q.dst) {
			return fmt.Errorf("%s quotes an inside address: %s", p, q)
		}
	}
	return nil
}

func (b *bench) answerARP(s side, f []byte) []byte {
	m := f[ethernetLen:]
	if len(m) < 28 || binary.BigEndian.Uint16(m[6:]) != 1 {
		b.sides[s].others = append(b.sides[s].others, f)
		return nil
	}
	asked, asker := netip.AddrFrom4([4]byte(m[24:28])), netip.AddrFrom4([4]byte(m[14:18]))
	if b.silent[asked] || asked == asker || !b.playsFor(s, asked) {
		b.sides[s].others = append(b.sides[s].others, f)
		return nil
	}
	return arp(2, playerMAC(asked), asked, mac(m[8:14]), asker, mac(m[8:14]))
}

func (b *bench) playsFor(s side, a netip.Addr) bool {
	if s == overlay {
		return a != ro && a != ro6 && (prefix("10.77.100.0/24").Contains(a) && a.As4()[3] != 255 || prefix("fd77:100::/64").Contains(a))
	}
	return a != rv && a != rv6 && !a.IsMulticast()
}

func (b *bench) answerNDP(s side, p *packet) []byte {
	if p.typ != 135 || len(p.b) < p.l4+24 {
		return nil
	}
	asked := netip.AddrFrom16([16]byte(p.b[p.l4+8 : p.l4+24]))
	if b.silent[asked] || !b.playsFor(s, asked) || p.src.IsUnspecified() {
		return nil
	}
	m := playerMAC(asked)
	t := asked.As16()
	body := append(append(append([]byte(nil), t[:]...), 2, 1), m[:]...)
	na := icmp(asked, p.src, 136, 0, 0x60000000, body, ttl(255))
	return append(ethernet(routerMAC, m, 0x86dd), na...)
}

var ids atomic.Uint32

func nextID() uint16 { return uint16(ids.Add(1)) }

// out sends a packet from the VPC and wants exactly one out on the overlay.
func (b *bench) out(p []byte) *packet { return b.one(vpc, p) }

// in sends a packet from the overlay and wants exactly one out on the VPC side.
func (b *bench) in(p []byte) *packet { return b.one(overlay, p) }

func (b *bench) one(from side, p []byte) *packet {
	b.t.Helper()
	v, o := b.push(from, p)
	if from == overlay {
		v, o = o, v
	}
	if len(v) != 0 {
		b.failf("from the %s: %s: answered with %s", from, parse(p), list(v))
	}
	if len(o) != 1 {
		b.failf("from the %s: %s: want one packet out, got %s", from, parse(p), list(o))
	}
	return o[0]
}

func list(ps []*packet) string {
	if len(ps) == 0 {
		return "nothing"
	}
	var s []string
	for _, p := range ps[:min(len(ps), 4)] {
		s = append(s, p.String())
	}
	if len(ps) > 4 {
		s = append(s, fmt.Sprintf("... %d in all", len(ps)))
	}
	return strings.Join(s, "; ")
}

// none sends packets and wants silence on both sides, and each of them counted.
func (b *bench) none(from side, packets ...[]byte) {
	b.t.Helper()
	frames := make([][]byte, len(packets))
	for i, p := range packets {
		frames[i] = b.frame(p)
	}
	b.noneFrames(from, frames...)
}

func (b *bench) noneFrames(from side, frames ...[]byte) {
	b.t.Helper()
	b.ready()
	before := b.r.accounted()
	v, o := b.pushFrames(from, frames...)
	if len(v)+len(o) > 0 {
		b.failf("from the %s: %s: want silence, got at the VPC %s, on the overlay %s", from, b.describe(frames), list(v), list(o))
	}
	b.counted(before, len(frames), from, frames)
}

func (b *bench) describe(frames [][]byte) string {
	f := frames[0]
	s := fmt.Sprintf("%d bytes", len(f)-ethernetLen)
	if len(f) >= ethernetLen+20 && (f[ethernetLen]>>4 == 4 || len(f) >= ethernetLen+40 && f[ethernetLen]>>4 == 6) {
		s = parse(f[ethernetLen:]).String()
	}
	if len(frames) > 1 {
		s += fmt.Sprintf(" and %d more", len(frames)-1)
	}
	return s
}

// over sends a segment of a connection that the router doesn't know, which tells its
// sender so and nobody else.
func (b *bench) over(from side, p []byte) {
	b.t.Helper()
	b.ready()
	before := b.r.accounted()
	v, o := b.push(from, p)
	told, others := o, v
	if from == vpc {
		told, others = v, o
	}
	s := parse(p)
	if len(told) != 1 || told[0].proto != protoTCP || told[0].tcp().Flags() != rst || told[0].from() != s.to() || told[0].to() != s.from() || len(others) > 0 {
		b.failf("from the %s: %s: want a RST, got at the VPC %s, on the overlay %s", from, s, list(v), list(o))
	}
	b.counted(before, 1, from, [][]byte{b.frame(p)})
}

// counted checks that n packets more are accounted for.
func (b *bench) counted(before map[string]float64, n int, from side, frames [][]byte) {
	b.t.Helper()
	if before == nil {
		return
	}
	if d, total := diff(before, b.r.accounted()); total != float64(n) {
		b.failf("from the %s: %s: %d packets ended, the counters moved by %v %s", from, b.describe(frames), n, total, d)
	}
}

func diff(before, after map[string]float64) (string, float64) {
	var s []string
	total := 0.0
	for k, v := range after {
		if d := v - before[k]; d != 0 {
			s = append(s, fmt.Sprintf("%s +%v", k, d))
			total += d
		}
	}
	sort.Strings(s)
	return strings.Join(s, " "), total
}

// unwanted sends packets from the overlay that nobody asked for: they may not
// reach the VPC nor vanish uncounted; UDP and other protocols for the router's own
// address may be answered with an unreachable, as Linux does.
func (b *bench) unwanted(packets ...[]byte) {
	b.t.Helper()
	b.ready()
	for _, p := range packets {
		before := b.r.accounted()
		v, o := b.push(overlay, p)
		if len(v) > 0 {
			b.failf("%s reached the VPC as %s", parse(p), list(v))
		}
		for _, e := range o {
			if e.typ != 3 || e.code != 2 && e.code != 3 || e.proto != protoICMP || e.dst != parse(p).src || e.src != ro {
				b.failf("%s was answered with %s", parse(p), e)
			}
		}
		b.counted(before, 1, overlay, [][]byte{b.frame(p)})
	}
}

// outErr sends a packet from the VPC that must not pass, and wants one ICMP error
// of a type and code back that quotes it.
func (b *bench) outErr(p []byte, typ, code uint8) *packet { return b.refused(vpc, p, typ, code) }

// inErr is outErr for packets from the overlay.
func (b *bench) inErr(p []byte, typ, code uint8) *packet { return b.refused(overlay, p, typ, code) }

func (b *bench) refused(from side, p []byte, typ, code uint8) *packet {
	b.t.Helper()
	b.ready()
	before := b.r.accounted()
	back, passed := b.push(from, p)
	if from == overlay {
		back, passed = passed, back
	}
	if len(passed) != 0 {
		b.failf("from the %s: %s: passed as %s", from, parse(p), list(passed))
	}
	if len(back) != 1 || !back[0].icmpError() || back[0].typ != typ || back[0].code != code {
		b.failf("from the %s: %s: want error %d/%d, got %s", from, parse(p), typ, code, list(back))
	}
	e, sent := back[0], parse(p)
	q := e.quoted()
	if e.dst != sent.src || q.src != sent.src || q.dst != sent.dst || q.sport != sent.sport || q.dport != sent.dport {
		b.failf("error to %s quotes %s, sent was %s", e.dst, q, sent)
	}
	b.counted(before, 1, from, [][]byte{b.frame(p)})
	return e
}

// want compares, with a word for what.
func want[T comparable](b *bench, what string, got, wanted T) {
	b.t.Helper()
	if got != wanted {
		b.failf("%s: got %v, want %v", what, got, wanted)
	}
}

// flow is a conversation between a VPC host and an overlay host.
type flow struct {
	b        *bench
	in, out  netip.AddrPort // the two ends
	ext      netip.AddrPort // the inside end as the outside sees it
	iss, irs uint32         // next sequence numbers of both ends
}

// udpFlow opens a UDP flow by one packet.
func (b *bench) udpFlow(from, to netip.AddrPort) *flow {
	b.t.Helper()
	p := b.out(udp(from, to, "out"))
	return &flow{b: b, in: from, out: to, ext: p.from()}
}

func (f *flow) send() *packet    { f.b.t.Helper(); return f.b.out(udp(f.in, f.out, "out")) }
func (f *flow) answer() *packet  { f.b.t.Helper(); return f.b.in(f.reply()) }
func (f *flow) reply() []byte    { return udp(f.out, f.ext, "in") }
func (f *flow) answered() *flow  { f.b.t.Helper(); f.answer(); return f }
func (f *flow) outgoing() []byte { return udp(f.in, f.out, "out") }

// seenBy is the flow's first packet as the outside got it.
func (f *flow) seen() []byte { return udp(f.ext, f.out, "out") }

// tcpFlow completes a handshake.
func (b *bench) tcpFlow(from, to netip.AddrPort) *flow {
	b.t.Helper()
	f := b.tcpSyn(from, to)
	f.b.in(tcp(f.out, f.ext, segment{flags: syn | ack, seq: f.irs, ack: f.iss}))
	f.irs++
	f.b.out(tcp(f.in, f.out, segment{flags: ack, seq: f.iss, ack: f.irs}))
	return f
}

// tcpSyn sends a SYN only.
func (b *bench) tcpSyn(from, to netip.AddrPort) *flow {
	b.t.Helper()
	f := &flow{b: b, in: from, out: to, iss: 1000, irs: 9000}
	p := b.out(tcp(from, to, segment{flags: syn, seq: f.iss}))
	f.ext = p.from()
	f.iss++
	return f
}

// outSeg and inSeg build segments that continue the flow.
func (f *flow) outSeg(flags int, data string) []byte {
	p := tcp(f.in, f.out, segment{flags: flagsOf(flags), seq: f.iss, ack: f.irs, data: data})
	f.iss += uint32(len(data)) + finLen(flags)
	return p
}

func (f *flow) inSeg(flags int, data string) []byte {
	p := tcp(f.out, f.ext, segment{flags: flagsOf(flags), seq: f.irs, ack: f.iss, data: data})
	f.irs += uint32(len(data)) + finLen(flags)
	return p
}

// talk sends data both ways.
func (f *flow) talk() {
	f.b.t.Helper()
	f.b.out(f.outSeg(int(psh|ack), "to the overlay"))
	f.b.in(f.inSeg(int(psh|ack), "to the VPC"))
}

// refusedNow checks that the flow's reply is no longer delivered.
func (f *flow) refusedNow(reply []byte) {
	f.b.t.Helper()
	if err := f.b.r.waitGone(f.ext.Port()); err != nil {
		f.b.failf("%v", err)
	}
	if parse(reply).proto == protoTCP {
		f.b.over(overlay, reply)
	} else {
		f.b.unwanted(reply)
	}
}

func (b *bench) advance(d time.Duration) {
	b.ready()
	if err := b.r.advance(d); err != nil {
		panic(notHere(err.Error()))
	}
}

// port returns an inside port nobody used yet in this row.
func (b *bench) port() int { return 20000 + b.rng.IntN(20000) }
