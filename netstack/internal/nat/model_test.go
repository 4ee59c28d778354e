package nat

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// model is a translator that is slow and obvious: lists that are searched from
// the beginning, packets that are built anew. It knows no windows, and learns
// replaced ports from the table, after judging them.
type model struct {
	flows    []*modelFlow
	mappings []*modelMapping
}

type modelMapping struct {
	proto    uint8
	client   netip.AddrPort
	external uint16
	until    time.Duration // of its rest; 0 while it has flows
	closed   bool          // TCP closed it, so that perhaps it doesn't rest
}

type modelFlow struct {
	proto          uint8
	client, server netip.AddrPort // of ICMP the client's port is the identifier
	mapping        *modelMapping
	state          string
	fin            [2]bool
	both           bool // opened from both sides
	answered, firm bool // the server was seen, and the connection established
	last           time.Duration
}

func (f *modelFlow) idle() time.Duration {
	switch {
	case f.proto == ipkt.ICMP:
		return time.Minute
	case f.proto == ipkt.UDP && f.state == "new":
		return 2 * time.Minute
	case f.proto == ipkt.UDP:
		return 5 * time.Minute
	}
	return map[string]time.Duration{"new": 4 * time.Minute, "opening": 4 * time.Minute, "established": 5 * 24 * time.Hour,
		"closing": 124 * time.Minute, "closed": 4 * time.Minute, "reset": 4 * time.Minute, "refused": time.Second}[f.state]
}

// expire ends flows and rests that are over.
func (m *model) expire(now time.Duration) {
	var left []*modelFlow
	for _, f := range m.flows {
		if now-f.last <= f.idle() {
			left = append(left, f)
			continue
		}
		if f.state == "closed" || f.state == "reset" || f.state == "refused" {
			f.mapping.closed = true
		}
		others := 0
		for _, g := range m.flows {
			if g != f && g.mapping == f.mapping && now-g.last <= g.idle() {
				others++
			}
		}
		if others > 0 {
			continue
		}
		end := f.last + f.idle()
		for _, g := range m.flows { // the last one to end counts
			if g.mapping == f.mapping {
				end = max(end, g.last+g.idle())
			}
		}
		f.mapping.until = end + 2*time.Minute
	}
	m.flows = left
}

func (m *model) String() (s string) {
	for _, f := range m.flows {
		s += fmt.Sprintf("%d %v > %v at %d %s since %v\n", f.proto, f.client, f.server, f.mapping.external, f.state, f.last)
	}
	return s
}

func (m *model) inUse(mp *modelMapping) bool {
	for _, f := range m.flows {
		if f.mapping == mp {
			return true
		}
	}
	return false
}

// step is a packet of a history.
type step struct {
	fromOverlay    bool
	proto          uint8
	client, server int
	outside        int // of a packet from the overlay: to which known external port
	flags          uint8
	data           bool
}

var (
	modelClients = []string{"172.31.0.10:4000", "172.31.0.11:4000", "172.31.0.12:4000", "172.31.0.10:500", "172.31.0.11:500"}
	modelServers = []string{"10.0.0.10:80", "10.0.0.10:81", "10.0.0.11:80"}
	modelFlags   = []uint8{ipkt.SYN, synack, ipkt.ACK, fin, ipkt.RST, ipkt.ACK, ipkt.RST | ipkt.ACK, 0, ipkt.SYN | ipkt.FIN}
)

// packet builds a step's packet between two endpoints.
func (s *step) packet(src, dst netip.AddrPort) []byte {
	p := pkttest.Packet{Proto: s.proto, Src: src, Dst: dst, Flags: s.flags, Seq: 1000, Ack: 2000}
	if s.proto == ipkt.ICMP {
		p.Type = 8
		if s.fromOverlay {
			p.Type, p.Src = 0, netip.AddrPortFrom(src.Addr(), dst.Port())
		}
		p.Flags, p.Seq = 0, 1
	}
	if s.data {
		p.Payload = []byte("data")
	}
	return p.Bytes()
}

