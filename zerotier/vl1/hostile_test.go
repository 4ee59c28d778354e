package vl1_test

import (
	"encoding/binary"
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

var floodCount = flag.Int("flood", 20000, "hostile datagrams in TestFlood")

// meter is an [vl1.Out] that counts what goes to each address.
type meter struct {
	bytes map[netip.Addr]int
	total int
	last  []packet.ID // of the latest datagrams
}

func newMeter() *meter { return &meter{bytes: make(map[netip.Addr]int)} }

func (m *meter) Send(_ vl1.SocketID, to netip.AddrPort, head, data []byte) {
	n := len(head) + len(data)
	if len(m.bytes) < 1<<16 {
		m.bytes[to.Addr()] += n
	}
	m.total += n
	if len(head) == 0 && len(data) >= packet.HeaderLen {
		if m.last = append(m.last, packet.Packet(data).ID()); len(m.last) > 8 {
			m.last = m.last[1:]
		}
	}
}
func (m *meter) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// relayed is how many bytes went to an address.
func (m *meter) relayed(h *host) int { return m.bytes[h.port.Endpoints()[0].Addr()] }

// A flood through a root leaves others their share: of what one source sends, and of what
// is sent to one node, 100 MB a second are relayed. Less than that passes whole.
func TestRelayIsBounded(t *testing.T) {
	n, r, a, b := lab(t)
	for range 3 {
		a.send(n, b, 100)
		b.send(n, a, 100)
		n.Run(2 * time.Second)
	}
	w := r.core.NewWorker()
	source := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 4000)
	}
	const size, tick = 1400, 10 * time.Millisecond
	now := n.Now
	// flood lets each source send to a node at a rate, for a second, and returns what was
	// relayed.
	flood := func(to *host, rate int, sources ...int) int {
		out := newMeter()
		p := packet.Packet(make([]byte, size))
		for range int(time.Second / tick) {
			now = now.Add(tick)
			for range rate / int(time.Second/tick) / size {
				for _, i := range sources {
					packet.PutHeader(p, 1, to.id.Address(), 0x0123456789, packet.VerbFrame)
					r.core.Receive(w.Begin(out, now), 1, source(i), p)
				}
			}
		}
		return out.relayed(to)
	}
	const mb = 1_000_000
	if got := flood(b, 80*mb, 1); got < 79*mb {
		t.Errorf("%d MB of 80 relayed", got/mb)
	}
	now = now.Add(time.Second)
	before := r.core.Stats().RejectedBy(vl1.RejectRelayRate)
	if got := flood(b, 300*mb, 1); got < 120*mb || got > 150*mb { // the first half second's worth at once
		t.Errorf("%d MB of one source relayed", got/mb)
	}
	if r.core.Stats().RejectedBy(vl1.RejectRelayRate) == before {
		t.Error("nothing was counted")
	}
	if got := flood(a, 50*mb, 2); got < 49*mb {
		t.Errorf("%d MB of 50 of another source, to another node", got/mb)
	}
	now = now.Add(time.Second)
	if got := flood(b, 60*mb, 3, 4, 5, 6, 7); got < 120*mb || got > 150*mb {
		t.Errorf("%d MB of five sources relayed to one node", got/mb)
	}
	if got := flood(a, 50*mb, 8); got < 49*mb {
		t.Errorf("%d MB of 50 to another node", got/mb)
	}
	p := packet.Packet(make([]byte, size))
	if got := testing.AllocsPerRun(100, func() {
		packet.PutHeader(p, 1, a.id.Address(), 0x0123456789, packet.VerbFrame)
		r.core.Receive(w.Begin(discard{}, now), 1, source(9), p)
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

// Of IPv6 a whole /64 is one source: whoever has one has all its addresses.
func TestRelayIsBoundedByNetwork(t *testing.T) {
	for name, tt := range map[string]struct {
		sources     [2]string
		least, most int // MB of 160 in a second
	}{
		"one /64":      {[2]string{"[2001:db8::1]:9", "[2001:db8::ffff:1]:9"}, 120, 151},
		"two networks": {[2]string{"[2001:db8::1]:9", "[2001:db8:0:1::1]:9"}, 159, 161},
	} {
		n, r, a, b := lab(t)
		for range 3 {
			a.send(n, b, 100)
			b.send(n, a, 100)
			n.Run(2 * time.Second)
		}
		w, out, now := r.core.NewWorker(), newMeter(), n.Now
		const size, each, tick = 1400, 80_000_000, 10 * time.Millisecond
		p := packet.Packet(make([]byte, size))
		for range int(time.Second / tick) {
			now = now.Add(tick)
			for range each / int(time.Second/tick) / size {
				for i, to := range []*host{a, b} {
					packet.PutHeader(p, 1, to.id.Address(), 0x0123456789, packet.VerbFrame)
					r.core.Receive(w.Begin(out, now), 1, ap(tt.sources[i]), p)
				}
			}
		}
		if got := (out.relayed(a) + out.relayed(b)) / 1_000_000; got < tt.least || got > tt.most {
			t.Errorf("%s: %d MB of 160 relayed", name, got)
		}
	}
}

// What others send as trace, as messages or for bonding goes nowhere, in any suite.
func TestTraceIsDropped(t *testing.T) {
	n, _, a, b := lab(t)
	a.send(n, b, 100)
	n.Run(2 * time.Second)
	before, voice, out := b.core.Stats(), newVoice(t, a.id, b.id), newMeter()
	for _, suite := range []packet.Suite{packet.SuitePoly1305, packet.SuiteSalsa, packet.SuiteAES} {
		for _, v := range []packet.Verb{packet.VerbAck, packet.VerbQoSMeasurement, packet.VerbPathNegotiationRequest} {
			b.core.Receive(b.w.Begin(out, n.Now), 1, a.port.Endpoints()[0], voice.say(v, suite, make([]byte, 10)))
		}
	}
	after := b.core.Stats()
	for _, r := range vl1.Rejects() {
		if got := after.RejectedBy(r) - before.RejectedBy(r); got != 0 || out.total != 0 {
			t.Errorf("of bonding's messages %d were refused as %v, %d bytes in answer", got, r, out.total)
		}
	}
	for _, v := range []packet.Verb{packet.VerbRemoteTrace, packet.VerbUserMessage} {
		a.core.Send(a.w.Begin(a.port, n.Now), b.id.Address(), v, make([]byte, 5000), vl1.SendOpts{})
	}
	n.Run(time.Second)
	if len(b.verbs) != 1 || b.verbs[packet.VerbFrame] == 0 {
		t.Errorf("handed up: %v", b.verbs)
	}
}

// discard is an [vl1.Out] to nowhere.
type discard struct{}

func (discard) Send(vl1.SocketID, netip.AddrPort, []byte, []byte) {}
func (discard) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

// voice makes packets of a node that isn't there.
type voice struct {
	id   *identity.Identity
	keys *packet.Keys
	to   identity.Address
	s    packet.Scratch
	rnd  *rand.ChaCha8
}

func newVoice(t testing.TB, from *identity.Identity, to *identity.Identity) *voice {
	session, err := from.Agree(to)
	if err != nil {
		t.Fatal(err)
	}
	return &voice{id: from, keys: packet.NewKeys(session), to: to.Address(), rnd: rand.NewChaCha8([32]byte{byte(from.Address())})}
}

func (v *voice) say(verb packet.Verb, suite packet.Suite, payload []byte) packet.Packet {
	p := packet.Packet(append(make([]byte, packet.HeaderLen), payload...))
	packet.PutHeader(p, packet.ID(v.rnd.Uint64()), v.to, v.id.Address(), verb)
	v.keys.Seal(p, suite, &v.s)
	return p
}

// hello makes a HELLO that claims an old planet, which asks for the new one.
func (v *voice) hello(protocol byte, planet *vl1.World) packet.Packet {
	b := append([]byte{protocol, 1, 14, 0, 1}, make([]byte, 8)...)
	b = v.id.Public().AppendBinary(b)
	b = packet.AppendEndpoint(b, ap("5.0.0.1:9993"))
	b = binary.BigEndian.AppendUint64(b, planet.ID)
	b = binary.BigEndian.AppendUint64(b, uint64(planet.Timestamp-1))
	masked := packet.HeaderLen + len(b)
	p := packet.Packet(append(append(make([]byte, packet.HeaderLen), b...), 0, 0))
	packet.PutHeader(p, packet.ID(v.rnd.Uint64()), v.to, v.id.Address(), packet.VerbHello)
	v.keys.MaskHello(p, masked, &v.s)
	v.keys.Seal(p, packet.SuitePoly1305, &v.s)
	return p
}

// Whoever does not prove that he is where he says gets no more bytes than he sent,
// however old his planet, however often he asks.
func TestNoAmplification(t *testing.T) {
	t.Parallel()
	for _, protocol := range []byte{4, 9, 12} {
		n := newInternet(t, 1, nats{})
		n.Run(time.Second)
		v := newVoice(t, n.ids[2], n.ids[0])
		out := newMeter()
		var other byte
		in := make(map[netip.Addr]int)
		receive := func(from netip.Addr, d packet.Packet) {
			in[from] += len(d)
			n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, netip.AddrPortFrom(from, 666), d)
			n.Run(time.Millisecond)
			if out.bytes[from] > in[from] {
				t.Fatalf("protocol %d: %v got %d bytes for %d", protocol, from, out.bytes[from], in[from])
			}
		}
		for range 200 { // one victim, again and again
			receive(netip.MustParseAddr("44.0.0.1"), v.hello(protocol, n.planet))
		}
		for range 200 { // many victims
			other++
			receive(netip.AddrFrom4([4]byte{45, 0, 0, other}), v.hello(protocol, n.planet))
		}
		if out.total == 0 {
			t.Error("not even an answer")
		}
		// Nothing without a valid MAC is answered at all.
		out = newMeter()
		for i := range 200 {
			d := v.hello(protocol, n.planet)
			d[len(d)-1-i%90] ^= 1
			n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap("46.0.0.1:666"), d)
		}
		if out.bytes[netip.MustParseAddr("46.0.0.1")] != 0 {
			t.Errorf("%d bytes in answer to forgeries", out.bytes[netip.MustParseAddr("46.0.0.1")])
		}
	}
}

