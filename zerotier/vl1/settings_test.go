package vl1_test

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
)

// A moon is found through its seed, which need not be a planet root, kept up to
// date in band, and forgotten on request.
func TestMoon(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.online(t)
	ids := n.ids
	moonRoot := []vl1.Root{{Identity: ids[3].Public(), Endpoints: []netip.AddrPort{root2Endpoint}}}
	moon := &vl1.World{Moon: true, ID: uint64(ids[3].Address()), Timestamp: 10, Roots: moonRoot, UpdateKey: n.key.Public()}
	seed := newHost(t, n.Net, ids[3], n.planet, root2Endpoint)
	if err := seed.core.OrbitWorld(moon); err != nil {
		t.Fatal(err)
	}
	if !seed.core.IsRoot() {
		t.Error("the moon's root doesn't know that it is one")
	}
	n.Run(time.Second)
	if err := n.a.core.Orbit(moon.ID, ids[3].Address()); err != nil {
		t.Fatal(err)
	}
	if m := n.a.core.Moons(); len(m) != 1 || m[0].World != nil || m[0].Seed != ids[3].Address() {
		t.Errorf("waiting moon: %+v", m)
	}
	held := func(ts int64) func() bool {
		return func() bool {
			m := n.a.core.Moons()
			return len(m) == 1 && m[0].World != nil && m[0].World.Timestamp == ts
		}
	}
	if !n.RunUntil(30*time.Second, held(10)) {
		t.Fatalf("the seed did not give the moon: %+v", n.a.core.Moons())
	}
	if !n.a.core.IsUpstream(ids[3].Address()) {
		t.Error("the moon's root is no upstream")
	}
	next := &vl1.World{Moon: true, ID: moon.ID, Timestamp: 20, Roots: moonRoot, UpdateKey: n.key.Public()}
	next.Sign(n.key)
	if !seed.core.OfferWorld(next) {
		t.Fatal("refused the next revision")
	}
	if !n.RunUntil(3*time.Minute, held(20)) {
		t.Error("the next revision did not arrive")
	}
	n.Detach(n.root.port)
	n.Run(30 * time.Second)
	if n.a.core.BestUpstream() != ids[3].Address() || !n.a.core.Online() {
		t.Error("the moon's root doesn't stand in for the planet's")
	}
	if !n.a.core.Deorbit(moon.ID) || n.a.core.Deorbit(moon.ID) || len(n.a.core.Moons()) != 0 || n.a.core.IsUpstream(ids[3].Address()) {
		t.Error("moon not forgotten")
	}
}

func TestOrbitBounds(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	for id := uint64(1); ; id++ {
		if err := n.a.core.Orbit(id, 0x1234567890); err != nil {
			if id != 17 {
				t.Errorf("moon %d: %v", id, err)
			}
			break
		}
	}
	for _, bad := range []struct {
		id   uint64
		seed identity.Address
	}{{0, 1}, {1, 0}, {1, 0xff00000000}, {1, n.a.id.Address()}} {
		if n.a.core.Orbit(bad.id, bad.seed) == nil {
			t.Errorf("orbits %x at %s", bad.id, bad.seed)
		}
	}
}

func TestFileNames(t *testing.T) {
	t.Parallel()
	if got := vl1.MoonFile(0xcafe04eba9); got != "000000cafe04eba9.moon" {
		t.Error(got)
	}
	if id, ok := vl1.ParseMoonFile("000000cafe04eba9.moon"); !ok || id != 0xcafe04eba9 {
		t.Error(id, ok)
	}
	if a, ok := vl1.ParsePeerFile(vl1.PeerFile(0x89e92ceee5)); !ok || a != 0x89e92ceee5 {
		t.Error(a, ok)
	}
	for _, bad := range []string{"", ".moon", "cafe04eba9.moon", "000000cafe04eba9", "000000cafe04eba9.moon.tmp", "000000CAFE04EBA9.moon", "00000+cafe04eba9.moon"} {
		if _, ok := vl1.ParseMoonFile(bad); ok {
			t.Errorf("took %q", bad)
		}
	}
}

func TestPeerRecord(t *testing.T) {
	t.Parallel()
	r := &vl1.PeerRecord{
		Identity: testIDs(t)[0].Public(), ProtocolVersion: 12, Version: [3]int{1, 14, 1},
		Endpoints: []netip.AddrPort{ap("8.0.0.1:9993"), ap("[2600::1]:9993")},
	}
	b := r.Append(nil)
	if len(b) != 1+71+10+7+19 || b[0] != 2 {
		t.Fatalf("%d bytes, type %d", len(b), b[0])
	}
	got, err := vl1.ParsePeerRecord(b)
	if err != nil || !got.Identity.Equal(r.Identity) {
		t.Fatal(got, err)
	}
	if d := cmp.Diff(r.Endpoints, got.Endpoints, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" || got.Version != r.Version || got.ProtocolVersion != 12 {
		t.Error(got, d)
	}
	for i := range b {
		if _, err := vl1.ParsePeerRecord(b[:i]); err == nil {
			t.Fatalf("cut at %d accepted", i)
		}
	}
}