// send moves a flow on; false if the packet may not pass.
func (f *modelFlow) send(now time.Duration, dir int, flags uint8, data bool) bool {
	if f.proto != ipkt.TCP {
		if dir == FromServer {
			f.state = "established"
		}
		f.last = now
		return true
	}
	halfOpen := f.state == "new" || f.state == "opening"
	if dir == FromServer && (flags == ipkt.ACK || flags == fin || halfOpen && (flags == ipkt.SYN || flags == synack)) {
		f.answered = true
	}
	defer func() { f.firm = f.firm || f.state == "established" || f.state == "closing" }()
	over := f.state == "closed" || f.state == "reset" || f.state == "refused"
	switch flags {
	case ipkt.SYN:
		switch {
		case dir == FromClient && over:
			f.state, f.fin, f.last, f.both, f.answered, f.firm = "new", [2]bool{}, now, false, false, false
		case dir == FromClient && halfOpen:
			f.last = now
		case dir == FromServer && halfOpen:
			f.state, f.last, f.both = "opening", now, true
			return true
		case dir == FromServer:
			return false
		}
		return true
	case synack:
		if halfOpen {
			f.last = now
			if dir == FromServer {
				f.state = "opening"
			}
		}
		return true
	case ipkt.RST, ipkt.RST | ipkt.ACK:
		next := "reset"
		if f.state == "new" && dir == FromServer {
			next = "refused"
		}
		if f.state != next {
			idle := map[string]time.Duration{"reset": 4 * time.Minute, "refused": time.Second}[next]
			f.last, f.state = min(now, f.last+f.idle()-idle), next
		}
		return true
	case fin:
		f.fin[dir], f.last = true, now
		switch {
		case f.fin[0] && f.fin[1]:
			f.state = "closed"
		case f.state == "new" && dir == FromServer || f.state == "opening" && (dir == FromClient || f.both) || f.state == "established":
			f.state = "closing"
		}
		return true
	case ipkt.ACK:
		f.last = now
		switch {
		case f.state == "new" && dir == FromServer || f.state == "opening" && (dir == FromClient || f.both):
			f.state = "established"
			if f.fin[0] || f.fin[1] {
				f.state = "closing"
			}
		case f.state == "reset" && data && f.firm:
			f.state = "established"
		case f.state == "reset" && data && f.answered:
			f.state = "opening"
		case f.state == "reset" && data:
			f.state = "new"
		}
		return true
	}
	return false // no such flags
}

