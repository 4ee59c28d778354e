package vl1_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
)

// host is a node that counts the frames it gets.
type host struct {
	core  *vl1.Core
	w     *vl1.Worker
	port  *simnet.Port
	id    *identity.Identity
	got   int
	last  []byte
	hops  uint8
	suite packet.Suite
	verbs map[packet.Verb]int // handed up
}

func (h *host) Receive(out vl1.Out, now time.Time, sock vl1.SocketID, from netip.AddrPort, d []byte) {
	h.core.Receive(h.w.Begin(out, now), sock, from, d)
}
func (h *host) Tick(out vl1.Out, now time.Time) time.Time { return h.core.Tick(out, now) }
func (h *host) PeerLearned(*vl1.Worker, *vl1.Peer)        {}
func (h *host) HandlePacket(_ *vl1.Worker, _ *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	if h.verbs == nil {
		h.verbs = make(map[packet.Verb]int)
	}
	h.verbs[p.Verb()]++
	if p.Verb() == packet.VerbFrame {
		h.got++
		h.last = append(h.last[:0], p.Payload()...)
		h.hops, h.suite = src.Hops, p.Suite()
	}
	return vl1.Result{Trust: true}
}

var (
	idsOnce sync.Once
	ids     []*identity.Identity
)

// testIDs returns identities from the vectors, so that tests need not search for
// them.
func testIDs(t testing.TB) []*identity.Identity {
	idsOnce.Do(func() {
		var v struct {
			Valid []struct {
				Secret string `json:"text_secret"`
			}
		}
		testvec.Load(t, "identity.json", &v)
		for _, x := range v.Valid {
			id, err := identity.Parse(x.Secret)
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
	})
	return ids
}

// validated checks each identity once for all tests.
func validated(id *identity.Identity) error {
	key := id.String()
	if err, ok := checked.Load(key); ok {
		return err.(result).error
	}
	err := id.Validate()
	checked.Store(key, result{err})
	return err
}

var checked sync.Map // of result

type result struct{ error }

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func newHost(t testing.TB, n *simnet.Net, id *identity.Identity, planet *vl1.World, socks ...netip.AddrPort) *host {
	return newHostBehind(t, n, nil, id, planet, socks...)
}

func newHostBehind(t testing.TB, n *simnet.Net, nat *simnet.NAT, id *identity.Identity, planet *vl1.World, socks ...netip.AddrPort) *host {
	return newHostWith(t, n, nat, id, func(c *vl1.Config) { c.Planet = planet }, socks...)
}

func newHostWith(t testing.TB, n *simnet.Net, nat *simnet.NAT, id *identity.Identity, set func(*vl1.Config), socks ...netip.AddrPort) *host {
	h := &host{id: id}
	h.port = n.AttachBehind(nat, h, socks...)
	cfg := vl1.Config{
		Identity: id, Upper: h, Start: n.Now, SoftwareVersion: [3]int{1, 14, 1},
		LocalEndpoints: h.port.Endpoints, SocketOpen: h.port.Open, Validate: validated,
	}
	set(&cfg)
	core, err := vl1.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.core, h.w = core, core.NewWorker()
	return h
}

// lab is a root and two leaves.
func lab(t testing.TB) (n *simnet.Net, r, a, b *host) {
	ids := testIDs(t)
	n = simnet.New()
	planet := &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: ids[0].Public(), Endpoints: []netip.AddrPort{ap("203.0.113.1:9993")}}}}
	r = newHost(t, n, ids[0], planet, ap("203.0.113.1:9993"))
	a = newHost(t, n, ids[1], planet, ap("203.0.113.2:9993"), ap("203.0.113.2:20001"))
	b = newHost(t, n, ids[2], planet, ap("203.0.113.3:9993"))
	return n, r, a, b
}

