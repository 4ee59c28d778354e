package vl1_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
)

// balance counts what goes to each address from a target, and what came from there.
type balance struct {
	n       *internet
	target  netip.AddrPort
	in, out map[netip.Addr]int
}

func newBalance(n *internet, target *host) *balance {
	b := &balance{n: n, target: target.port.Endpoints()[0], in: make(map[netip.Addr]int), out: make(map[netip.Addr]int)}
	n.Drop = func(from, to netip.AddrPort, d []byte) bool {
		if from == b.target {
			b.out[to.Addr()] += len(d)
		}
		return false
	}
	return b
}

func (b *balance) inject(from netip.AddrPort, d []byte) {
	b.in[from.Addr()] += len(d)
	b.n.Inject(from, b.target, d)
	b.n.Run(5 * time.Millisecond)
}

// pushed is PUSH_DIRECT_PATHS of 16 endpoints.
func pushed(first byte) (b []byte) {
	b = []byte{0, 16}
	for i := range 16 {
		b = append(b, 0, 0, 0, 4, 6, 66, first, byte(i), 1, 0, 99)
	}
	return b
}

// Whoever fakes the address of another makes nobody send more bytes there than came:
// whatever the verb, how many relays the header claims, and however often it is repeated.
func TestNoBytesForNothing(t *testing.T) {
	var whois []byte
	for _, id := range testIDs(t)[:4] {
		whois = id.Address().Append(whois)
	}
	for verb, payload := range map[packet.Verb][]byte{
		packet.VerbEcho: nil, packet.VerbWhois: whois, packet.VerbFrame: make([]byte, 20), packet.VerbUserMessage: make([]byte, 20),
		packet.VerbPushDirectPaths: pushed(1), packet.VerbOK: make([]byte, 20), packet.VerbError: make([]byte, 20), packet.VerbRendezvous: make([]byte, 13),
		packet.VerbNOP: nil, packet.VerbAck: nil, 0x1f: bytes.Repeat([]byte{1}, 1300),
	} {
		for _, size := range []int{0, 1300} {
			for hops := range uint8(4) {
				name := fmt.Sprintf("verb %02x, %d bytes, %d hops", verb, size, hops)
				n := newInternet(t, 1, nats{})
				n.connect(t, 10*time.Second)
				for _, target := range []*host{n.root, n.a} {
					b := newBalance(n, target)
					v := newVoice(t, n.ids[2], target.id)
					b.inject(ap("43.0.0.1:1"), v.hello(12, n.planet))
					say := func() packet.Packet {
						p := v.say(verb, packet.SuiteAES, append(bytes.Clone(payload), make([]byte, max(0, size-len(payload)))...))
						p.SetHops(hops)
						return p
					}
					again := say()
					for i := range 60 {
						b.inject(ap("44.0.0.1:666"), say())                                                 // one victim
						b.inject(netip.AddrPortFrom(netip.AddrFrom4([4]byte{45, 0, 0, byte(i)}), 9), say()) // many
						b.inject(ap("46.0.0.1:666"), again)                                                 // a repeat
						n.Run(100 * time.Millisecond)
					}
					n.Run(10 * time.Second)
					for a, out := range b.out {
						if first := a.As4()[0]; first >= 43 && first <= 46 && out > b.in[a] {
							t.Errorf("%s: %v got %d bytes for %d", name, a, out, b.in[a])
						}
					}
				}
			}
		}
	}
}

// The same with packets in fragments: only what came from the victim's address counts.
func TestNoBytesForFragments(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	b := newBalance(n, n.a)
	v := newVoice(t, n.ids[2], n.a.id)
	for range 40 {
		p := packet.Packet(append(make([]byte, packet.HeaderLen), make([]byte, 1200)...))
		packet.PutHeader(p, packet.ID(v.rnd.Uint64()), v.to, v.id.Address(), packet.VerbEcho)
		p.SetFragmented(true)
		v.keys.Seal(p, packet.SuiteAES, &v.s)
		var hdr [packet.FragmentHeaderLen]byte
		from := ap("43.0.0.1:1")
		packet.Split(p, 1210, false, &hdr, func(head, data []byte) {
			b.inject(from, append(bytes.Clone(head), data...))
			from = ap("44.0.0.1:1")
		})
		n.Run(time.Second)
	}
	if a := netip.MustParseAddr("44.0.0.1"); b.out[a] > b.in[a] {
		t.Errorf("the victim got %d bytes for %d", b.out[a], b.in[a])
	}
	if b.out[netip.MustParseAddr("43.0.0.1")] == 0 && n.a.core.Stats().RejectedBy(vl1.RejectUnproven) == 0 {
		t.Error("no packet was put together")
	}
}