// A newcomer that claims an old planet gets the new one once its endpoint is
// proven.
func TestWorldAfterProof(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	old := vl1.NewPlanet(n.planet.ID, n.planet.Timestamp-1, n.roots(1), n.key.Public())
	next := *n.planet
	next.Sign(n.key)
	n.Detach(n.root.port)
	n.Detach(n.a.port)
	newHost(t, n.Net, n.ids[0], &next, rootEndpoint)
	a := newHost(t, n.Net, n.ids[1], old, ap("8.0.0.1:9993"))
	if !n.RunUntil(2*time.Second, func() bool { return a.core.Planet().Timestamp == next.Timestamp }) {
		t.Error("no new planet within two seconds")
	}
}

// hostile makes datagrams of every kind that an attacker can send without owning
// an identity the target knows.
type hostile struct {
	rnd    *rand.Rand
	target identity.Address
	known  []identity.Address
	seen   [][]byte // captured, to be sent again and changed
}

func (h *hostile) source() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(60 + h.rnd.IntN(40)), byte(h.rnd.Uint32()), byte(h.rnd.Uint32()), byte(h.rnd.Uint32())}), uint16(1+h.rnd.IntN(65535)))
}

func (h *hostile) datagram() []byte {
	d := make([]byte, 1+h.rnd.IntN(300))
	for i := range d {
		d[i] = byte(h.rnd.Uint32())
	}
	header := func(src identity.Address) {
		if len(d) >= packet.HeaderLen {
			flags := d[18]
			packet.PutHeader(d, packet.ID(h.rnd.Uint64()), h.target, src, packet.Verb(d[27]))
			d[18] = flags
		}
	}
	switch h.rnd.IntN(8) {
	case 0: // garbage
	case 1: // from nobody
		header(identity.Address(h.rnd.Uint64() & (1<<40 - 1)))
	case 2: // in the name of a known peer
		header(h.known[h.rnd.IntN(len(h.known))])
	case 3: // head of a packet that never ends
		header(h.known[h.rnd.IntN(len(h.known))])
		if len(d) >= packet.HeaderLen {
			d[18] |= 0x40
		}
	case 4: // later part of one that never began
		if len(d) > packet.FragmentHeaderLen {
			header(0)
			d[13], d[14], d[15] = 0xff, 0x21, 0
		}
	case 5: // captured
		d = append(d[:0], h.seen[h.rnd.IntN(len(h.seen))]...)
	case 6: // captured and damaged
		d = append(d[:0], h.seen[h.rnd.IntN(len(h.seen))]...)
		d[h.rnd.IntN(len(d))] ^= 1 << h.rnd.IntN(8)
	case 7: // to be relayed
		header(identity.Address(h.rnd.Uint64() & (1<<40 - 1)))
		if len(d) >= packet.HeaderLen {
			identity.Address(h.rnd.Uint64() & (1<<40 - 1)).Put(d[8:])
		}
	}
	return d
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// Memory, queues and answers stay within bounds under a flood, and service goes
// on. Give -flood 1000000 for the long form.
func TestFlood(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	for name, target := range map[string]*host{"root": n.root, "leaf": n.b} {
		h := &hostile{
			rnd: rand.New(rand.NewPCG(1, 2)), target: target.id.Address(),
			known: []identity.Address{n.a.id.Address(), n.root.id.Address(), n.b.id.Address()},
		}
		n.Seen = func(_, to netip.AddrPort, d []byte) {
			if to == target.port.Endpoints()[0] && len(h.seen) < 200 {
				h.seen = append(h.seen, append([]byte(nil), d...))
			}
		}
		n.traffic(20 * time.Second)
		n.Seen = nil
		out := newMeter()
		before := heap()
		for i := range *floodCount {
			target.core.Receive(target.w.Begin(out, n.Now), 1, h.source(), h.datagram())
			if i%200 == 0 {
				n.Run(10 * time.Millisecond)
			}
		}
		grown := int64(heap()) - int64(before)
		t.Logf("%s: heap grew by %d KiB after %d datagrams", name, grown>>10, *floodCount)
		if grown > 24<<20 {
			t.Errorf("%s: the heap grew by %d MiB", name, grown>>20)
		}
		st := target.core.Stats()
		if st.OutQueue > st.OutQueueLimit || st.HeldQueue > st.HeldQueueLimit || st.RetryQueue > st.RetryQueueLimit {
			t.Errorf("%s: queues over their limits: %+v", name, st)
		}
		if st.Peers > 4 {
			t.Errorf("%s: %d peers", name, st.Peers)
		}
		for _, p := range target.core.Peers() {
			for _, pa := range p.Paths {
				if b := pa.Endpoint.Addr().As4()[0]; b >= 60 && b < 100 {
					t.Errorf("%s: path to the attacker's %v", name, pa.Endpoint)
				}
			}
		}
		if gap := n.traffic(10 * time.Second); gap > time.Second {
			t.Errorf("%s: no traffic for %v after the flood", name, gap)
		}
	}
}

// An authenticated stranger each, with its own identity, is remembered; no more
// than the limit of them. The bound itself is lowered for the test by the gates:
// one network brings few identities.
func TestManyIdentitiesFromOneNetwork(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.Run(time.Second)
	before := n.root.core.Stats()
	out := newMeter()
	const tries = 300
	for range tries {
		id := fakeIdentity(t, n.ids[4], uint64(out.total)+rand.Uint64())
		v := newVoice(t, id, n.ids[0])
		n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap("70.1.2.3:9"), v.hello(12, n.planet))
	}
	st := n.root.core.Stats()
	if st.Peers != before.Peers {
		t.Errorf("%d peers with invalid identities", st.Peers-before.Peers)
	}
	if st.RejectedBy(vl1.RejectRate)-before.RejectedBy(vl1.RejectRate) < tries-20 {
		t.Errorf("only %d refused for their rate", st.RejectedBy(vl1.RejectRate)-before.RejectedBy(vl1.RejectRate))
	}
}

