package vl1_test

import (
	"flag"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
)

// Addresses of global scope, so that reports of external addresses count.
var (
	rootEndpoint  = ap("5.0.0.1:9993")
	root2Endpoint = ap("5.0.0.2:9993")
)

// internet is a root, or two, and two leaves, each behind a NAT of its own if
// wanted.
type internet struct {
	*simnet.Net
	ids        []*identity.Identity
	planet     *vl1.World
	key        vl1.Key // signs the next planet
	root       *host
	root2      *host
	a, b       *host
	natA, natB *simnet.NAT
}

type nats struct{ a, b *simnet.Mapping }

func mapping(m simnet.Mapping) *simnet.Mapping { return &m }

var portRestricted = nats{mapping(simnet.EndpointIndependent), mapping(simnet.EndpointIndependent)}

func (n *internet) roots(count int) []vl1.Root {
	all := []vl1.Root{
		{Identity: n.ids[0].Public(), Endpoints: []netip.AddrPort{rootEndpoint}},
		{Identity: n.ids[3].Public(), Endpoints: []netip.AddrPort{root2Endpoint}},
	}
	return all[:count]
}

func newInternet(t testing.TB, roots int, behind nats) *internet {
	n := &internet{Net: simnet.New(), ids: testIDs(t)}
	// The public half of a made-up update key; the secret is the Ed25519 seed.
	n.key = planetKey()
	n.planet = vl1.NewPlanet(77, 1000, n.roots(roots), n.key.Public())
	n.root = newHost(t, n.Net, n.ids[0], n.planet, rootEndpoint)
	if roots > 1 {
		n.root2 = newHost(t, n.Net, n.ids[3], n.planet, root2Endpoint)
	}
	if behind.a != nil {
		n.natA = n.NewNAT(netip.MustParseAddr("9.0.0.1"), *behind.a)
	}
	if behind.b != nil {
		n.natB = n.NewNAT(netip.MustParseAddr("7.0.0.1"), *behind.b)
	}
	n.a = newHostBehind(t, n.Net, n.natA, n.ids[1], n.planet, leafAt(n.natA, "8.0.0.1")...)
	n.b = newHostBehind(t, n.Net, n.natB, n.ids[2], n.planet, leafAt(n.natB, "8.0.0.2")...)
	return n
}

func leafAt(behind *simnet.NAT, public string) []netip.AddrPort {
	if behind != nil {
		public = "192.168.1.2"
	}
	a := netip.MustParseAddr(public)
	return []netip.AddrPort{netip.AddrPortFrom(a, 9993), netip.AddrPortFrom(a, 23456)}
}

func planetKey() (k vl1.Key) {
	for i := range k {
		k[i] = byte(i)
	}
	return k
}

// online waits until both leaves have a root.
func (n *internet) online(t testing.TB) {
	t.Helper()
	if !n.RunUntil(5*time.Second, func() bool { return n.a.core.Online() && n.b.core.Online() }) {
		t.Fatal("not online after five seconds")
	}
}

// exchange sends a frame each way and reports whether both arrived in time.
func (n *internet) exchange(wait time.Duration) bool {
	a, b := n.a.got, n.b.got
	n.a.send(n.Net, n.b, 100)
	n.b.send(n.Net, n.a, 100)
	n.Run(wait)
	return n.a.got > a && n.b.got > b
}

// traffic runs two frames a second for d and returns the longest time without one
// that arrived in both directions.
func (n *internet) traffic(d time.Duration) (gap time.Duration) {
	last := n.Now
	for end := n.Now.Add(d); n.Now.Before(end); {
		if n.exchange(500 * time.Millisecond) {
			last = n.Now
		}
		gap = max(gap, n.Now.Sub(last))
	}
	return gap
}

func (n *internet) direct() bool { return direct(n.a, n.b) && direct(n.b, n.a) }

// connect makes the leaves exchange frames until they do so directly.
func (n *internet) connect(t testing.TB, within time.Duration) {
	t.Helper()
	n.online(t)
	start := n.Now
	if !n.RunUntil(within, func() bool { n.exchange(200 * time.Millisecond); return n.direct() }) {
		t.Fatalf("not direct %v after the first packet", within)
	}
	t.Logf("direct after %v", n.Now.Sub(start))
}