// history runs random packets through both.
func history(t testing.TB, data []byte) {
	p := newPlayer(t, Settings{NoWindow: true})
	m := &model{}
	now := time.Duration(1)
	next := func() int {
		if len(data) == 0 {
			return -1
		}
		b := data[0]
		data = data[1:]
		return int(b)
	}
	var log []string
	fail := func(format string, a ...any) {
		t.Helper()
		t.Fatalf("%s\nafter %v\nmodel\n%s", fmt.Sprintf(format, a...), log[max(0, len(log)-12):], m)
	}
	for {
		a, b, c := next(), next(), next()
		if c < 0 {
			break
		}
		if a < 40 { // time passes
			const unit = 7300 * time.Millisecond // no sum of it is near a limit
			log = append(log, (time.Duration(b%64) * unit).String())
			for range b % 64 {
				now += unit
				p.sleep(unit)
				m.expire(now)
			}
			continue
		}
		s := step{fromOverlay: a%2 == 1, proto: []uint8{ipkt.UDP, ipkt.TCP, ipkt.TCP, ipkt.ICMP}[a/2%4],
			client: b % len(modelClients), server: b / 16 % len(modelServers), outside: b, data: c%2 == 0}
		if s.proto == ipkt.TCP {
			s.flags = modelFlags[c/2%len(modelFlags)]
		}
		m.expire(now)
		server := pkttest.Addr(modelServers[s.server])
		if s.proto == ipkt.ICMP {
			server = netip.AddrPortFrom(server.Addr(), 0)
		}
		var packet, want []byte
		var check func(port uint16) error
		if s.fromOverlay {
			if len(m.mappings) == 0 {
				continue
			}
			mp := m.mappings[s.outside%len(m.mappings)]
			dst := netip.AddrPortFrom(external, mp.external)
			packet = s.packet(server, dst)
			for _, f := range m.flows {
				if f.proto == s.proto && f.server == server && f.mapping.external == mp.external && f.send(now, FromServer, s.flags, s.data) {
					want = s.packet(server, f.client)
				}
			}
		} else {
			client := pkttest.Addr(modelClients[s.client])
			packet = s.packet(client, server)
			f, opens := m.find(s.proto, client, server), s.proto != ipkt.TCP || s.flags == ipkt.SYN || s.flags == ipkt.ACK
			if f == nil && opens {
				f, check = m.open(now, s.proto, client, server)
			}
			if f != nil && f.send(now, FromClient, s.flags, s.data) {
				want = s.packet(netip.AddrPortFrom(external, f.mapping.external), server)
				if check != nil && f.mapping.external == 0 {
					want = []byte{} // the port isn't known yet
				}
			}
		}
		log = append(log, pkttest.Describe(packet)+fmt.Sprintf(" flags %#x", s.flags))
		side := VPC
		if s.fromOverlay {
			side = Overlay
		}
		out := append([]byte(nil), packet...)
		got, why := p.send(side, out)
		if (got != "") != (want != nil) {
			fail("passed %q (%d), the model %x", got, why, want)
		}
		if got == "" {
			continue
		}
		if check != nil {
			var v ipkt.View
			ipkt.Parse(out, &v)
			port := v.SPort
			if s.proto == ipkt.ICMP {
				port = v.ICMPID
			}
			if err := check(port); err != nil {
				fail("%s: %v", got, err)
			}
			want = s.packet(netip.AddrPortFrom(external, port), server)
		}
		if !bytes.Equal(out, want) {
			fail("out came\n%x (%s), the model made\n%x (%s)", out, got, want, pkttest.Describe(want))
		}
	}
	m.expire(now)
	p.tab.Sweep(p.now)
	if p.tab.Len() != len(m.flows) {
		fail("%d flows, in the model %d", p.tab.Len(), len(m.flows))
	}
	p.check()
}

func (m *model) find(proto uint8, client, server netip.AddrPort) *modelFlow {
	for _, f := range m.flows {
		if f.proto == proto && f.client == client && f.server == server {
			return f
		}
	}
	return nil
}

// open makes a flow. check judges its external port, which a new mapping gets.
func (m *model) open(now time.Duration, proto uint8, client, server netip.AddrPort) (f *modelFlow, check func(uint16) error) {
	f = &modelFlow{proto: proto, client: client, server: server, state: "new", last: now}
	m.flows = append(m.flows, f)
	// Where several flows or rests end in one step of time, their order is open.
	const late = 10 * time.Second
	taken := func(port uint16) *modelMapping {
		for _, mp := range m.mappings {
			if mp.proto == proto && mp.external == port && (m.inUse(mp) || now < mp.until+late) {
				return mp
			}
		}
		return nil
	}
	for _, mp := range m.mappings {
		if mp.proto == proto && mp.client == client && (m.inUse(mp) || now < mp.until && !mp.closed) {
			f.mapping = mp
			mp.until, mp.closed = 0, false
			return f, nil
		}
	}
	mp := &modelMapping{proto: proto, client: client}
	preserve := taken(client.Port()) == nil
	f.mapping = mp
	m.mappings = append(m.mappings, mp)
	return f, func(port uint16) error {
		mp.external = port
		for _, other := range m.mappings {
			if other != mp && other.proto == proto && other.external == port && other.client != client && (m.inUse(other) || now < other.until-late && !other.closed) {
				return fmt.Errorf("port %d belongs to %v (in use %v, rests until %v of %v)", port, other.client, m.inUse(other), other.until, now)
			}
		}
		for _, other := range m.mappings { // its former one, if that rested after all
			if other != mp && other.proto == proto && other.client == client && other.external == port && now < other.until {
				return nil
			}
		}
		switch {
		case preserve && port != client.Port():
			return fmt.Errorf("port %d was free and not kept", client.Port())
		case proto != ipkt.ICMP && port < 1024 != (client.Port() < 1024):
			return fmt.Errorf("port %d is of another class", port)
		case isLocal(port):
			return fmt.Errorf("port %d is our own", port)
		}
		return nil
	}
}