// One that is told endpoints by a stranger sends no more about than the stranger sent; an
// address that many tell hears little.
func TestPushedEndpoints(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	b := newBalance(n, n.a)
	total := func() (sum int) {
		for a, out := range b.out {
			if a.As4()[0] == 66 {
				sum += out
			}
		}
		return sum
	}
	v := newVoice(t, n.ids[4], n.a.id)
	b.inject(ap("43.0.0.1:1"), v.hello(12, n.planet))
	in := 0
	for i := range 20 {
		p := v.say(packet.VerbPushDirectPaths, packet.SuiteAES, pushed(byte(i)))
		in += len(p)
		b.inject(ap("43.0.0.1:1"), p)
	}
	if out := total(); out == 0 || out > in {
		t.Errorf("%d bytes sent about for %d", out, in)
	}
	v.say(packet.VerbFrame, packet.SuiteAES, nil)
	clear(b.out)
	for range 200 { // a member: its first frame makes it one
		b.inject(ap("43.0.0.1:1"), v.say(packet.VerbFrame, packet.SuiteAES, make([]byte, 20)))
		b.inject(ap("43.0.0.1:1"), v.say(packet.VerbPushDirectPaths, packet.SuiteAES, pushed(99)))
		n.Run(time.Second)
	}
	for a, out := range b.out {
		if a.As4()[0] == 66 && out > 200*4*70 {
			t.Errorf("%v got %d bytes in 200 s", a, out)
		}
	}
}

// Who answers is answered: a peer that moves is found again though nothing is known of
// its new place.
func TestOwedEcho(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	v := newVoice(t, n.ids[2], n.a.id)
	place := ap("44.0.0.1:666")
	var got []packet.Verb
	n.Drop = func(_, to netip.AddrPort, d []byte) bool {
		if p := packet.Packet(bytes.Clone(d)); to == place && v.keys.Open(p, &v.s) == nil {
			got = append(got, p.Verb())
			if p.Verb() == packet.VerbEcho {
				ok := append([]byte{byte(packet.VerbEcho)}, d[:8]...)
				n.Inject(place, n.a.port.Endpoints()[0], v.say(packet.VerbOK, packet.SuiteAES, ok))
			}
		}
		return false
	}
	n.Inject(place, n.a.port.Endpoints()[0], v.say(packet.VerbEcho, packet.SuiteAES, nil)) // as the reference asks
	n.Run(time.Second)
	if len(got) < 2 || got[0] != packet.VerbEcho || got[1] != packet.VerbOK {
		t.Errorf("sent %v, want our own question and then the answer", got)
	}
}

// A packet that was captured is taken once, wherever it comes from, also if it was sent
// in fragments or relayed; the window is that of the latest packets of all peers.
func TestRepeats(t *testing.T) {
	n := newInternet(t, 1, nats{})
	n.connect(t, 10*time.Second)
	var captured [][]byte
	n.Seen = func(_, to netip.AddrPort, d []byte) {
		if to == n.b.port.Endpoints()[0] {
			captured = append(captured, bytes.Clone(d))
		}
	}
	n.b.got = 0
	for range 500 {
		n.a.send(n.Net, n.b, 100)
		n.a.send(n.Net, n.b, 3000)
		n.Run(time.Millisecond)
	}
	n.Run(time.Second)
	n.Seen = nil
	if n.b.got != 1000 {
		t.Fatalf("%d frames", n.b.got)
	}
	before := n.b.core.Stats()
	for _, from := range []netip.AddrPort{n.a.port.Endpoints()[0], ap("47.0.0.1:9"), rootEndpoint} {
		for _, d := range captured {
			if p := packet.Packet(bytes.Clone(d)); from == rootEndpoint && packet.Classify(p) == packet.KindPacket {
				p.SetHops(1)
				d = p
			}
			n.Inject(from, n.b.port.Endpoints()[0], d)
		}
		n.Run(time.Second)
	}
	if n.b.got > 1000+45 { // three packets in one place: seldom, and 9 each time
		t.Errorf("%d of 3,000 repeats were taken", n.b.got-1000)
	}
	if got := n.b.core.Stats().RejectedBy(vl1.RejectReplay) - before.RejectedBy(vl1.RejectReplay); got < 2950 {
		t.Errorf("%d repeats counted", got)
	}
	for _, p := range n.b.core.Peers() {
		for _, pa := range p.Paths {
			if pa.Endpoint.Addr() == netip.MustParseAddr("47.0.0.1") {
				t.Error("a path to where a repeat came from")
			}
		}
	}
}