func TestPortRestrictedNATs(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, portRestricted)
	// The first introduction must do: the next one is 30 s later.
	n.connect(t, 10*time.Second)
	if gap := n.traffic(2 * time.Minute); gap > time.Second {
		t.Errorf("no traffic for %v", gap)
	}
	if !n.direct() {
		t.Error("not direct any more")
	}
	// The path outlives silence: keep-alives hold the mappings of both NATs.
	for range 12 {
		n.Run(20 * time.Second)
		if !n.direct() {
			t.Fatal("direct path lost while idle")
		}
	}
}

func TestSymmetricNAT(t *testing.T) {
	t.Parallel()
	for name, behind := range map[string]nats{
		"one side":   {mapping(simnet.Symmetric), mapping(simnet.EndpointIndependent)},
		"both sides": {mapping(simnet.Symmetric), mapping(simnet.Symmetric)},
	} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, 1, behind)
			n.online(t)
			n.traffic(2 * time.Second)
			if gap := n.traffic(5 * time.Minute); gap > time.Second {
				t.Errorf("no traffic for %v", gap)
			}
			if n.direct() {
				t.Error("direct: the NATs of this test don't work")
			}
			if n.b.hops != 1 {
				t.Errorf("%d hops, want 1", n.b.hops)
			}
			if m := n.natA.Mappings(); m > 200 {
				t.Errorf("%d mappings in use: too many probes", m)
			}
		})
	}
}

// A symmetric NAT on one side only is no obstacle for a peer that can be reached.
func TestSymmetricNATToOpenPeer(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{mapping(simnet.Symmetric), nil})
	n.connect(t, 35*time.Second)
}

func TestSameLAN(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	nat := n.NewNAT(netip.MustParseAddr("9.0.0.1"), simnet.EndpointIndependent)
	n.Move(n.a.port, nat, ap("192.168.1.2:9993"))
	n.Move(n.b.port, nat, ap("192.168.1.3:9993"))
	n.connect(t, 35*time.Second) // by way of the NAT
	n.traffic(20 * time.Second)  // addresses are exchanged
	for _, p := range n.a.core.Peers() {
		if p.Address != n.b.id.Address() {
			continue
		}
		for _, pa := range p.Paths {
			if pa.Preferred && pa.Endpoint != ap("192.168.1.3:9993") {
				t.Errorf("goes through %v", pa.Endpoint)
			}
		}
	}
}

// Dead direct paths are left within seconds, both when traffic flows and when it
// begins after a pause.
func TestFailover(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, portRestricted)
	n.connect(t, 10*time.Second)
	cut := true
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		return cut && from.Addr() != rootEndpoint.Addr() && to.Addr() != rootEndpoint.Addr()
	}
	if gap := n.traffic(30 * time.Second); gap > 10*time.Second {
		t.Errorf("no traffic for %v after the direct path died", gap)
	}
	if n.direct() || n.b.hops != 1 {
		t.Error("not relayed")
	}
	cut = false
	if !n.RunUntil(40*time.Second, func() bool { n.exchange(500 * time.Millisecond); return n.direct() }) {
		t.Error("not direct again after healing")
	}
}

// One node gets other addresses while frames flow.
func TestAddressChange(t *testing.T) {
	t.Parallel()
	for name, move := range map[string]func(*internet){
		"other address": func(n *internet) { n.Move(n.a.port, nil, ap("8.0.0.77:9993"), ap("8.0.0.77:34567")) },
		"other network": func(n *internet) {
			n.Move(n.a.port, n.NewNAT(netip.MustParseAddr("9.0.0.9"), simnet.EndpointIndependent), ap("10.1.1.1:9993"))
		},
		"other public address": func(n *internet) { n.natA.Renumber(netip.MustParseAddr("9.0.0.99")) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, 1, portRestricted)
			n.connect(t, 10*time.Second)
			move(n)
			if gap := n.traffic(40 * time.Second); gap > 10*time.Second {
				t.Errorf("no traffic for %v after the change", gap)
			}
			if !n.direct() {
				t.Error("not direct 40 s after the change")
			}
		})
	}
}