// A peer from the cache is reached without any root.
func TestPeerCache(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	n.Run(10 * time.Second)
	cache := make(map[identity.Address]*vl1.PeerRecord)
	for _, r := range n.a.core.PeerRecords() {
		cache[r.Identity.Address()] = &r
	}
	if len(cache) != 2 || len(cache[n.b.id.Address()].Endpoints) == 0 {
		t.Fatalf("%d records", len(cache))
	}
	n.Detach(n.root.port)
	n.Detach(n.a.port)
	asked := 0
	var forgotten []vl1.PeerRecord
	a := newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
		c.Planet = n.planet
		c.StoredPeer = func(x identity.Address) *vl1.PeerRecord { asked++; return cache[x] }
		c.OnForgotten = func(r vl1.PeerRecord) { forgotten = append(forgotten, r) }
	}, ap("8.0.0.1:9993"))
	n.b.got = 0
	a.send(n.Net, n.b, 10)
	n.Run(time.Second)
	if n.b.got != 1 || !direct(a, n.b) {
		t.Errorf("%d frames arrived", n.b.got)
	}
	for range 100 {
		a.core.Send(a.w.Begin(a.port, n.Now), 0x1234567890, packet.VerbFrame, nil, vl1.SendOpts{})
	}
	if asked != 2 {
		t.Errorf("the cache was asked %d times, want 2", asked)
	}
	n.Detach(n.b.port)
	n.Run(15 * time.Minute)
	if !slices.ContainsFunc(forgotten, func(r vl1.PeerRecord) bool { return r.Identity.Equal(n.b.id) }) {
		t.Error("the silent peer was not handed to the cache")
	}
}

// A restarted node understands the peers of its cache at once, without a HELLO of
// theirs; somebody who only claims to be one of them gets nothing out of it.
func TestSenderFromCache(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	n.Run(10 * time.Second)
	cache := make(map[identity.Address]*vl1.PeerRecord)
	for _, r := range n.a.core.PeerRecords() {
		cache[r.Identity.Address()] = &r
	}
	restart := func(old *host) *host {
		n.Detach(old.port)
		return newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
			c.Planet = n.planet
			c.StoredPeer = func(x identity.Address) *vl1.PeerRecord { return cache[x] }
		}, ap("8.0.0.1:9993"))
	}
	n.Detach(n.root.port)
	a := restart(n.a)
	n.b.send(n.Net, a, 10)
	n.Run(time.Second)
	if a.got != 1 || !direct(a, n.b) {
		t.Errorf("%d frames arrived, direct path: %v", a.got, direct(a, n.b))
	}

	a = restart(a)
	forger := newVoice(t, n.root.id, n.ids[1])
	p := forger.say(packet.VerbFrame, packet.SuiteAES, make([]byte, 100))
	packet.PutHeader(p, p.ID(), n.ids[1].Address(), n.b.id.Address(), packet.VerbFrame)
	out := newMeter()
	a.core.Receive(a.w.Begin(out, n.Now), 1, ap("66.0.0.1:1"), p)
	if out.total != 0 || a.got != 0 {
		t.Errorf("a forged packet was answered with %d bytes, %d frames arrived", out.total, a.got)
	}
}

// Suite 2 is used and accepted exactly where both sides name the same number.
func TestTrustedPath(t *testing.T) {
	t.Parallel()
	lan := netip.MustParsePrefix("8.0.0.0/24")
	for name, tt := range map[string]struct {
		a, b    uint64
		arrives bool
	}{
		"same": {7, 7, true}, "other": {7, 8, false}, "sender only": {7, 0, false}, "receiver only": {0, 7, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, 1, nats{})
			n.online(t)
			n.Detach(n.a.port)
			n.Detach(n.b.port)
			with := func(id uint64) func(*vl1.Config) {
				return func(c *vl1.Config) {
					c.Planet = n.planet
					if id != 0 {
						c.Physical = []vl1.PhysicalNetwork{{Prefix: lan, TrustedPath: id, MTU: 9000}}
					}
				}
			}
			n.a = newHostWith(t, n.Net, nil, n.ids[1], with(tt.a), ap("8.0.0.1:9993"))
			n.b = newHostWith(t, n.Net, nil, n.ids[2], with(tt.b), ap("8.0.0.2:9993"))
			n.connect(t, 10*time.Second)
			n.a.send(n.Net, n.b, 5000)
			n.Run(2 * time.Second) // until the path is known to carry large datagrams
			biggest := 0
			n.Seen = func(_, _ netip.AddrPort, d []byte) { biggest = max(biggest, len(d)) }
			n.b.got, n.b.last = 0, nil
			n.a.send(n.Net, n.b, 5000)
			n.Run(100 * time.Millisecond)
			if (n.b.got == 1) != tt.arrives || tt.arrives && len(n.b.last) != 5000 {
				t.Fatalf("%d frames arrived", n.b.got)
			}
			if want := packet.SuiteTrusted; tt.arrives && tt.a == tt.b && n.b.suite != want {
				t.Errorf("suite %d, want %d", n.b.suite, want)
			}
			if (biggest > packet.DefaultMTU) != (tt.a != 0) {
				t.Errorf("datagrams of %d bytes", biggest)
			}
		})
	}
}