// When strangers come in numbers their identities are checked in the background,
// one at a time, and whoever is genuine gets in.
func TestBackgroundChecks(t *testing.T) {
	t.Parallel()
	n := newInternet(t, 1, nats{})
	n.Detach(n.root.port)
	var jobs []func()
	inline := 0
	root := newHostWith(t, n.Net, nil, n.ids[0], func(c *vl1.Config) {
		c.Planet = n.planet
		c.Background = func(f func()) { jobs = append(jobs, f) }
		c.Validate = func(id *identity.Identity) error { inline++; return validated(id) }
	}, rootEndpoint)
	now, out := n.Now, newMeter()
	for i := range 100 {
		v := newVoice(t, fakeIdentity(t, n.ids[4], rand.Uint64()), n.ids[0])
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{70, 1, byte(i), 1}), 9)
		root.core.Receive(root.w.Begin(out, now), 1, from, v.hello(12, n.planet))
	}
	if inline > 16 || len(jobs) != 1 {
		t.Fatalf("%d checks at once, %d in the background", inline, len(jobs))
	}
	jobs[0]()
	jobs = nil
	genuine := newVoice(t, n.ids[2], n.ids[0])
	root.core.Receive(root.w.Begin(out, now), 1, ap("71.0.0.1:9"), genuine.hello(12, n.planet))
	if len(jobs) != 1 || root.core.Peer(n.ids[2].Address()) != nil {
		t.Fatalf("%d checks in the background", len(jobs))
	}
	jobs[0]()
	root.core.Tick(out, now)
	if root.core.Peer(n.ids[2].Address()) == nil || out.bytes[netip.MustParseAddr("71.0.0.1")] == 0 {
		t.Error("the genuine stranger was not answered")
	}
	if st := root.core.Stats(); st.HeldQueue != 0 {
		t.Errorf("%d packets still held", st.HeldQueue)
	}
}