// TestModel runs random histories through the table and the model.
func TestModel(t *testing.T) {
	n := 500
	if testing.Short() {
		n = 40
	}
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 1))
		data := make([]byte, 3*(20+rng.IntN(200)))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		history(t, data)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func FuzzModel(f *testing.F) {
	f.Add([]byte{100, 1, 2, 101, 1, 2, 10, 30, 0, 100, 1, 2})
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 3000 {
			history(t, data)
		}
	})
}

// TestScarceModel runs random histories in a small table, against a list of what went on
// after an answer: that never makes room, and who has little is refused only when nothing else is
// left.
func TestScarceModel(t *testing.T) {
	n := 200
	if testing.Short() {
		n = 20
	}
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 2))
		set := Settings{MaxFlows: 20 + rng.IntN(200), MaxHalfOpen: []int{0, 0, 5}[rng.IntN(3)], Seed: [32]byte{byte(seed)},
			PortSharing: PortSharing(rng.IntN(2)), FilterUDP: Filtering(rng.IntN(2))}
		if rng.IntN(3) == 0 {
			set.MaxFlowsPerClient = 10 + rng.IntN(set.MaxFlows)
		}
		p := newPlayer(t, set)
		type flow struct{ client, server, outside string }
		firm, of := map[flow]bool{}, map[string]int{}
		for range 600 {
			host := fmt.Sprintf("172.31.%d.%d", rng.IntN(3), 1+rng.IntN(4))
			client := fmt.Sprintf("%s:%d", host, []int{500, 4000}[rng.IntN(2)]+rng.IntN(60))
			server := modelServers[rng.IntN(len(modelServers))]
			got, why := p.send(VPC, pkttest.UDP(client, server, "x"))
			if got == "" {
				most := p.tab.set.MaxFlowsPerClient
				// Who has much takes nothing from those who wait for their first answer.
				c := p.tab.clients[keyOfClient(ipkt.Bytes(netip.MustParseAddr(host)), VPC, 0)]
				much := p.tab.keepFor > 0 && c != nil && int(c.live) >= p.tab.keepFor
				if !(why == ClientFull && of[host] >= most || why == TableFull && (much || len(firm) >= set.MaxFlows-set.MaxFlows/keptPart)) {
					t.Fatalf("seed %d: %s is refused with %q beside %d answered flows of %d, %d its own", seed, client, RefusalNames[why], len(firm), set.MaxFlows, of[host])
				}
				continue
			}
			f := flow{client, server, got[len("udp ") : len(got)-len(" > "+server)]}
			if rng.IntN(3) == 0 && !firm[f] {
				p.mustPass("answer", Overlay, pkttest.UDP(server, f.outside, "y"))
				p.mustPass("after it", VPC, pkttest.UDP(client, server, "x"))
				firm[f] = true
				of[host]++
			}
		}
		for f := range firm {
			p.want("answered flow", Overlay, pkttest.UDP(f.server, f.outside, "y"), "udp "+f.server+" > "+f.client)
		}
		p.check()
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