// send sends a frame from a to b, by the data path if there is a route.
func (a *host) send(n *simnet.Net, to *host, size int) {
	payload := make([]byte, size)
	for i := range payload {
		payload[i] = byte(i)
	}
	if p := a.core.Peer(to.id.Address()); p != nil {
		buf := append(bytes.Repeat([]byte{0xff}, packet.HeaderLen), payload...) // whatever was there before
		if a.core.SendData(a.w.Begin(a.port, n.Now), p, packet.VerbFrame, buf) {
			return
		}
	}
	a.core.Send(a.w.Begin(a.port, n.Now), to.id.Address(), packet.VerbFrame, payload, vl1.SendOpts{})
}

func direct(a, b *host) bool {
	for _, p := range a.core.Peers() {
		if p.Address == b.id.Address() {
			return !p.Relayed
		}
	}
	return false
}

func TestColdStart(t *testing.T) {
	t.Parallel()
	n, r, a, b := lab(t)
	if !n.RunUntil(time.Second, func() bool { return a.core.Online() && b.core.Online() }) {
		t.Fatal("not online after a second")
	}
	if !r.core.IsRoot() || a.core.IsRoot() || a.core.BestUpstream() != r.id.Address() {
		t.Error("roles are wrong")
	}
	a.send(n, b, 100)
	n.Run(time.Second)
	if b.got != 1 {
		t.Fatalf("B got %d frames, want 1", b.got)
	}
	if !direct(a, b) || !direct(b, a) {
		t.Errorf("not direct a second after the first packet: %v %v", direct(a, b), direct(b, a))
	}
	for _, size := range []int{0, 1000, 1404, 1405, 2810, 9000} {
		b.got = 0
		a.send(n, b, size)
		n.Run(time.Second)
		if b.got != 1 || len(b.last) != size || b.hops != 0 || b.suite != packet.SuiteAES {
			t.Errorf("frame of %d bytes: got %d, %d bytes, %d hops, suite %d", size, b.got, len(b.last), b.hops, b.suite)
		}
	}
	if len(a.core.Surface()) == 0 {
		t.Error("the root reported no external address")
	}
}

func TestPathDiesAndHeals(t *testing.T) {
	t.Parallel()
	n, _, a, b := lab(t)
	n.Run(time.Second)
	a.send(n, b, 100)
	n.Run(2 * time.Second)
	if !direct(a, b) {
		t.Fatal("not direct")
	}
	cut := true
	n.Drop = func(from, to netip.AddrPort, _ []byte) bool {
		return cut && from.Addr() != ap("203.0.113.1:1").Addr() && to.Addr() != ap("203.0.113.1:1").Addr()
	}
	start := n.Now
	if !n.RunUntil(time.Minute, func() bool {
		b.got = 0
		a.send(n, b, 100)
		n.Run(100 * time.Millisecond)
		return b.got > 0 && b.hops == 1
	}) {
		t.Fatal("no relayed traffic a minute after the direct path died")
	}
	if took := n.Now.Sub(start); took > 10*time.Second {
		t.Errorf("fell back to the relay after %v", took)
	}
	cut = false
	if !n.RunUntil(time.Minute, func() bool { a.send(n, b, 10); n.Run(time.Second); return direct(a, b) && direct(b, a) }) {
		t.Error("not direct again a minute after healing")
	}
}

func TestIdlePathStays(t *testing.T) {
	t.Parallel()
	n, _, a, b := lab(t)
	n.Run(time.Second)
	a.send(n, b, 100)
	b.send(n, a, 100)
	for range 60 {
		n.Run(5 * time.Second)
		if !direct(a, b) || !direct(b, a) {
			t.Fatalf("direct path lost after %v idle", n.Now.Sub(time.Unix(1_700_000_000, 0)))
		}
	}
	if !a.core.Online() || !b.core.Online() {
		t.Error("offline after idling")
	}
}