// fakeIdentity has working keys but an address that doesn't follow from them.
func fakeIdentity(t testing.TB, like *identity.Identity, x uint64) *identity.Identity {
	b := like.SecretString()
	addr := identity.Address(x&(1<<40-1) | 1)
	if addr.Reserved() {
		addr = 1
	}
	id, err := identity.Parse(addr.String() + b[10:])
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// target is a node whose every input the fuzzer chooses. It is a leaf or a root;
// it knows a root and a peer without any slow check.
type target struct {
	*host
	root, peer *voice
	out        *meter
	now        time.Time
}

func newTarget(t testing.TB, isRoot bool) *target {
	ids := testIDs(t)
	n := simnet.New()
	roots := []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{rootEndpoint}}}
	if isRoot {
		roots = append(roots, vl1.Root{Identity: ids[1].Public(), Endpoints: []netip.AddrPort{root2Endpoint}})
	}
	x := &target{out: newMeter(), now: n.Now}
	x.host = newHostWith(t, n, nil, ids[1], func(c *vl1.Config) {
		c.Planet = vl1.NewPlanet(5, 100, roots, planetKey().Public())
		c.Physical = []vl1.PhysicalNetwork{{Prefix: netip.MustParsePrefix("9.9.0.0/16"), MTU: 1400, TrustedPath: 7}}
		c.StoredPeer = func(a identity.Address) *vl1.PeerRecord {
			if a == ids[2].Address() {
				return &vl1.PeerRecord{Identity: ids[2].Public(), ProtocolVersion: 12, Endpoints: []netip.AddrPort{ap("8.0.0.2:9993")}}
			}
			return nil
		}
	}, ap("8.0.0.1:9993"))
	x.root, x.peer = newVoice(t, ids[0], ids[1]), newVoice(t, ids[2], ids[1])
	x.core.Tick(x.out, x.now)
	x.core.Lookup(x.w.Begin(x.out, x.now), ids[2].Address())
	return x
}