func TestRootDeath(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 2, nats{mapping(simnet.Symmetric), mapping(simnet.Symmetric)})
	n.online(t)
	n.Run(2 * time.Second)
	n.traffic(10 * time.Second)
	best := n.root
	if n.a.core.BestUpstream() == n.root2.id.Address() {
		best = n.root2
	}
	n.Detach(best.port)
	if gap := n.traffic(time.Minute); gap > 12*time.Second {
		t.Errorf("no traffic for %v after the root died", gap)
	}
	if !n.a.core.Online() || n.a.core.BestUpstream() == best.id.Address() {
		t.Error("still relies on the dead root")
	}
}

func TestPlanetUpdate(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, portRestricted)
	n.connect(t, 10*time.Second)
	next := vl1.NewPlanet(77, 2000, n.roots(2), n.key.Public())
	next.Sign(n.key)
	forged := vl1.NewPlanet(77, 3000, n.roots(2), n.key.Public())
	if n.root.core.OfferWorld(forged) {
		t.Fatal("took a planet with a bad signature")
	}
	if !n.root.core.OfferWorld(next) {
		t.Fatal("the root refused the new planet")
	}
	n.root2 = newHost(t, n.Net, n.ids[3], next, root2Endpoint)
	if !n.RunUntil(3*time.Minute, func() bool {
		return n.a.core.Planet().Timestamp == 2000 && n.b.core.Planet().Timestamp == 2000
	}) {
		t.Fatal("the leaves did not get the new planet")
	}
	n.Run(10 * time.Second)
	n.Detach(n.root.port)
	if gap := n.traffic(2 * time.Minute); gap > time.Second {
		t.Errorf("no direct traffic for %v", gap)
	}
	if !n.a.core.Online() || n.a.core.BestUpstream() != n.root2.id.Address() {
		t.Error("the new root isn't used")
	}
}

func TestPartition(t *testing.T) {
	t.Parallel()
	for _, d := range []time.Duration{10 * time.Second, 5 * time.Minute, 15 * time.Minute} {
		n := newInternet(t, 2, portRestricted)
		n.connect(t, 10*time.Second)
		cut := true
		n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
			isA := func(ep netip.AddrPort) bool { return ep.Addr() == netip.MustParseAddr("9.0.0.1") }
			return cut && (isA(from) || isA(to))
		}
		n.traffic(d)
		if d > time.Minute && n.a.core.Online() {
			t.Error("online though cut off")
		}
		cut = false
		start := n.Now
		if !n.RunUntil(30*time.Second, func() bool { return n.exchange(500 * time.Millisecond) }) {
			t.Errorf("no traffic after %v of partition", d)
		}
		t.Logf("traffic %v after the end of %v of partition", n.Now.Sub(start), d)
		if !n.RunUntil(40*time.Second, func() bool { n.exchange(500 * time.Millisecond); return n.direct() }) {
			t.Errorf("not direct again after %v of partition", d)
		}
	}
}

var dayHours = flag.Int("hours", 24, "simulated hours in TestDay")