// A peer that is started again behind another port of its host is found soon,
// whether it sends from there or by a root: either casts doubt on the path that leads
// to the old port.
func TestRestartAtAnotherPort(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"by a root", "direct"} {
		n, r, a, b := lab(t)
		n.Run(time.Second)
		exchange := func(b *host) {
			a.send(n, b, 100)
			b.send(n, a, 100)
			n.Run(100 * time.Millisecond)
		}
		for range 30 {
			exchange(b)
		}
		if !direct(a, b) || !direct(b, a) {
			t.Fatal("not direct")
		}
		n.Detach(b.port)
		b = newHostWith(t, n, nil, b.id, func(c *vl1.Config) {
			c.Planet = r.core.Planet()
			if name == "direct" {
				c.StoredPeer = func(x identity.Address) *vl1.PeerRecord {
					if x != a.id.Address() {
						return nil
					}
					return &vl1.PeerRecord{Identity: a.id.Public(), Endpoints: []netip.AddrPort{ap("203.0.113.2:9993")}}
				}
			}
		}, ap("203.0.113.3:31415"))
		start := n.Now
		if !n.RunUntil(time.Minute, func() bool { exchange(b); return b.got > 0 }) {
			t.Fatalf("%s: nothing arrives a minute after the restart", name)
		}
		if took := n.Now.Sub(start); took > 5*time.Second {
			t.Errorf("%s: the first frame arrived %v after the restart", name, took)
		}
	}
}

func TestRootRestart(t *testing.T) {
	t.Parallel()
	n, r, a, b := lab(t)
	n.Run(time.Second)
	n.Detach(r.port)
	n.Run(100 * time.Second)
	if a.core.Online() {
		t.Error("still online without the root")
	}
	planet := r.core.Planet()
	newHost(t, n, r.id, planet, ap("203.0.113.1:9993"))
	if !n.RunUntil(20*time.Second, func() bool { return a.core.Online() && b.core.Online() }) {
		t.Error("not online again 20 s after the root came back")
	}
	a.send(n, b, 10)
	n.Run(3 * time.Second)
	if b.got != 1 {
		t.Errorf("B got %d frames", b.got)
	}
}

// Garbage, replays and answers from elsewhere change nothing.
func TestHostile(t *testing.T) {
	t.Parallel()
	n, r, a, b := lab(t)
	n.Run(time.Second)
	a.send(n, b, 100)
	n.Run(time.Second)
	var seen [][]byte
	n.Seen = func(_, to netip.AddrPort, d []byte) {
		if to.Addr() == ap("203.0.113.3:1").Addr() {
			seen = append(seen, append([]byte(nil), d...))
		}
	}
	for range 60 { // captures HELLO, ECHO and their answers
		a.send(n, b, 100)
		n.Run(time.Second)
	}
	n.Seen = nil
	before := len(b.core.Peers())
	evil, target := ap("198.51.100.66:666"), ap("203.0.113.3:9993")
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 5000 {
		d := append([]byte(nil), seen[rnd.IntN(len(seen))]...)
		switch i % 4 {
		case 0: // replay from another place
		case 1:
			d = d[:rnd.IntN(len(d)+1)]
		case 2:
			for range 3 {
				d[rnd.IntN(len(d))] ^= byte(1 << rnd.IntN(8))
			}
		case 3:
			for j := range d {
				d[j] = byte(rnd.Uint32())
			}
		}
		n.Inject(evil, target, d)
		n.Run(time.Millisecond)
	}
	for _, p := range b.core.Peers() {
		for _, pa := range p.Paths {
			if pa.Endpoint == evil {
				t.Errorf("peer %s has the attacker's endpoint as a path", p.Address)
			}
		}
	}
	if after := len(b.core.Peers()); after != before {
		t.Errorf("%d peers, before %d", after, before)
	}
	st := b.core.Stats()
	if st.OutQueue > st.OutQueueLimit || st.HeldQueue > st.HeldQueueLimit {
		t.Errorf("queues over their limits: %+v", st)
	}
	b.got = 0
	a.send(n, b, 100)
	n.Run(time.Second)
	if b.got != 1 {
		t.Error("traffic stopped")
	}
	_ = r
}

func TestUnsolicitedReplies(t *testing.T) {
	t.Parallel()
	n, _, a, b := lab(t)
	n.Run(time.Second)
	a.send(n, b, 10)
	n.Run(time.Second)
	peer := a.core.Peer(b.id.Address())
	before := b.core.Stats().RejectedBy(vl1.RejectUnexpectedReply)
	payload := append([]byte{byte(packet.VerbEcho)}, binary.BigEndian.AppendUint64(nil, 42)...)
	a.core.Send(a.w.Begin(a.port, n.Now), peer.Address(), packet.VerbOK, payload, vl1.SendOpts{})
	n.Run(time.Second)
	if got := b.core.Stats().RejectedBy(vl1.RejectUnexpectedReply); got != before+1 {
		t.Errorf("%d unexpected replies counted, want 1", got-before)
	}
}