// step feeds one instruction and returns the rest of the script.
//
//	op | verb | length | payload
//
// In payloads of OK and ERROR an in-re packet ID of 0 stands for the latest packet
// that the node sent, and 1 to 7 for those before, so that the fuzzer need not
// guess.
func (x *target) step(b []byte) []byte {
	if len(b) < 3 {
		return nil
	}
	op, verb, n := b[0], packet.Verb(b[1]&0x1f), min(int(b[2]), len(b)-3)
	payload, rest := append([]byte(nil), b[3:3+n]...), b[3+n:]
	if (verb == packet.VerbOK || verb == packet.VerbError) && len(payload) >= 9 {
		if i := binary.BigEndian.Uint64(payload[1:]); i < uint64(len(x.out.last)) {
			binary.BigEndian.PutUint64(payload[1:], uint64(x.out.last[len(x.out.last)-1-int(i)]))
		}
	}
	voices := [...]*voice{x.root, x.peer}
	from := [...]netip.AddrPort{rootEndpoint, ap("8.0.0.2:9993"), ap("66.0.0.1:1"), ap("9.9.0.1:9993"), ap("[2600::1]:9993")}
	v, at := voices[op>>4&1], from[int(op>>5)%len(from)]
	switch op & 0x0f {
	case 0: // as it is
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, payload)
	case 1, 2, 3, 4, 5: // authentic
		suite := packet.SuiteAES
		if op&1 == 0 {
			suite = packet.SuiteSalsa
		}
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, v.say(verb, suite, payload))
	case 6: // authentic, relayed
		p := v.say(verb, packet.SuiteAES, payload)
		p.SetHops(1)
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, p)
	case 7: // clear
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, v.say(verb, packet.SuitePoly1305, payload))
	case 8: // a later part
		p := append(make([]byte, 14), payload...)
		packet.PutHeader(append(p, make([]byte, 28)...), 1, x.id.Address(), 0, 0)
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, p)
	case 9: // for somebody else
		p := v.say(verb, packet.SuiteAES, payload)
		identity.Address(0x1122334455).Put(p[8:])
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, p)
	case 10:
		x.now = x.now.Add(time.Duration(b[2]) * 100 * time.Millisecond)
		x.core.Tick(x.out, x.now)
	case 11:
		x.now = x.now.Add(time.Duration(b[2]) * 10 * time.Second)
		x.core.Tick(x.out, x.now)
	case 12:
		x.core.Send(x.w.Begin(x.out, x.now), v.id.Address(), verb, payload, vl1.SendOpts{ExpectReply: true, Compress: true})
	case 13:
		x.core.Send(x.w.Begin(x.out, x.now), identity.Address(b[1]), verb, payload, vl1.SendOpts{})
	case 14:
		_ = x.core.Orbit(uint64(b[1]), v.id.Address())
		x.core.Deorbit(uint64(b[2]))
	case 15:
		p := v.say(verb, packet.SuiteAES, payload)
		p.SetTrusted(uint64(b[1]))
		x.core.Receive(x.w.Begin(x.out, x.now), 1, at, p)
	}
	return rest
}