// A day with two roots, two leaves that move, NATs that renumber, roots that die
// and come back, partitions, idle and busy hours: the leaves find each other again
// each time, and nothing is left behind.
func TestDay(t *testing.T) {
	hours := *dayHours
	if testing.Short() {
		hours = min(hours, 3)
	}
	n := newInternet(t, 2, portRestricted)
	n.connect(t, 10*time.Second)
	rnd := rand.New(rand.NewPCG(7, 8))
	var cut netip.Addr
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		return cut.IsValid() && (from.Addr() == cut || to.Addr() == cut) || rnd.IntN(200) == 0
	}
	spare := 0
	events := []func(){
		func() { n.natA.Renumber(netip.AddrFrom4([4]byte{9, 0, 1, byte(rnd.Uint32())})) },
		func() {
			spare++
			n.Move(n.b.port, nil, netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 8, byte(spare), 1}), 9993))
		},
		func() { n.Move(n.b.port, n.natB, leafAt(n.natB, "")...) },
		func() { cut = rootEndpoint.Addr(); n.traffic(2 * time.Minute); cut = netip.Addr{} },
		func() { cut = root2Endpoint.Addr(); n.traffic(2 * time.Minute); cut = netip.Addr{} },
		func() { cut = netip.MustParseAddr("7.0.0.1"); n.Run(10 * time.Minute); cut = netip.Addr{} },
		func() { // the root forgets everything
			n.Detach(n.root.port)
			n.traffic(time.Minute)
			n.root = newHost(t, n.Net, n.ids[0], n.planet, rootEndpoint)
		},
		func() {},
	}
	sizes := func() (out []int) {
		for _, h := range []*host{n.a, n.b, n.root, n.root2} {
			for _, table := range h.core.Stats().Tables {
				out = append(out, table.Len)
			}
			paths := 0
			for _, p := range h.core.Peers() {
				paths += len(p.Paths)
			}
			out = append(out, paths)
		}
		return out
	}
	var early, late []int
	var earlyHeap, lateHeap uint64
	goroutines := runtime.NumGoroutine()
	for hour := range hours {
		start := n.Now
		events[rnd.IntN(len(events))]()
		if gap := n.traffic(90 * time.Second); gap > 45*time.Second {
			t.Errorf("hour %d: no traffic for %v", hour, gap)
		}
		if first, second := n.exchange(500*time.Millisecond), n.exchange(500*time.Millisecond); !first && !second { // one may get lost
			t.Errorf("hour %d: no traffic at its end", hour)
		}
		if !n.direct() {
			t.Errorf("hour %d: not direct", hour)
		}
		n.Run(time.Hour - n.Now.Sub(start))
		if !n.a.core.Online() || !n.b.core.Online() {
			t.Errorf("hour %d: offline", hour)
		}
		late, lateHeap = sizes(), heap()
		if hour == min(2, hours-1) {
			early, earlyHeap = late, lateHeap
		}
	}
	for i := range late {
		if late[i] > early[i]+8 {
			t.Errorf("table %d grew from %d to %d entries", i, early[i], late[i])
		}
	}
	t.Logf("heap %d KiB after 3 hours, %d KiB after %d", earlyHeap>>10, lateHeap>>10, hours)
	if lateHeap > earlyHeap+256<<10 {
		t.Errorf("the heap grew from %d to %d KiB", earlyHeap>>10, lateHeap>>10)
	}
	if g := runtime.NumGoroutine(); g > goroutines {
		t.Errorf("%d goroutines, %d at first", g, goroutines)
	}
}

// between reports whether a datagram travels between two hosts, either way.
func between(from, to, a, b netip.AddrPort) bool {
	return from.Addr() == a.Addr() && to.Addr() == b.Addr() || from.Addr() == b.Addr() && to.Addr() == a.Addr()
}

// Each leaf reaches one root only, and not the other leaf: identities and packets
// cross both roots.
func TestTwoHopRelay(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 2, nats{})
	a, b := ap("8.0.0.1:1"), ap("8.0.0.2:1")
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		return between(from, to, a, b) || between(from, to, a, root2Endpoint) || between(from, to, b, rootEndpoint)
	}
	n.online(t)
	if !n.RunUntil(10*time.Second, func() bool { return n.exchange(200 * time.Millisecond) }) {
		t.Fatal("no traffic through two roots")
	}
	if gap := n.traffic(3 * time.Minute); gap > 2*time.Second {
		t.Errorf("no traffic for %v", gap)
	}
	if n.a.hops != 2 || n.b.hops != 2 {
		t.Errorf("%d and %d hops, want 2", n.a.hops, n.b.hops)
	}
	// A packet for nobody does not run in circles.
	sent := n.root.core.Stats().Relayed + n.root2.core.Stats().Relayed
	p := packet.Packet(make([]byte, 100))
	packet.PutHeader(p, 1, 0x1122334455, n.a.id.Address(), packet.VerbFrame)
	for range 100 {
		n.a.port.Send(0, rootEndpoint, nil, p)
		n.Run(10 * time.Millisecond)
	}
	if got := n.root.core.Stats().Relayed + n.root2.core.Stats().Relayed - sent; got > 450 {
		t.Errorf("%d relayed packets of 100 sent from two sockets", got)
	}
}