// A network configured without a number never takes unprotected packets, not even
// with number 0.
func TestNoTrustInZero(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.online(t)
	n.Detach(n.b.port)
	n.b = newHostWith(t, n.Net, nil, n.ids[2], func(c *vl1.Config) {
		c.Planet = n.planet
		c.Physical = []vl1.PhysicalNetwork{{Prefix: netip.MustParsePrefix("8.0.0.0/24"), MTU: 1400}}
	}, ap("8.0.0.2:9993"))
	n.connect(t, 10*time.Second)
	p := packet.Packet(append(make([]byte, packet.HeaderLen), "spoofed"...))
	packet.PutHeader(p, 99, n.b.id.Address(), n.a.id.Address(), packet.VerbFrame)
	p.SetTrusted(0)
	n.b.got = 0
	n.Inject(ap("8.0.0.1:9993"), ap("8.0.0.2:9993"), p)
	n.Run(100 * time.Millisecond)
	if n.b.got != 0 || bytes.Contains(n.b.last, []byte("spoofed")) {
		t.Error("took an unauthenticated packet")
	}
}

func TestBlacklistAndTry(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.online(t)
	n.Detach(n.a.port)
	bAddr := n.b.id.Address()
	n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
		c.Planet = n.planet
		c.Virtual = map[identity.Address]vl1.VirtualPeer{bAddr: {Blacklist: []netip.Prefix{netip.MustParsePrefix("8.0.0.0/24")}}}
	}, ap("8.0.0.1:9993"))
	n.online(t)
	n.traffic(30 * time.Second)
	if direct(n.a, n.b) {
		t.Error("uses a path that is forbidden")
	}

	// Without introductions and pushes only the configured endpoint leads there.
	n = newInternet(t, 1, nats{})
	n.Detach(n.a.port)
	n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) {
		c.Planet = n.planet
		c.Virtual = map[identity.Address]vl1.VirtualPeer{bAddr: {Try: []netip.AddrPort{ap("8.0.0.2:9993")}}}
	}, ap("8.0.0.1:9993"))
	n.Drop = func(from, to netip.AddrPort, d []byte) bool {
		rendezvous := from == rootEndpoint && len(d) == 41
		return rendezvous || len(d) > 60 && len(d) < 90 // PUSH_DIRECT_PATHS
	}
	n.connect(t, 40*time.Second)
}

// A node in low bandwidth mode sends less, and stays reachable.
func TestLowBandwidth(t *testing.T) {
	t.Parallel()
	sent := func(low bool) (count int) {
		n := newInternet(t, 1, nats{})
		n.Detach(n.a.port)
		n.a = newHostWith(t, n.Net, nil, n.ids[1], func(c *vl1.Config) { c.Planet, c.LowBandwidth = n.planet, low }, ap("8.0.0.1:9993"))
		n.connect(t, 10*time.Second)
		n.Seen = func(from, _ netip.AddrPort, _ []byte) {
			if from.Addr() == ap("8.0.0.1:1").Addr() {
				count++
			}
		}
		n.Run(5 * time.Minute)
		if !n.exchange(time.Second) {
			t.Error("not reachable after idling")
		}
		return count
	}
	usual, low := sent(false), sent(true)
	if low >= usual {
		t.Errorf("%d datagrams in five idle minutes, %d without", low, usual)
	}
}

// Strangers are not kept, whatever they prove about their place: each would be a file.
func TestStrangersAreNotKept(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	stranger := newHostWith(t, n.Net, nil, n.ids[4], func(c *vl1.Config) { c.Planet = n.planet }, ap("43.0.0.1:9993"))
	n.Run(time.Second)
	stranger.core.Send(stranger.w.Begin(stranger.port, n.Now), n.a.id.Address(), packet.VerbNOP, nil, vl1.SendOpts{})
	if !n.RunUntil(time.Minute, func() bool { return direct(n.a, stranger) }) {
		t.Fatal("A has no path to the stranger")
	}
	kept := func(h *host) (out []identity.Address) {
		for _, r := range h.core.PeerRecords() {
			out = append(out, r.Identity.Address())
		}
		return out
	}
	if got := kept(n.a); slices.Contains(got, n.ids[4].Address()) || !slices.Contains(got, n.b.id.Address()) {
		t.Errorf("A keeps %v", got)
	}
	if !slices.Contains(kept(n.root), n.ids[4].Address()) {
		t.Error("a root does not keep who is served by it")
	}
}