// check looks at what must hold at any moment.
func (x *target) check(t *testing.T) {
	st := x.core.Stats()
	if st.OutQueue > st.OutQueueLimit || st.HeldQueue > st.HeldQueueLimit || st.RetryQueue > st.RetryQueueLimit {
		t.Fatalf("queues over their limits: %+v", st)
	}
	for _, p := range x.core.Peers() {
		if len(p.Paths) > 16 {
			t.Fatalf("%d paths", len(p.Paths))
		}
		for _, pa := range p.Paths {
			if p.Role != vl1.RoleLeaf && pa.Endpoint.Addr() != rootEndpoint.Addr() {
				t.Fatalf("root at %v", pa.Endpoint)
			}
		}
	}
	if len(x.core.Moons()) > 32 {
		t.Fatal("too many moons")
	}
}

// FuzzCore runs scripts of datagrams, authentic or not, time and calls through the
// state machine.
func FuzzCore(f *testing.F) {
	ok := func(v packet.Verb, rest ...byte) []byte {
		return append(append([]byte{byte(v)}, make([]byte, 8)...), rest...)
	}
	op := func(o byte, v packet.Verb, payload []byte) []byte {
		return append([]byte{o, byte(v), byte(len(payload))}, payload...)
	}
	join := func(parts ...[]byte) (b []byte) {
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	rv := append([]byte{0, 0, 0, 0, 0, 9, 0x23, 0x28, 4}, 8, 0, 0, 9)
	push := []byte{0, 1, 0, 0, 0, 4, 6, 8, 0, 0, 7, 0x27, 9}
	f.Add(join(op(1, packet.VerbOK, ok(packet.VerbEcho)), op(1, packet.VerbRendezvous, rv), op(0x31, packet.VerbPushDirectPaths, push),
		op(0x31, packet.VerbEcho, []byte("x")), op(0x31, packet.VerbWhois, []byte{1, 2, 3, 4, 5}), op(10, 0, nil), []byte{11, 0, 50}), false)
	f.Add(join(op(0x31, packet.VerbFrame, []byte("frame")), op(0x36, packet.VerbFrame, nil), op(12, packet.VerbFrame, []byte("y")),
		op(13, packet.VerbFrame, nil), op(14, 3, nil), op(0x79, 6, nil), op(8, 0, []byte{0x21, 0, 1, 2}), op(0x6f, 6, []byte("t"))), true)
	for _, c := range worldsForFuzz(f) {
		f.Add(op(1, packet.VerbOK, ok(packet.VerbHello, append(make([]byte, 14), c...)...)), false)
	}
	f.Fuzz(func(t *testing.T, script []byte, isRoot bool) {
		x := newTarget(t, isRoot)
		for n := 0; len(script) > 0 && n < 200; n++ {
			script = x.step(script)
		}
		x.check(t)
		x.now = x.now.Add(time.Hour)
		x.core.Tick(x.out, x.now)
		x.check(t)
	})
}

func worldsForFuzz(t testing.TB) [][]byte {
	n := newTarget(t, false)
	return [][]byte{n.core.Planet().Append(nil)}
}

// Whoever says HELLO again and again isn't answered each time.
func TestHelloAnswersAreFew(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.Run(time.Second)
	v, out := newVoice(t, n.ids[2], n.ids[0]), newMeter()
	refused := func(hellos int) uint64 {
		before := n.root.core.Stats().RejectedBy(vl1.RejectRate)
		for range hellos {
			n.root.core.Receive(n.root.w.Begin(out, n.Now), 1, ap("44.0.0.1:666"), v.hello(12, n.planet))
		}
		return n.root.core.Stats().RejectedBy(vl1.RejectRate) - before
	}
	if got := refused(100); got != 80 {
		t.Errorf("%d of 100 HELLOs at once weren't answered, want 80", got)
	}
	n.Run(time.Second)
	if got := refused(100); got < 95 || got > 97 {
		t.Errorf("%d of 100 a second later, want 96", got)
	}
}