// Two families: when one fails the other takes over, and comes back.
func TestBothFamilies(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	v6 := ap("[2600::1]:9993")
	n.planet = vl1.NewPlanet(78, 1000, []vl1.Root{{Identity: n.ids[0].Public(), Endpoints: []netip.AddrPort{rootEndpoint, v6}}}, n.key.Public())
	for _, h := range []*host{n.root, n.a, n.b} {
		n.Detach(h.port)
	}
	n.root = newHost(t, n.Net, n.ids[0], n.planet, rootEndpoint, v6)
	n.a = newHost(t, n.Net, n.ids[1], n.planet, ap("8.0.0.1:9993"), ap("[2600::a]:9993"))
	n.b = newHost(t, n.Net, n.ids[2], n.planet, ap("8.0.0.2:9993"), ap("[2600::b]:9993"))
	n.connect(t, 10*time.Second)
	n.traffic(40 * time.Second) // paths of both families are found
	families := func() (v4, v6 bool) {
		for _, p := range n.a.core.Peers() {
			for _, pa := range p.Paths {
				if p.Address == n.b.id.Address() {
					v4, v6 = v4 || pa.Endpoint.Addr().Is4(), v6 || pa.Endpoint.Addr().Is6()
				}
			}
		}
		return v4, v6
	}
	if v4, v6 := families(); !v4 || !v6 {
		t.Errorf("paths: IPv4 %v, IPv6 %v", v4, v6)
	}
	var block func(netip.Addr) bool
	n.Drop = func(from, _ netip.AddrPort, _ []byte) bool { return block(from.Addr()) }
	for name, f := range map[string]func(netip.Addr) bool{"IPv4": netip.Addr.Is4, "IPv6": netip.Addr.Is6} {
		block = f
		if gap := n.traffic(time.Minute); gap > 10*time.Second {
			t.Errorf("%s blocked: no traffic for %v", name, gap)
		}
		if !n.direct() || !n.a.core.Online() {
			t.Errorf("%s blocked: not direct or not online", name)
		}
		block = func(netip.Addr) bool { return false }
		n.traffic(time.Minute)
	}
}

// A contact is found, reached directly and kept, though nobody sends it anything.
func TestContacts(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, portRestricted)
	n.online(t)
	if refused := n.a.core.KeepContact([]identity.Address{n.b.id.Address(), n.a.id.Address(), 0}); refused != 0 {
		t.Errorf("%d refused", refused)
	}
	if !n.RunUntil(40*time.Second, n.direct) {
		t.Fatal("not in direct contact after 40 s")
	}
	for range 60 {
		n.Run(20 * time.Second)
		if !direct(n.a, n.b) {
			t.Fatal("contact lost while idle")
		}
	}
	sent := 0
	n.Seen = func(from, to netip.AddrPort, _ []byte) {
		if from.Addr() == netip.MustParseAddr("9.0.0.1") && to.Addr() == netip.MustParseAddr("7.0.0.1") {
			sent++
		}
	}
	n.Run(10 * time.Minute)
	if sent > 2*(10*60/14+10*60/60)+10 { // probes that are answered, and as many answers to B's
		t.Errorf("%d datagrams in 10 idle minutes", sent)
	}
	n.Detach(n.b.port) // B is gone for long, and comes back
	n.Run(15 * time.Minute)
	n.b = newHostBehind(t, n.Net, n.natB, n.ids[2], n.planet, leafAt(n.natB, "")...)
	if !n.RunUntil(time.Minute, n.direct) {
		t.Error("a contact that came back was not found")
	}
	n.a.core.KeepContact(nil)
	n.Run(20 * time.Minute)
	if direct(n.a, n.b) {
		t.Error("contact is kept that nobody wants any more")
	}
	if got := n.a.core.KeepContact(make([]identity.Address, 100)); got != 36 {
		t.Errorf("%d of 100 refused", got)
	}
}

// Contacts that nobody knows are asked for slowly, and all of them.
func TestUnknownContactsAreFew(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.online(t)
	n.Run(5 * time.Second)
	var list []identity.Address
	for i := range 64 {
		list = append(list, identity.Address(0x1000000000+i))
	}
	sent := 0
	n.Seen = func(from, to netip.AddrPort, d []byte) {
		if from.Addr() == n.a.port.Endpoints()[0].Addr() && to == rootEndpoint && len(d) == packet.HeaderLen+identity.AddressLen {
			sent++
		}
	}
	n.a.core.KeepContact(list)
	for i := range 60 {
		n.a.core.KeepContact(list) // as by a configuration that changes all the time
		before := sent
		n.Run(time.Second)
		if got := sent - before; got > 9 {
			t.Errorf("%d questions in second %d", got, i)
		}
	}
	if sent < 30 || sent > 4*60+5 {
		t.Errorf("%d questions in a minute", sent)
	}
	n.a.core.KeepContact(list)
	sent = 0
	n.Run(25 * time.Second)
	if sent < 64 {
		t.Errorf("only %d of 64 asked for", sent)
	}
}