func TestDataPathAllocs(t *testing.T) {
	n, _, a, b := lab(t)
	n.Run(time.Second)
	a.send(n, b, 10)
	n.Run(3 * time.Second)
	a.send(n, b, 1400)
	n.Run(time.Second) // the path is known to carry as much in one datagram
	sink := &sinkOut{}
	peer := a.core.Peer(b.id.Address())
	buf := make([]byte, packet.HeaderLen+1380)
	if got := testing.AllocsPerRun(200, func() {
		if !a.core.SendData(a.w.Begin(sink, n.Now), peer, packet.VerbFrame, buf) {
			t.Fatal("no route")
		}
	}); got > maxCryptAllocs {
		t.Errorf("SendData: %v allocations", got)
	}
	from := ap("203.0.113.2:9993")
	if got := testing.AllocsPerRun(200, func() {
		a.core.SendData(a.w.Begin(sink, n.Now), peer, packet.VerbFrame, buf)
		b.core.Receive(b.w.Begin(sink, n.Now), 1, from, sink.last)
	}); got > 2*maxCryptAllocs {
		t.Errorf("SendData and Receive: %v allocations", got)
	}
}

type sinkOut struct{ last []byte }

func (s *sinkOut) Send(_ vl1.SocketID, _ netip.AddrPort, head, data []byte) {
	s.last = append(append(s.last[:0], head...), data...)
}
func (s *sinkOut) SendTTL(vl1.SocketID, netip.AddrPort, []byte, int) {}

func FuzzReceive(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"), byte(0))
	f.Fuzz(func(t *testing.T, d []byte, verb byte) {
		n, _, a, b := lab(t)
		n.Run(time.Second)
		n.Inject(ap("198.51.100.66:666"), ap("203.0.113.3:9993"), d)
		// The same bytes as an authentic packet.
		a.core.Send(a.w.Begin(a.port, n.Now), b.id.Address(), packet.Verb(verb&0x1f), d, vl1.SendOpts{})
		n.Run(time.Second)
		if fmt.Sprint(len(b.core.Peers())) == "0" {
			t.Error("forgot everybody")
		}
	})
}

func BenchmarkSendData(b *testing.B) {
	n, _, x, y := lab(b)
	n.Run(time.Second)
	x.send(n, y, 10)
	n.Run(3 * time.Second)
	x.send(n, y, 1404)
	n.Run(time.Second)
	sink := &sinkOut{}
	peer := x.core.Peer(y.id.Address())
	buf := make([]byte, packet.HeaderLen+1404)
	x.w.Begin(sink, n.Now)
	b.SetBytes(1404)
	b.ReportAllocs()
	for b.Loop() {
		x.core.SendData(x.w, peer, packet.VerbFrame, buf)
	}
}

// maxCryptAllocs is what sealing or opening one packet may allocate.
const maxCryptAllocs = 0

// BenchmarkReceive opens packets of 1404 bytes, one after sealing it.
func BenchmarkReceive(b *testing.B) {
	n, _, x, y := lab(b)
	n.Run(time.Second)
	x.send(n, y, 10)
	y.send(n, x, 10)
	n.Run(3 * time.Second)
	sink := &sinkOut{}
	peer := x.core.Peer(y.id.Address())
	buf := make([]byte, packet.HeaderLen+1404)
	from := ap("203.0.113.2:9993")
	x.w.Begin(sink, n.Now)
	y.w.Begin(discard{}, n.Now)
	b.SetBytes(1404)
	b.ReportAllocs()
	for b.Loop() {
		x.core.SendData(x.w, peer, packet.VerbFrame, buf)
		y.core.Receive(y.w, 1, from, sink.last)
	}
}