// restartA starts A, which was detached, with B's record in its cache; newest lists
// the cache.
func (n *internet) restartA(t *testing.T, b *vl1.PeerRecord, newest func() []identity.Address) {
	n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
		c.Planet = n.planet
		c.StoredPeer = func(a identity.Address) *vl1.PeerRecord {
			if a == b.Identity.Address() {
				return b
			}
			return nil
		}
		c.StoredPeers = func(int) []identity.Address { return newest() }
	}, leafAt(nil, "8.0.0.1")...)
}

// A peer of the cache whose first HELLO was lost, or that was known already from a
// packet of its own, is greeted again.
func TestReviveAgain(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.online(t)
	n.Run(time.Second)
	b := vl1.PeerRecord{Identity: n.b.id.Public(), ProtocolVersion: 12, Endpoints: n.b.port.Endpoints()}
	n.Detach(n.a.port)
	lost := true
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		return lost || from == rootEndpoint || to == rootEndpoint
	}
	n.restartA(t, &b, func() []identity.Address { return []identity.Address{n.b.id.Address()} })
	n.Run(7 * time.Second)
	if n.a.core.Peer(n.b.id.Address()) == nil || direct(n.a, n.b) {
		t.Fatal("want a peer that is known and wasn't reached")
	}
	lost = false
	if !n.RunUntil(15*time.Second, func() bool { return direct(n.a, n.b) }) {
		t.Error("no contact after the second round")
	}
}

// Once a root answers, it tells where peers are: silent ones aren't greeted any more.
func TestReviveEndsWithARoot(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.online(t)
	n.Run(time.Second)
	b := vl1.PeerRecord{Identity: n.b.id.Public(), ProtocolVersion: 12, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("8.9.9.9:9993")}}
	n.Detach(n.a.port)
	rooted, greeted := false, 0
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		if to == b.Endpoints[0] {
			greeted++
		}
		return !rooted && (from == rootEndpoint || to == rootEndpoint)
	}
	n.restartA(t, &b, func() []identity.Address { return []identity.Address{n.b.id.Address()} })
	n.Run(20 * time.Second)
	before := greeted
	if before < 2 {
		t.Fatalf("greeted %d times in the first two rounds", before)
	}
	rooted = true
	if !n.RunUntil(time.Minute, n.a.core.Online) {
		t.Fatal("the root doesn't answer")
	}
	before = greeted
	n.Run(5 * time.Minute)
	if greeted != before {
		t.Errorf("greeted %d times more", greeted-before)
	}
}

// A node reads its peer cache at once only if no root answers at its start.
func TestReviveFromCache(t *testing.T) {
	t.Parallel()
	for name, rooted := range map[string]bool{"with a root": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, 1, nats{})
			n.online(t)
			n.Run(time.Second)
			b := vl1.PeerRecord{Identity: n.b.id.Public(), ProtocolVersion: 12, Endpoints: n.b.port.Endpoints()}
			n.Detach(n.a.port)
			n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
				return !rooted && (from == rootEndpoint || to == rootEndpoint)
			}
			read := 0
			n.restartA(t, &b, func() []identity.Address {
				read++
				return []identity.Address{n.b.id.Address(), 0x0123456789}
			})
			n.Run(10 * time.Second)
			if known := n.a.core.Peer(n.b.id.Address()) != nil; known == rooted || (read > 0) == rooted {
				t.Errorf("cache read %d times, peer known: %v", read, known)
			}
			if !rooted && !direct(n.a, n.b) {
				t.Error("no contact with a peer of the cache")
			}
			n.Run(30 * time.Minute)
			if read > 1 {
				t.Errorf("cache read %d times", read)
			}
		})
	}
}

// What takes the way through a root is counted apart from what goes directly.
func TestRelayedBytes(t *testing.T) {
	n := newInternet(t, 1, nats{mapping(simnet.Symmetric), mapping(simnet.Symmetric)})
	n.online(t)
	n.traffic(20 * time.Second)
	for direction, relayed := range n.a.core.Stats().RelayBytes {
		if relayed == 0 {
			t.Errorf("nothing relayed in direction %d", direction)
		}
	}
	n = newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	before := n.a.core.Stats()
	n.traffic(20 * time.Second)
	if n.a.core.Stats().RelayBytes != before.RelayBytes {
		t.Error("direct traffic counts as relayed")
	}
}
